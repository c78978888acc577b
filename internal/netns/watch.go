package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoDevice is said of a namespace without its tap: its machine has ended,
// and nothing can pass.
var ErrNoDevice = errors.New("the tap is gone")

// Watch sees a namespace that Create made as the kernel does: whether it is
// still closed as it was left, and which connections there are in it. Its
// methods are called by one goroutine at a time, but for Made.
type Watch struct {
	ns      *Namespace
	guest   Guest
	rules   state // of the fence, as the kernel tells it
	blocked []Connection
	made    atomic.Uint64
}

// Made changes when Look makes the rules anew, once before and once after: while
// it is odd they are being made. Counters of Dropped can be compared if it was
// the same even number before and after both were read.
func (w *Watch) Made() uint64 { return w.made.Load() }

// Connection is one of TCP that a process holds.
type Connection struct {
	Local, Remote netip.AddrPort // Local is in the namespace
	Cookie        uint64         // the socket's, never used again
}

func (c Connection) String() string { return fmt.Sprintf("%s to %s", c.Remote, c.Local) }

// state is what holds a namespace closed: names people know, and how each is.
type state map[string]string

// Watch begins to watch. Of a namespace that an earlier process made nobody
// knows what has happened to it since: it is closed anew, and what was found
// otherwise is returned as Look does.
func (ns *Namespace) Watch(g Guest) (*Watch, []string, error) {
	w := &Watch{ns: ns, guest: g}
	var changes []string
	err := ns.Do(func() error {
		found, err := look()
		if err != nil {
			return err
		}
		now := found
		if !ns.enclosed {
			if err := w.enclose(); err != nil {
				return err
			}
			if now, err = look(); err != nil {
				return err
			}
		}
		w.rules = now.rules()
		changes = difference(w.want(), found)
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("watch %q: %w", ns.name, err)
	}
	return w, changes, nil
}

// want is how the namespace is to be.
func (w *Watch) want() state {
	s := state{"link lo": "", "link " + Device: "", "route of what is intercepted": "local",
		ruleName(0, 0, unix.RT_TABLE_LOCAL): "", ruleName(10, interceptMark, interceptTable): "",
		ruleName(32766, 0, unix.RT_TABLE_MAIN): "", ruleName(32767, 0, unix.RT_TABLE_DEFAULT): ""}
	for name := range forwards {
		s[name] = "0"
	}
	maps.Copy(s, w.rules)
	return s
}

// Look compares the namespace with how it was left. What differs is put right
// in the same breath and returned in words; the counters of Dropped then begin
// anew. If it cannot be put right the tap is shut: nothing passes, and the error
// says why.
func (w *Watch) Look() (changes []string, err error) {
	err = w.ns.Do(func() error {
		found, err := look()
		if err != nil {
			return err
		}
		if changes = difference(w.want(), found); len(changes) == 0 {
			return nil
		}
		w.made.Add(1)
		err = w.enclose()
		w.made.Add(1)
		if err == nil {
			if found, err = look(); err == nil {
				if left := difference(w.want(), found); len(left) > 0 {
					err = errors.New(strings.Join(left, ", "))
				}
			}
		}
		if err != nil {
			return errors.Join(err, shut())
		}
		return nil
	})
	if err != nil {
		return changes, fmt.Errorf("look at %q: %w", w.ns.name, err)
	}
	return changes, nil
}

// enclose makes the namespace as it was, whatever it has become.
func (w *Watch) enclose() error {
	if err := removeForeignTables(); err != nil {
		return err
	}
	if err := fence(Device, w.guest); err != nil {
		return err
	}
	for _, key := range forwards {
		if err := sysctl(key, "0"); err != nil {
			return err
		}
	}
	if err := errors.Join(encloseLinks(), encloseRoutes()); err != nil {
		return err
	}
	return blocked(w.blocked)
}

// shut closes the tap.
func shut() error {
	link, err := netlink.LinkByName(Device)
	if err != nil {
		return err
	}
	return netlink.LinkSetDown(link)
}

func removeForeignTables() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	all, err := c.ListTables()
	if err != nil {
		return fmt.Errorf("list tables: %w", err)
	}
	for _, t := range all {
		ours := t.Family == nftables.TableFamilyNetdev || t.Family == nftables.TableFamilyIPv4
		if !ours || t.Name != tableName {
			c.DelTable(t)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("remove tables: %w", err)
	}
	return nil
}

// encloseLinks shuts every link but ours, and takes from ours what could lead
// frames away from the rules.
func encloseLinks() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	var errs []error
	for _, l := range links {
		a := l.Attrs()
		if a.Name != "lo" && a.Name != Device {
			if a.Flags&net.FlagUp != 0 {
				errs = append(errs, wrap("shut "+a.Name, netlink.LinkSetDown(l)))
			}
			continue
		}
		if a.MasterIndex != 0 {
			errs = append(errs, wrap("free "+a.Name, netlink.LinkSetNoMaster(l)))
		}
		if a.Xdp != nil && a.Xdp.Attached {
			errs = append(errs, wrap("free "+a.Name+" of XDP", netlink.LinkSetXdpFd(l, -1)))
		}
		hooks, err := hooked(l)
		for _, q := range hooks {
			err = errors.Join(err, netlink.QdiscDel(q))
		}
		errs = append(errs, wrap("free "+a.Name+" of filters", err))
	}
	return errors.Join(errs...)
}

// hooked are the queues of a link on which filters may look at what arrives.
func hooked(l netlink.Link) (all []netlink.Qdisc, err error) {
	qdiscs, err := netlink.QdiscList(l)
	for _, q := range qdiscs {
		if t := q.Type(); t == "clsact" || t == "ingress" {
			all = append(all, q)
		}
	}
	return all, err
}

func encloseRoutes() error {
	rules, err := netlink.RuleList(unix.AF_INET)
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	want := (&Watch{}).want()
	for _, r := range rules {
		if _, ok := want[ruleName(r.Priority, r.Mark, r.Table)]; !ok {
			if err := netlink.RuleDel(&r); err != nil {
				return fmt.Errorf("remove routing rule %s: %w", r, err)
			}
		}
	}
	routes, err := netlink.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: interceptTable}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove route %s: %w", r, err)
		}
	}
	return interceptRoute()
}

// Block drops a connection from now on, whoever holds it, and ends the socket.
// Either is done also if the other cannot be.
func (w *Watch) Block(c Connection) error {
	err := w.ns.Do(func() error {
		dropped := blocked([]Connection{c})
		err := netlink.SocketDestroy(net.TCPAddrFromAddrPort(c.Local), net.TCPAddrFromAddrPort(c.Remote))
		// A kernel may not offer it, and the socket may have ended.
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
			err = nil
		}
		return errors.Join(dropped, wrap("end socket", err))
	})
	if err != nil {
		return fmt.Errorf("block %s in %q: %w", c, w.ns.name, err)
	}
	if w.blocked = append(w.blocked, c); len(w.blocked) > blockLimit/2 {
		w.blocked = slices.Clone(w.blocked[len(w.blocked)-blockLimit/4:])
	}
	return nil
}

// blocked has the rules drop what the guest sends over connections.
func blocked(all []Connection) error {
	var elements []nftables.SetElement
	for _, c := range all {
		key := make([]byte, 12) // each part is padded to four bytes
		to := c.Local.Addr().As4()
		copy(key, to[:])
		binary.BigEndian.PutUint16(key[4:], c.Remote.Port())
		binary.BigEndian.PutUint16(key[8:], c.Local.Port())
		elements = append(elements, nftables.SetElement{Key: key})
	}
	if len(elements) == 0 {
		return nil
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	set := &nftables.Set{Table: &nftables.Table{Family: nftables.TableFamilyNetdev, Name: tableName}, Name: blockedSet, Concatenation: true,
		KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService, nftables.TypeInetService)}
	if err := c.SetAddElements(set, elements); err != nil {
		return fmt.Errorf("block connections: %w", err)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("block connections: %w", err)
	}
	return nil
}

// Connections are those in the namespace that are established and that a
// process has in its hands. What waits to be accepted is none yet.
func (w *Watch) Connections() ([]Connection, error) {
	var all []Connection
	err := w.ns.Do(func() error {
		// A socket of IPv6 may carry IPv4, and is listed under its own family.
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := netlink.SocketDiagTCP(family)
			if err != nil {
				return err
			}
			for _, s := range sockets {
				if c, ok := held(s); ok {
					all = append(all, c)
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list connections in %q: %w", w.ns.name, err)
	}
	return all, nil
}

// held is the connection of a socket that a process holds. IPv6 passes nowhere,
// so what does not carry IPv4 is none.
func held(s *netlink.Socket) (c Connection, ok bool) {
	local, ok1 := netip.AddrFromSlice(s.ID.Source)
	remote, ok2 := netip.AddrFromSlice(s.ID.Destination)
	local, remote = local.Unmap(), remote.Unmap()
	if s.INode == 0 || !established(s.State) || !ok1 || !ok2 || !local.Is4() || !remote.Is4() {
		return Connection{}, false
	}
	return Connection{Cookie: uint64(s.ID.Cookie[1])<<32 | uint64(s.ID.Cookie[0]),
		Local: netip.AddrPortFrom(local, s.ID.SourcePort), Remote: netip.AddrPortFrom(remote, s.ID.DestinationPort)}, true
}

func established(s uint8) bool {
	switch s {
	case netlink.TCP_ESTABLISHED, netlink.TCP_FIN_WAIT1, netlink.TCP_FIN_WAIT2, netlink.TCP_CLOSE_WAIT, netlink.TCP_LAST_ACK, netlink.TCP_CLOSING:
		return true
	}
	return false
}

// difference says in words how a state is not as it should be.
func difference(want, got state) (all []string) {
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if is, ok := got[name]; !ok {
			all = append(all, name+" is gone")
		} else if is != want[name] {
			all = append(all, name+" was changed")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[name]; !ok {
			all = append(all, name+" is not ours")
		}
	}
	return all
}

// lookTries is how often the state is read anew because it changed meanwhile.
const lookTries = 5

// look reads the state of the namespace of the calling thread.
func look() (s state, err error) {
	for range lookTries {
		if s, err = lookOnce(); !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return s, err
}

// lookOnce reads rules first: those of a tap go after it, so that where one is
// missing for that reason the tap is found to be missing too.
func lookOnce() (state, error) {
	s, err := rules()
	if err != nil {
		return nil, err
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	if err := s.links(links); err != nil {
		return nil, err
	}
	if _, ok := s["link "+Device]; !ok {
		return nil, ErrNoDevice
	}
	for name, key := range forwards {
		is, err := os.ReadFile("/proc/sys/net/" + key)
		if err != nil {
			return nil, fmt.Errorf("read forwarding: %w", err)
		}
		s[name] = strings.TrimSpace(string(is))
	}
	return s, s.routes()
}

// forwards say whether the kernel forwards. The first sets the others, and only
// when it changes; a packet goes by that of the link it came from.
var forwards = map[string]string{"forwarding": "ipv4/ip_forward", "forwarding of " + Device: "ipv4/conf/" + Device + "/forwarding",
	"forwarding of lo": "ipv4/conf/lo/forwarding"}

func (s state) links(links []netlink.Link) error {
	for _, l := range links {
		a := l.Attrs()
		own := a.Name == "lo" || a.Name == Device
		if !own {
			if a.Flags&net.FlagUp != 0 { // else it carries nothing
				s["link "+a.Name] = ""
			}
			continue
		}
		is := ""
		if a.MasterIndex != 0 {
			is += " with a master"
		}
		if a.Xdp != nil && a.Xdp.Attached {
			is += " with XDP"
		}
		hooks, err := hooked(l)
		if err != nil {
			return fmt.Errorf("list queues of %s: %w", a.Name, err)
		}
		if len(hooks) > 0 {
			is += " with filters"
		}
		s["link "+a.Name] = is
	}
	return nil
}

func ruleName(priority int, mark uint32, table int) string {
	return fmt.Sprintf("routing rule %d for mark %d to table %d", max(priority, 0), mark, table)
}

func (s state) routes() error {
	rules, err := netlink.RuleList(unix.AF_INET)
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	for _, r := range rules {
		s[ruleName(r.Priority, r.Mark, r.Table)] = ""
	}
	routes, err := netlink.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: interceptTable}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for i, r := range routes {
		is := "local"
		if r.Type != unix.RTN_LOCAL || i > 0 { // that it is alone says that it is for all
			is = "another"
		}
		s["route of what is intercepted"] = is
	}
	return nil
}
