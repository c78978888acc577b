package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Facts of a joined namespace.
var (
	// HostEnd is the address in a joined namespace from which what dials
	// 127.0.0.0/8 there reaches the guest's own 127.0.0.0/8.
	HostEnd = netip.MustParseAddr("169.254.77.1")
	// HostEndMAC is its hardware address.
	HostEndMAC = net.HardwareAddr{0x02, 0x48, 0x42, 0x00, 0x00, 0x02}

	guestEnd = netip.MustParseAddr("169.254.77.2") // named by routes only
	localNet = netip.MustParsePrefix("127.0.0.0/8")
)

// The names of what Join makes, each with the index of the link it serves:
// they are the whole journal.
const (
	bridgePrefix = "hbr"
	tapPrefix    = "hbt"
)

// JoinOptions say how to join.
type JoinOptions struct {
	// Owner is the uid that may use the taps, normally QEMU's.
	Owner int
	// Taps were made ahead by SpareTap, or anywhere else; they are moved into
	// the namespace, one for each link in the order of the kernel. Links beyond
	// them get new ones.
	Taps []*os.File
	// Unfenced lets the guest send frames of any kind under any address, as a
	// container with CAP_NET_RAW may.
	Unfenced bool
}

// Joined is what a guest must be told to take the place of a namespace.
type Joined struct {
	Links      []Link
	Routes     []Route
	Neighbours []Neighbour
}

// Link is one link of the namespace and the tap at its end.
type Link struct {
	Name      string
	MAC       net.HardwareAddr
	MTU       int
	NoIPv6    bool
	Addresses []netip.Prefix
	// LocalNet says that this is the link by which HostEnd reaches the guest.
	LocalNet bool
	// Tap is the descriptor for QEMU. It is nil if the tap was there already
	// and its machine holds it.
	Tap *os.File
}

// Route is an entry of the namespace's main tables.
type Route struct {
	Type    int    // as the kernel numbers them: RTN_UNICAST and those that lead nowhere
	Link    string // none unless RTN_UNICAST
	To      netip.Prefix
	Gateway netip.Addr
	Source  netip.Addr
	Scope   int
	Metric  int
	MTU     int
	OnLink  bool
}

// Neighbour is a permanent entry of a neighbour table.
type Neighbour struct {
	Link string
	IP   netip.Addr
	MAC  net.HardwareAddr
}

// Close closes the taps; their machines keep theirs.
func (j *Joined) Close() error {
	var errs []error
	for i := range j.Links {
		if t := j.Links[i].Tap; t != nil {
			errs = append(errs, t.Close())
			j.Links[i].Tap = nil
		}
	}
	return errors.Join(errs...)
}

// Join puts a guest into a namespace that somebody else made, at a path such as
// a bind mount or /proc/PID/ns/net: each link gets a bridge of its own, with a
// tap on its other port, and the guest takes over the link's hardware address.
// Links, addresses and routes stay as they are, so that their maker finds them;
// nothing of the namespace itself answers on them any more. What leaves a tap is
// fenced: frames that do not carry the guest's own addresses are dropped.
//
// Joining again, after a crash or with machines running, makes what is missing.
func Join(path string, o JoinOptions) (*Joined, error) {
	ns, err := openForeign(path)
	if err != nil {
		return nil, fmt.Errorf("join %s: %w", path, err)
	}
	defer ns.Close()
	var j *Joined
	fresh := false
	err = ns.Do(func() (err error) {
		if j, fresh, err = survey(); err != nil {
			return err
		}
		for i := range j.Links {
			if err := j.Links[i].join(i == 0, ns, o, i); err != nil {
				return fmt.Errorf("link %s: %w", j.Links[i].Name, err)
			}
		}
		if len(j.Links) > 0 {
			return divert(j.Links[0])
		}
		return nil
	})
	if err == nil {
		return j, nil
	}
	if j != nil {
		j.Close()
	}
	if fresh { // else machines may be using what an earlier call made
		err = errors.Join(err, ns.Do(leave))
	}
	return nil, fmt.Errorf("join %s: %w", path, err)
}

// Leave undoes Join. A namespace that is gone, or was never joined, is no error.
func Leave(path string) error {
	ns, err := openForeign(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errUnbound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("leave %s: %w", path, err)
	}
	defer ns.Close()
	if err := ns.Do(leave); err != nil {
		return fmt.Errorf("leave %s: %w", path, err)
	}
	return nil
}

var errUnbound = errors.New("it is not a network namespace (its mount is gone)")

// openForeign opens a namespace that is neither this process' own nor the
// machine's.
func openForeign(path string) (*Namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	ns := &Namespace{name: filepath.Base(path), path: path, file: f}
	var fsType unix.Statfs_t
	var st unix.Stat_t
	if err := errors.Join(unix.Fstatfs(int(f.Fd()), &fsType), unix.Fstat(int(f.Fd()), &st)); err != nil {
		f.Close()
		return nil, err
	}
	if fsType.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, errUnbound
	}
	for _, own := range []string{"/proc/self/ns/net", "/proc/1/ns/net"} {
		var host unix.Stat_t
		if unix.Stat(own, &host) == nil && host.Ino == st.Ino && host.Dev == st.Dev {
			f.Close()
			return nil, errors.New("it is the machine's own network, which no guest can take over")
		}
	}
	return ns, nil
}

// join gives the link its bridge and its tap, closed before it is open.
func (l *Link) join(first bool, ns *Namespace, o JoinOptions, i int) error {
	link, err := netlink.LinkByName(l.Name)
	if err != nil {
		return err
	}
	index := strconv.Itoa(link.Attrs().Index)
	bridge, err := makeBridge(bridgePrefix + index)
	if err != nil {
		return err
	}
	name := tapPrefix + index
	if i < len(o.Taps) {
		l.Tap, err = takeTap(o.Taps[i], ns, name)
	} else {
		l.Tap, err = openTap(name, o.Owner)
	}
	held := errors.Is(err, unix.EBUSY)
	if err != nil && !held {
		return err
	}
	l.LocalNet = first
	if err := ward(name, link.Attrs().Name, bridge.Attrs().Name, *l, o.Unfenced); err != nil {
		return err
	}
	tap, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find tap: %w", err)
	}
	return errors.Join(
		sysctl("ipv6/conf/"+name+"/disable_ipv6", "1"),
		wrap("set MTU of tap", netlink.LinkSetMTU(tap, l.MTU)),
		wrap("bridge tap", netlink.LinkSetMaster(tap, bridge)),
		wrap("bridge link", netlink.LinkSetMaster(link, bridge)),
		wrap("set MTU of bridge", netlink.LinkSetMTU(bridge, l.MTU)),
		// The guest's address is at the tap and everything else is not: there
		// is nothing to learn, and nothing the network says can move it.
		wrap("stop learning", netlink.LinkSetLearning(tap, false)),
		wrap("stop learning", netlink.LinkSetLearning(link, false)),
		wrap("stop flooding", netlink.LinkSetFlood(tap, false)),
		wrap("hand over hardware address", netlink.NeighSet(&netlink.Neigh{LinkIndex: tap.Attrs().Index, Family: unix.AF_BRIDGE,
			Flags: unix.NTF_MASTER, State: unix.NUD_NOARP, HardwareAddr: l.MAC})),
		wrap("raise tap", netlink.LinkSetUp(tap)),
		wrap("raise bridge", netlink.LinkSetUp(bridge)),
	)
}

func wrap(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// makeBridge makes a bridge that nothing of the namespace speaks through but
// HostEnd, or finds it.
func makeBridge(name string) (netlink.Link, error) {
	la := netlink.NewLinkAttrs()
	la.Name, la.HardwareAddr = name, HostEndMAC
	snoop := false
	err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: la, MulticastSnooping: &snoop})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("add bridge: %w", err)
	}
	for _, s := range []struct{ key, value string }{
		{"ipv6/conf/" + name + "/disable_ipv6", "1"},
		{"ipv4/conf/" + name + "/rp_filter", "0"},
		{"ipv4/conf/" + name + "/accept_redirects", "0"},
		{"ipv4/conf/" + name + "/route_localnet", "1"},
		{"ipv4/conf/" + name + "/accept_local", "1"}, // 127.0.0.1 is still an address of lo
		{"bridge/bridge-nf-call-iptables", "0"},
		{"bridge/bridge-nf-call-ip6tables", "0"},
		{"bridge/bridge-nf-call-arptables", "0"},
	} {
		if err := sysctl(s.key, s.value); err != nil {
			return nil, err
		}
	}
	return netlink.LinkByName(name)
}

// divert makes 127.0.0.0/8 of the namespace that of the guest behind l. The
// addresses of lo stay; only the routes that end there go. No address is
// translated, so the guest's own routing decides what is listening where.
func divert(l Link) error {
	link, err := netlink.LinkByName(l.Name)
	if err != nil {
		return err
	}
	bridge, err := netlink.LinkByName(bridgePrefix + strconv.Itoa(link.Attrs().Index))
	if err != nil {
		return err
	}
	index := bridge.Attrs().Index
	if err := netlink.AddrReplace(bridge, &netlink.Addr{IPNet: host(HostEnd)}); err != nil {
		return fmt.Errorf("add %s: %w", HostEnd, err)
	}
	err = netlink.NeighSet(&netlink.Neigh{LinkIndex: index, Family: unix.AF_INET,
		State: netlink.NUD_PERMANENT, IP: guestEnd.AsSlice(), HardwareAddr: l.MAC})
	if err != nil {
		return fmt.Errorf("add neighbour %s: %w", guestEnd, err)
	}
	err = netlink.RouteReplace(&netlink.Route{LinkIndex: index, Dst: ipNet(localNet), Gw: guestEnd.AsSlice(),
		Src: HostEnd.AsSlice(), Flags: int(netlink.FLAG_ONLINK)})
	if err != nil {
		return fmt.Errorf("add route to %s: %w", localNet, err)
	}
	for _, r := range loRoutes() {
		if err := netlink.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove route to %s: %w", r.Dst, err)
		}
	}
	return nil
}

// loRoutes are those the kernel makes for 127.0.0.1/8 on lo.
func loRoutes() []*netlink.Route {
	one := netip.MustParseAddr("127.0.0.1")
	var all []*netlink.Route
	for _, to := range []*net.IPNet{host(one), ipNet(localNet)} {
		all = append(all, &netlink.Route{LinkIndex: 1, Dst: to, Src: one.AsSlice(), Table: unix.RT_TABLE_LOCAL,
			Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Protocol: unix.RTPROT_KERNEL})
	}
	return all
}

// leave removes what join made from the namespace of the calling thread.
func leave() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	var errs []error
	joined := false
	for _, l := range links {
		if !ours(l.Attrs().Name) {
			continue
		}
		joined = true
		if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove %s: %w", l.Attrs().Name, err))
		}
	}
	if joined {
		for _, r := range loRoutes() {
			// lo may be down, on the way of its maker to remove everything.
			if err := netlink.RouteReplace(r); err != nil && !errors.Is(err, unix.ENETDOWN) && !errors.Is(err, unix.EINVAL) {
				errs = append(errs, fmt.Errorf("restore route to %s: %w", r.Dst, err))
			}
		}
	}
	return errors.Join(append(errs, unward())...)
}

// ours says whether Join made a link.
func ours(name string) bool {
	for _, prefix := range []string{bridgePrefix, tapPrefix} {
		if index, ok := strings.CutPrefix(name, prefix); ok {
			if n, err := strconv.Atoi(index); err == nil && n > 0 {
				return true
			}
		}
	}
	return false
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
