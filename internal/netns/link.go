package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Fixed facts of every sandbox's network, known to the guest too.
var (
	// Gateway is the guest's next hop and name server, on the tap.
	Gateway = netip.MustParseAddr("169.254.1.1")
	// GatewayMAC is the hardware address of the tap.
	GatewayMAC = net.HardwareAddr{0x02, 0x48, 0x42, 0x00, 0x00, 0x01}
)

const (
	// InterceptPort is where ListenTransparent listens.
	InterceptPort = 15001
	// Device is the name of the tap.
	Device = "tap0"

	interceptMark  = 1
	interceptTable = 100
)

// Guest is who the namespace is for.
type Guest struct {
	Address netip.Addr       // IPv4
	MAC     net.HardwareAddr // six bytes
	// Owner is the uid that may use the tap, normally QEMU's.
	Owner int
	// Answers are UDP ports of the guest from which it may answer the gateway.
	Answers []uint16
}

func (g Guest) check() error {
	if !g.Address.Is4() || g.Address.IsUnspecified() || g.Address.IsLoopback() || g.Address.IsMulticast() || g.Address == Gateway {
		return fmt.Errorf("guest address %q is not a usable IPv4 address", g.Address)
	}
	if len(g.MAC) != 6 || g.MAC[0]&1 != 0 {
		return fmt.Errorf("guest hardware address %q is not a unicast Ethernet address", g.MAC)
	}
	if g.Owner < 0 {
		return fmt.Errorf("tap owner %d is not a uid", g.Owner)
	}
	return nil
}

// Tap makes the guest's tap, its addresses and its rules, and returns the
// descriptor for QEMU (tap, no packet information, virtio header). The tap goes
// when the last holder of the descriptor closes it.
func (ns *Namespace) Tap(g Guest) (*os.File, error) {
	if err := g.check(); err != nil {
		return nil, fmt.Errorf("make tap in %q: %w", ns.name, err)
	}
	var tap *os.File
	err := ns.Do(func() (err error) {
		if tap, err = openTap(Device, g.Owner); err != nil {
			return err
		}
		return enclose(Device, g)
	})
	if err != nil {
		if tap != nil {
			tap.Close()
		}
		return nil, fmt.Errorf("make tap in %q: %w", ns.name, err)
	}
	ns.enclosed = true
	return tap, nil
}

// Veth does what Tap does with one end of a veth pair in the tap's place; the
// other end is put into the namespace peer, under the same name, with the guest's
// addresses. It plays a guest where there is none: in tests, and for processes
// that run without a machine of their own.
func (ns *Namespace) Veth(g Guest, peer *Namespace) error { return ns.veth(g, peer, Device) }

func (ns *Namespace) veth(g Guest, peer *Namespace, name string) error {
	if err := g.check(); err != nil {
		return fmt.Errorf("make veth in %q: %w", ns.name, err)
	}
	err := ns.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name = Device
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: name,
			PeerNamespace: netlink.NsFd(int(peer.file.Fd())), PeerHardwareAddr: g.MAC})
		if err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		return enclose(Device, g)
	})
	if err != nil {
		return err
	}
	ns.enclosed = true
	return peer.Do(func() error { return playGuest(name, g) })
}

// playGuest configures a link the way the guest agent configures its own.
func playGuest(device string, g Guest) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	return errors.Join(
		netlink.AddrAdd(link, &netlink.Addr{IPNet: host(g.Address)}),
		netlink.LinkSetUp(link),
		netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: host(Gateway), Scope: netlink.SCOPE_LINK}),
		netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: every(), Gw: Gateway.AsSlice(), Src: g.Address.AsSlice()}),
	)
}

// prepare closes a fresh namespace: no IPv6, no forwarding, no redirects, and
// the route that lets TPROXY deliver foreign destinations locally.
func prepare() error {
	for _, s := range []struct{ key, value string }{
		{"ipv6/conf/all/disable_ipv6", "1"},
		{"ipv6/conf/default/disable_ipv6", "1"},
		{"ipv4/ip_forward", "0"},
		{"ipv4/conf/default/forwarding", "0"}, // as the namespace of the machine has it, if the one above is 0 already
		{"ipv4/conf/lo/forwarding", "0"},
		{"ipv4/conf/all/rp_filter", "1"},
		{"ipv4/conf/all/route_localnet", "0"},
		{"ipv4/conf/default/route_localnet", "0"},
		{"ipv4/conf/all/accept_redirects", "0"},
		{"ipv4/conf/default/accept_redirects", "0"},
		{"ipv4/conf/all/send_redirects", "0"},
		{"ipv4/conf/default/send_redirects", "0"},
		{"ipv4/conf/all/accept_source_route", "0"},
		{"ipv4/icmp_echo_ignore_all", "1"},
	} {
		if err := sysctl(s.key, s.value); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	return interceptRoute()
}

// interceptRoute has what TPROXY marked delivered here, wherever it is going.
func interceptRoute() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	rule := netlink.NewRule()
	rule.Family, rule.Mark, rule.Table, rule.Priority = unix.AF_INET, interceptMark, interceptTable, 10
	if err := netlink.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add rule for mark %d: %w", interceptMark, err)
	}
	err = netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: every(),
		Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: interceptTable})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add local route: %w", err)
	}
	return nil
}

// sysctl writes a key below net. A kernel without IPv6, or without a filter on
// bridges, needs none of it off.
func sysctl(key, value string) error {
	err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0)
	if errors.Is(err, os.ErrNotExist) && (strings.HasPrefix(key, "ipv6/") || strings.HasPrefix(key, "bridge/")) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("set %s: %w", key, err)
	}
	return nil
}

// enclose gives the link its fixed addresses and installs the rules before it
// carries a frame.
func enclose(device string, g Guest) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find %s: %w", device, err)
	}
	if err := fence(device, g); err != nil {
		return err
	}
	if err := netlink.LinkSetHardwareAddr(link, GatewayMAC); err != nil {
		return fmt.Errorf("set hardware address: %w", err)
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: host(Gateway)}); err != nil {
		return fmt.Errorf("add %s: %w", Gateway, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("raise %s: %w", device, err)
	}
	index := link.Attrs().Index
	err = netlink.RouteAdd(&netlink.Route{LinkIndex: index, Dst: host(g.Address),
		Src: Gateway.AsSlice(), Scope: netlink.SCOPE_LINK})
	if err != nil {
		return fmt.Errorf("add route to %s: %w", g.Address, err)
	}
	// Permanent: no ARP answer can move the guest's address elsewhere.
	err = netlink.NeighAdd(&netlink.Neigh{LinkIndex: index, Family: unix.AF_INET,
		State: netlink.NUD_PERMANENT, IP: g.Address.AsSlice(), HardwareAddr: g.MAC})
	if err != nil {
		return fmt.Errorf("add neighbour %s: %w", g.Address, err)
	}
	return nil
}

func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func every() *net.IPNet { return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)} }
