package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// Attributes and flags of rtnetlink that package syscall lacks or that say
// nothing there.
const (
	onLink    = 4 // RTNH_F_ONLINK
	scopeLink = 253
	bootProto = 3
	mainTable = 254
)

// configure brings up lo and the interface with the MAC address, and routes
// everything to the gateway.
func configure(payload []byte) error {
	m, err := guestproto.ParseNetwork(payload)
	if err != nil {
		return err
	}
	link, err := findLink(m.MAC)
	if err != nil {
		return err
	}
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.NETLINK_ROUTE)
	if err != nil {
		return fail("open", "netlink", err)
	}
	defer syscall.Close(fd)
	n := netlink{fd: fd}
	const lo = 1
	n.up(lo, 0)
	n.up(link, m.MTU)
	n.address(link, m.Address, m.Prefix)
	n.route(link, m.Gateway, m.Prefix == 32)
	return n.err
}

// findLink gives the index of the interface with a MAC address.
func findLink(mac [6]byte) (uint32, error) {
	const dir, digits = "/sys/class/net", "0123456789abcdef"
	var want []byte
	for i, c := range mac {
		if i > 0 {
			want = append(want, ':')
		}
		want = append(want, digits[c>>4], digits[c&15])
	}
	names, err := listDir(dir)
	if err != nil {
		return 0, err
	}
	var buf [64]byte
	for _, name := range names {
		b, err := readFile(dir+"/"+name+"/address", buf[:])
		if err != nil || trim(b) != string(want) {
			continue
		}
		if b, err = readFile(dir+"/"+name+"/ifindex", buf[:]); err != nil {
			return 0, err
		}
		return uint32(number(b)), nil
	}
	return 0, fail("find interface with address", string(want), syscall.ENODEV)
}

// netlink sends requests one after the other until one fails.
type netlink struct {
	fd  int
	seq uint32
	err error
}

func (n *netlink) up(link uint32, mtu uint16) {
	const isUp = 1
	b := []byte{0, 0, 0, 0}
	b = le32(le32(le32(b, link), isUp), isUp) // flags, and which to change
	if mtu > 0 {
		b = attribute(b, syscall.IFLA_MTU, le32(nil, uint32(mtu)))
	}
	n.do("bring up interface "+strconv.Itoa(int(link)), syscall.RTM_NEWLINK, 0, b)
}

func (n *netlink) address(link uint32, a [4]byte, prefix uint8) {
	b := le32([]byte{syscall.AF_INET, prefix, 0, 0}, link)
	b = attribute(b, syscall.IFA_LOCAL, a[:])
	b = attribute(b, syscall.IFA_ADDRESS, a[:])
	n.do("set address "+dotted(a), syscall.RTM_NEWADDR, syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE, b)
}

// route sends everything to the gateway. With a prefix of 32 nothing else is on
// the link, and the gateway is said to be.
func (n *netlink) route(link uint32, gateway [4]byte, alone bool) {
	header := []byte{syscall.AF_INET, 0, 0, 0, mainTable, bootProto, syscall.RT_SCOPE_UNIVERSE, syscall.RTN_UNICAST}
	b := le32(header, onLink)
	if alone {
		host := le32([]byte{syscall.AF_INET, 32, 0, 0, mainTable, bootProto, scopeLink, syscall.RTN_UNICAST}, 0)
		host = attribute(host, syscall.RTA_DST, gateway[:])
		host = attribute(host, syscall.RTA_OIF, le32(nil, link))
		n.do("route to gateway "+dotted(gateway), syscall.RTM_NEWROUTE, syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE, host)
	}
	b = attribute(b, syscall.RTA_GATEWAY, gateway[:])
	b = attribute(b, syscall.RTA_OIF, le32(nil, link))
	n.do("route through gateway "+dotted(gateway), syscall.RTM_NEWROUTE, syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE, b)
}

// do sends one request and reads the kernel's answer.
func (n *netlink) do(what string, kind, flags uint16, body []byte) {
	if n.err != nil {
		return
	}
	n.seq++
	b := le32(nil, uint32(syscall.NLMSG_HDRLEN+len(body)))
	b = append(b, byte(kind), byte(kind>>8), 0, 0)
	flags |= syscall.NLM_F_REQUEST | syscall.NLM_F_ACK
	b[6], b[7] = byte(flags), byte(flags>>8)
	b = append(le32(le32(b, n.seq), 0), body...)
	if err := syscall.Sendto(n.fd, b, 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
		n.err = fail(what, "by netlink", err)
		return
	}
	var reply [1024]byte
	got, _, err := syscall.Recvfrom(n.fd, reply[:], 0)
	if err == nil && (got < syscall.NLMSG_HDRLEN+4 || reply[4] != syscall.NLMSG_ERROR) {
		err = syscall.EBADMSG
	}
	if err == nil {
		r := reply[syscall.NLMSG_HDRLEN:]
		code := -int32(uint32(r[0]) | uint32(r[1])<<8 | uint32(r[2])<<16 | uint32(r[3])<<24)
		if code == 0 {
			return
		}
		err = syscall.Errno(code)
	}
	n.err = fail(what, "by netlink", err)
}

func attribute(b []byte, kind uint16, value []byte) []byte {
	n := uint16(4 + len(value))
	b = append(b, byte(n), byte(n>>8), byte(kind), byte(kind>>8))
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func le32(b []byte, v uint32) []byte {
	return append(b, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
}

func dotted(a [4]byte) string {
	s := strconv.Itoa(int(a[0]))
	for _, c := range a[1:] {
		s += "." + strconv.Itoa(int(c))
	}
	return s
}
