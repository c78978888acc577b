package netns

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// wire is a joined namespace with one link, and sockets for whole frames at the
// guest's end of it and at the network's.
type wire struct {
	pod        *Namespace
	guest, far int
}

func wired(t *testing.T, o JoinOptions) (w wire) {
	t.Helper()
	pod, far := plain(t, "pod"), plain(t, "far")
	err := pod.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name, la.HardwareAddr = "eth0", net.HardwareAddr{2, 0, 0, 0, 0, 5}
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: "far", PeerNamespace: netlink.NsFd(int(far.file.Fd()))}); err != nil {
			return err
		}
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		errs := []error{sysctl("ipv6/conf/eth0/accept_dad", "0"), netlink.LinkSetUp(link)}
		for _, p := range []string{"10.88.0.5/24", "fd88::5/64"} {
			errs = append(errs, netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(p)), Flags: unix.IFA_F_NODAD}))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Fatal(err)
	}
	j, err := Join(pod.path, o)
	if err != nil {
		t.Fatal(err)
	}
	guest := plain(t, "guest")
	err = guest.Do(func() error {
		tap, err := openTap("eth0", 0)
		if err != nil {
			return err
		}
		carry(t, tap, j.Links[0].Tap)
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(sysctl("ipv6/conf/eth0/disable_ipv6", "1"), netlink.LinkSetUp(link))
	})
	if err != nil {
		t.Fatal(err)
	}
	err = far.Do(func() error {
		link, err := netlink.LinkByName("far")
		return errors.Join(err, sysctl("ipv6/conf/far/disable_ipv6", "1"), netlink.LinkSetUp(link))
	})
	if err != nil {
		t.Fatal(err)
	}
	w = wire{pod, packets(t, guest, "eth0"), packets(t, far, "far")}
	w.awaken(t)
	return w
}

// awaken sends until something arrives: links that were just set up lose what
// comes before the kernel has noticed that they are.
func (w wire) awaken(t *testing.T) {
	t.Helper()
	greeting := four(everyone, ownMAC, "10.88.0.5", "10.88.0.253", unix.IPPROTO_SCTP)
	buf := make([]byte, 2048)
	for range 100 {
		w.send(t, greeting)
		poll := []unix.PollFd{{Fd: int32(w.far), Events: unix.POLLIN}}
		if n, err := unix.Poll(poll, 100); err != nil || n == 0 {
			continue
		}
		if n, err := unix.Read(w.far, buf); err == nil && slices.Equal(buf[:n], greeting) {
			return
		}
	}
	t.Fatal("nothing passes")
}

// packets opens a socket for whole frames, which waits for them for a while.
func packets(t *testing.T, ns *Namespace, device string) (fd int) {
	t.Helper()
	err := ns.Do(func() error {
		ifi, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		return errors.Join(unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: ifi.Index, Protocol: all}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

var (
	ownMAC   = net.HardwareAddr{2, 0, 0, 0, 0, 5}
	otherMAC = net.HardwareAddr{2, 0, 0, 0, 0, 9}
	everyone = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	allNodes = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
)

func frame(to, from net.HardwareAddr, kind uint16, payload ...[]byte) []byte {
	f := slices.Concat(to, from, binary.BigEndian.AppendUint16(nil, kind))
	return append(slices.Concat(append([][]byte{f}, payload...)...), make([]byte, 64)...)
}

func four(to, from net.HardwareAddr, src, dst string, proto byte) []byte {
	return frame(to, from, unix.ETH_P_IP, []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, proto, 0, 0},
		netip.MustParseAddr(src).AsSlice(), netip.MustParseAddr(dst).AsSlice(), []byte{0, 9, 0, 9, 0, 8, 0, 0})
}

// tagged is a frame that would pass were it not for its tag.
func tagged(kind uint16) []byte {
	plain := four(everyone, ownMAC, "10.88.0.5", "10.88.0.1", unix.IPPROTO_UDP)
	return slices.Concat(plain[:12], binary.BigEndian.AppendUint16(nil, kind), []byte{0, 5}, plain[12:])
}

// six is an ICMPv6 message with a target.
func six(from net.HardwareAddr, src string, kind byte, target string) []byte {
	return frame(allNodes, from, unix.ETH_P_IPV6, []byte{0x60, 0, 0, 0, 0, 24, unix.IPPROTO_ICMPV6, 255},
		netip.MustParseAddr(src).AsSlice(), netip.MustParseAddr("ff02::1").AsSlice(),
		[]byte{kind, 0, 0, 0, 0, 0, 0, 0}, netip.MustParseAddr(target).AsSlice())
}

func arp(from, says net.HardwareAddr, ip string) []byte {
	return frame(everyone, from, unix.ETH_P_ARP, []byte{0, 1, 8, 0, 6, 4, 0, 2}, says, netip.MustParseAddr(ip).AsSlice(), make([]byte, 6), []byte{10, 88, 0, 1})
}

// TestWard sends frame after frame from a guest and sees which of them leave its
// tap, and how those that do not are counted.
func TestWard(t *testing.T) {
	w := wired(t, JoinOptions{})
	for _, tt := range []struct {
		name, want string
		frame      []byte
	}{
		{"own IPv4", "passes", four(everyone, ownMAC, "10.88.0.5", "10.88.0.1", unix.IPPROTO_UDP)},
		{"own IPv6", "passes", six(ownMAC, "fd88::5", neighbourSolicitation, "fd88::1")},
		{"own ARP", "passes", arp(ownMAC, ownMAC, "10.88.0.5")},
		{"ARP probe", "passes", arp(ownMAC, ownMAC, "0.0.0.0")},
		{"own advertisement", "passes", six(ownMAC, "fd88::5", neighbourAdvert, "fd88::5")},
		{"link-local advertisement", "passes", six(ownMAC, "fe80::ff:fe00:5", neighbourAdvert, "fe80::ff:fe00:5")},
		{"probe for an address", "passes", six(ownMAC, "::", neighbourSolicitation, "fd88::5")},
		{"foreign hardware address", "spoofed", four(everyone, otherMAC, "10.88.0.5", "10.88.0.1", unix.IPPROTO_UDP)},
		{"foreign IPv4", "spoofed", four(everyone, ownMAC, "10.88.0.6", "10.88.0.1", unix.IPPROTO_UDP)},
		{"no IPv4", "spoofed", four(everyone, ownMAC, "0.0.0.0", "255.255.255.255", unix.IPPROTO_UDP)},
		{"from loopback", "spoofed", four(everyone, ownMAC, "127.0.0.1", "10.88.0.1", unix.IPPROTO_TCP)},
		{"to loopback", "spoofed", four(everyone, ownMAC, "10.88.0.5", "127.0.0.1", unix.IPPROTO_TCP)},
		{"ARP for another", "spoofed", arp(ownMAC, ownMAC, "10.88.0.1")},
		{"ARP with another's hardware address", "spoofed", arp(ownMAC, otherMAC, "10.88.0.5")},
		{"foreign IPv6", "spoofed", six(ownMAC, "fd88::6", neighbourSolicitation, "fd88::1")},
		{"router advertisement", "spoofed", six(ownMAC, "fe80::ff:fe00:5", routerAdvertisement, "::")},
		{"redirect", "spoofed", six(ownMAC, "fe80::ff:fe00:5", redirect, "fd88::1")},
		{"advertisement for another", "spoofed", six(ownMAC, "fd88::5", neighbourAdvert, "fd88::1")},
		{"VLAN", "rest", tagged(unix.ETH_P_8021Q)},
		{"outer VLAN", "rest", tagged(unix.ETH_P_8021AD)},
		{"spanning tree", "rest", frame(net.HardwareAddr{1, 0x80, 0xc2, 0, 0, 0}, ownMAC, 0x0026, []byte{0x42, 0x42, 3})},
		{"UDP to the host's end", "rest", four(HostEndMAC, ownMAC, "127.0.0.1", HostEnd.String(), unix.IPPROTO_UDP)},
		{"own address to the host's end", "rest", four(HostEndMAC, ownMAC, "10.88.0.5", HostEnd.String(), unix.IPPROTO_TCP)},
		{"foreign frame to the host's end", "spoofed", four(HostEndMAC, otherMAC, "127.0.0.1", HostEnd.String(), unix.IPPROTO_TCP)},
		{"answer to the host's end", "passes", four(HostEndMAC, ownMAC, "127.0.0.1", HostEnd.String(), unix.IPPROTO_TCP)},
	} {
		if got := w.fate(t, tt.frame); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

// fate sends a frame, and behind it one that passes: when that arrives, the
// frame has met its end.
func (w wire) fate(t *testing.T, f []byte) string {
	t.Helper()
	fake, rest, err := Stopped(w.pod.path)
	if err != nil {
		t.Fatal(err)
	}
	w.send(t, f)
	w.flush(t)
	fakeNow, restNow, err := Stopped(w.pod.path)
	switch {
	case err != nil:
		t.Fatal(err)
	case fakeNow == fake && restNow == rest:
		return "passes"
	case fakeNow == fake+1 && restNow == rest:
		return "spoofed"
	case fakeNow == fake && restNow == rest+1:
		return "rest"
	}
	t.Fatalf("counted %d and %d, were %d and %d", fakeNow, restNow, fake, rest)
	return ""
}

func (w wire) send(t *testing.T, f []byte) {
	t.Helper()
	if _, err := unix.Write(w.guest, f); err != nil {
		t.Fatal(err)
	}
}

// flush waits until all that was sent has come as far as it can.
func (w wire) flush(t *testing.T) {
	t.Helper()
	marker := four(everyone, ownMAC, "10.88.0.5", "10.88.0.254", unix.IPPROTO_SCTP)
	w.send(t, marker)
	buf := make([]byte, 2048)
	for {
		n, err := unix.Read(w.far, buf)
		if err != nil {
			t.Fatalf("wait for a frame that passes: %v", err)
		}
		if slices.Equal(buf[:n], marker) {
			return
		}
	}
}

// TestUnfenced shows that the opt-out lets other addresses pass, and the two
// ends of port-forward stay apart all the same.
func TestUnfenced(t *testing.T) {
	w := wired(t, JoinOptions{Unfenced: true})
	for _, tt := range []struct {
		name, want string
		frame      []byte
	}{
		{"foreign addresses", "passes", four(everyone, otherMAC, "10.88.0.6", "10.88.0.1", unix.IPPROTO_UDP)},
		{"router advertisement", "passes", six(ownMAC, "fe80::ff:fe00:5", routerAdvertisement, "::")},
		{"own address to the host's end", "rest", four(HostEndMAC, ownMAC, "10.88.0.5", HostEnd.String(), unix.IPPROTO_TCP)},
		{"from loopback", "spoofed", four(everyone, ownMAC, "127.0.0.1", "10.88.0.1", unix.IPPROTO_TCP)},
	} {
		if got := w.fate(t, tt.frame); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

// TestJoinAfterCrash takes the tap away, as a machine that was killed does.
func TestJoinAfterCrash(t *testing.T) {
	pod := plain(t, "pod")
	far := plain(t, "far")
	err := pod.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name = "eth0"
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: "far", PeerNamespace: netlink.NsFd(int(far.file.Fd()))})
		if err != nil {
			return err
		}
		link, err := netlink.LinkByName("eth0")
		return errors.Join(err, netlink.LinkSetUp(link))
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		j, err := Join(pod.path, JoinOptions{Owner: 12345})
		if err != nil {
			t.Fatal(err)
		}
		if len(j.Links) != 1 || j.Links[0].Tap == nil {
			t.Fatalf("joined %+v", j.Links)
		}
		if got := linkNames(t, pod); got != "lo eth0 hbr2 hbt2" {
			t.Errorf("links %s", got)
		}
		j.Close()
	}
	if err := Leave(pod.path); err != nil {
		t.Error(err)
	}
	if got := linkNames(t, pod); got != "lo eth0" {
		t.Errorf("links after leaving: %s", got)
	}
}

func TestJoinRefusals(t *testing.T) {
	needRoot(t)
	if _, err := Join("/proc/self/ns/net", JoinOptions{}); err == nil || !strings.Contains(err.Error(), "own network") {
		t.Errorf("joined the machine's own network: %v", err)
	}
	if err := Leave("/proc/1/ns/net"); err == nil {
		t.Error("left the machine's own network")
	}
	file := t.TempDir() + "/file"
	os.WriteFile(file, nil, 0o600)
	if _, err := Join(file, JoinOptions{}); !errors.Is(err, errUnbound) {
		t.Errorf("joined a plain file: %v", err)
	}
	for _, gone := range []string{file, file + ".none"} {
		if err := Leave(gone); err != nil {
			t.Errorf("leave %s: %v", gone, err)
		}
	}
	for want, command := range map[string]string{
		"routing by rules": "ip rule add from 10.9.0.2 table 100",
		"next hop":         "ip link add x0 type veth peer x1; ip link set x0 up; ip link set x1 up; ip addr add 10.9.0.2/24 dev x0; ip route add 10.8.0.0/24 nexthop via 10.9.0.3 nexthop via 10.9.0.4",
		"kind bridge":      "ip link add x0 type bridge; ip link set x0 up",
	} {
		pod := plain(t, "pod")
		if out, err := shell(t, pod, "sh", "-c", command); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		before := linkNames(t, pod)
		if _, err := Join(pod.path, JoinOptions{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: joined all the same: %v", want, err)
		}
		if after := linkNames(t, pod); after != before {
			t.Errorf("%s: links are %s, were %s", want, after, before)
		}
	}
	pod := plain(t, "pod")
	if j, err := Join(pod.path, JoinOptions{}); err != nil || len(j.Links) != 0 {
		t.Errorf("a namespace without links: %+v, %v", j, err)
	}
}
