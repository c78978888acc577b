package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// Attributes and flags of rtnetlink that package syscall lacks or that say
// nothing there.
const (
	onLink     = 4 // RTNH_F_ONLINK
	bootProto  = 3
	mainTable  = 254
	mtuMetric  = 2 // RTAX_MTU
	addrFlags  = 8 // IFA_FLAGS
	noDAD      = 0x02
	noRoute    = 0x200
	newNeigh   = 28
	permanent  = 0x80
	neighDst   = 1
	neighMAC   = 2
	loopback   = 1 // the index of lo
	isUp       = 1
	createNew  = syscall.NLM_F_CREATE | syscall.NLM_F_REPLACE
	confFolder = "/proc/sys/net/"
)

// configure brings up lo and makes the interfaces, addresses, routes and
// neighbours what the host says.
func configure(payload []byte) error {
	m, err := guestproto.ParseNetwork(payload)
	if err != nil {
		return err
	}
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer syscall.Close(n.fd)
	n.link("bring up lo", loopback, isUp, isUp, nil)
	links := n.links()
	for i := range m.Interfaces {
		n.prepare(links, &m.Interfaces[i])
	}
	for i := range m.Routes {
		n.route(links, &m.Routes[i])
	}
	for i := range m.Neighbours {
		n.neighbour(links, &m.Neighbours[i])
	}
	return n.err
}

// link is an interface as the kernel knows it.
type link struct {
	index uint32
	flags uint32
	born  [6]byte // the device's own hardware address
	state guestproto.InterfaceState
}

func named(links []link, name string) *link {
	for i := range links {
		if links[i].state.Name == name {
			return &links[i]
		}
	}
	return nil
}

// prepare makes an interface what f says and keeps links true.
func (n *netlink) prepare(links []link, f *guestproto.Interface) {
	var l *link
	for i := range links {
		if links[i].index != loopback && links[i].born == f.Device {
			l = &links[i]
		}
	}
	if l == nil {
		n.fail(fail("find interface with address", hardware(f.Device), syscall.ENODEV))
		return
	}
	n.rename(links, l, f.Name)
	if f.MAC == ([6]byte{}) {
		f.MAC = f.Device
	}
	var b []byte
	if f.MAC != l.state.MAC {
		b = attribute(b, syscall.IFLA_ADDRESS, f.MAC[:])
	}
	if f.MTU != 0 && f.MTU != l.state.MTU {
		b = attribute(b, syscall.IFLA_MTU, le32(nil, f.MTU))
	}
	if len(b) > 0 {
		n.link("change interface "+f.Name, l.index, 0, 0, b)
		l.state.MAC = f.MAC
	}
	n.sysctls(f)
	n.link("bring up interface "+f.Name, l.index, isUp, isUp, nil)
	l.flags |= isUp
	for i := range f.Addresses {
		n.address(l.index, &f.Addresses[i])
	}
}

// rename gives an interface its name, which an interface cannot change while
// it is up. Whoever has the name gives it up: it will get its own, or it has
// none that anybody asked for.
func (n *netlink) rename(links []link, l *link, name string) {
	if l.state.Name == name {
		return
	}
	if other := named(links, name); other != nil {
		n.rename(links, other, "was"+strconv.Itoa(int(other.index)))
	}
	what := "name interface " + name
	if l.flags&isUp != 0 {
		n.link(what, l.index, 0, isUp, nil)
		l.flags &^= isUp
	}
	n.link(what, l.index, 0, 0, attribute(nil, syscall.IFLA_IFNAME, append([]byte(name), 0)))
	l.state.Name = name
}

// sysctls sets what must stand before the interface comes up: all of it is
// static, so nothing is probed for and nothing that others announce is taken.
func (n *netlink) sysctls(f *guestproto.Interface) {
	for _, s := range [...]struct {
		key, value string
		six        bool
	}{
		{"disable_ipv6", digit(f.NoIPv6), true},
		{"accept_ra", "0", true},
		{"autoconf", "0", true},
		{"accept_redirects", "0", true},
		{"accept_dad", "0", true},
		{"accept_redirects", "0", false},
		{"route_localnet", digit(f.LocalNet), false},
	} {
		family := "ipv4"
		if s.six {
			family = "ipv6"
		}
		err := writeFile(confFolder+family+"/conf/"+f.Name+"/"+s.key, s.value)
		if e, ok := err.(*failure); ok && e.errno == syscall.ENOENT && s.six && wantsNoIPv6(f) {
			continue // a kernel without IPv6, and nobody misses it
		}
		if err != nil {
			n.fail(err)
		}
	}
}

func wantsNoIPv6(f *guestproto.Interface) bool {
	for i := range f.Addresses {
		if f.Addresses[i].IP.Length == 16 {
			return false
		}
	}
	return true
}

func digit(b bool) string {
	if b {
		return "1"
	}
	return "0"
}

// netlink sends requests one after the other until one fails.
type netlink struct {
	fd  int
	seq uint32
	err error
}

func openNetlink() (*netlink, error) {
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.NETLINK_ROUTE)
	if err != nil {
		return nil, fail("open", "netlink", err)
	}
	return &netlink{fd: fd}, nil
}

// fail keeps the first reason.
func (n *netlink) fail(err error) {
	if n.err == nil {
		n.err = err
	}
}

// link changes flags and attributes of an interface.
func (n *netlink) link(what string, index, flags, change uint32, attributes []byte) {
	b := le32(le32(le32([]byte{0, 0, 0, 0}, index), flags), change)
	n.do(what, syscall.RTM_NEWLINK, 0, append(b, attributes...))
}

func (n *netlink) address(link uint32, a *guestproto.Address) {
	flags := uint32(0)
	if a.IP.Length == 16 {
		flags |= noDAD
	}
	if a.NoRoute {
		flags |= noRoute
	}
	b := le32([]byte{family(&a.IP), a.Bits, 0, 0}, link)
	b = attribute(b, syscall.IFA_LOCAL, a.IP.Slice())
	b = attribute(b, syscall.IFA_ADDRESS, a.IP.Slice())
	b = attribute(b, addrFlags, le32(nil, flags))
	n.do("set address "+written(&a.IP), syscall.RTM_NEWADDR, createNew, b)
}

func (n *netlink) route(links []link, r *guestproto.Route) {
	to := &r.Destination
	what := "add route to " + written(&to.IP) + "/" + strconv.Itoa(int(to.Bits))
	b := []byte{family(&to.IP), to.Bits, 0, 0, mainTable, bootProto, r.Scope, byte(r.Kind)}
	flags := uint32(0)
	if r.OnLink {
		flags = onLink
	}
	b = le32(b, flags)
	if to.Bits > 0 {
		b = attribute(b, syscall.RTA_DST, to.IP.Slice())
	}
	if r.Gateway.Length > 0 {
		b = attribute(b, syscall.RTA_GATEWAY, r.Gateway.Slice())
	}
	if r.Source.Length > 0 {
		b = attribute(b, syscall.RTA_PREFSRC, r.Source.Slice())
	}
	if r.Metric > 0 {
		b = attribute(b, syscall.RTA_PRIORITY, le32(nil, r.Metric))
	}
	if r.MTU > 0 {
		b = attribute(b, syscall.RTA_METRICS, attribute(nil, mtuMetric, le32(nil, r.MTU)))
	}
	if r.Kind == guestproto.RouteUnicast {
		l := named(links, r.Interface)
		if l == nil {
			n.fail(fail(what+" on", r.Interface, syscall.ENODEV))
			return
		}
		b = attribute(b, syscall.RTA_OIF, le32(nil, l.index))
	}
	n.do(what, syscall.RTM_NEWROUTE, createNew, b)
}

func (n *netlink) neighbour(links []link, v *guestproto.Neighbour) {
	what := "add neighbour " + written(&v.IP)
	l := named(links, v.Interface)
	if l == nil {
		n.fail(fail(what+" on", v.Interface, syscall.ENODEV))
		return
	}
	b := le32([]byte{family(&v.IP), 0, 0, 0}, l.index)
	b = append(b, permanent, 0, 0, 0)
	b = attribute(b, neighDst, v.IP.Slice())
	b = attribute(b, neighMAC, v.MAC[:])
	n.do(what, newNeigh, createNew, b)
}

// do sends one request and reads the kernel's answer.
func (n *netlink) do(what string, kind, flags uint16, body []byte) {
	if n.err != nil {
		return
	}
	if err := n.send(kind, flags|syscall.NLM_F_ACK, body); err != nil {
		n.err = fail(what, "by netlink", err)
		return
	}
	var reply [1024]byte
	got, _, err := syscall.Recvfrom(n.fd, reply[:], 0)
	if err == nil && (got < syscall.NLMSG_HDRLEN+4 || reply[4] != syscall.NLMSG_ERROR) {
		err = syscall.EBADMSG
	}
	if err == nil {
		err = answered(reply[syscall.NLMSG_HDRLEN:got])
	}
	if err != nil {
		n.err = fail(what, "by netlink", err)
	}
}

func (n *netlink) send(kind, flags uint16, body []byte) error {
	n.seq++
	b := le32(nil, uint32(syscall.NLMSG_HDRLEN+len(body)))
	flags |= syscall.NLM_F_REQUEST
	b = append(b, byte(kind), byte(kind>>8), byte(flags), byte(flags>>8))
	b = append(le32(le32(b, n.seq), 0), body...)
	return syscall.Sendto(n.fd, b, 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK})
}

// answered reads the number in an error message; 0 is well.
func answered(b []byte) error {
	if code := -int32(get32(b)); code != 0 {
		return syscall.Errno(code)
	}
	return nil
}

func family(a *guestproto.IP) byte {
	if a.Length == 16 {
		return syscall.AF_INET6
	}
	return syscall.AF_INET
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

func get32(b []byte) uint32 {
	_ = b[3]
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// written is an address for people; no zeros of IPv6 are left out.
func written(a *guestproto.IP) (s string) {
	b := a.Slice()
	if len(b) == 4 {
		s = strconv.Itoa(int(b[0]))
		for _, c := range b[1:] {
			s += "." + strconv.Itoa(int(c))
		}
		return s
	}
	for i := 0; i+1 < len(b); i += 2 {
		if i > 0 {
			s += ":"
		}
		s += strconv.FormatUint(uint64(b[i])<<8|uint64(b[i+1]), 16)
	}
	return s
}

func hardware(mac [6]byte) string {
	const digits = "0123456789abcdef"
	var b []byte
	for i, c := range mac {
		if i > 0 {
			b = append(b, ':')
		}
		b = append(b, digits[c>>4], digits[c&15])
	}
	return string(b)
}
