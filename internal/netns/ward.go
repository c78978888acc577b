package netns

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Types of ICMPv6 that only routers send, or that claim an address.
const (
	routerAdvertisement   = 134
	neighbourSolicitation = 135
	neighbourAdvert       = 136
	redirect              = 137
	listenerReport        = 131
	listenerReport2       = 143
)

// wardTable is the table of one tap.
func wardTable(tap string) string { return tableName + "-" + tap }

// ward installs the rules around a joined link, in one transaction that also
// replaces older ones:
//
//	ingress of the tap: only IP and ARP, only from the guest's addresses, no
//	router's messages, no claim to another's address. To HostEnd only answers.
//	ingress of the link: nobody on the network reaches HostEnd, or 127.0.0.0/8 of
//	the guest.
//	ingress of the bridge: only answers to HostEnd come up from it.
func ward(tap, link, bridge string, l Link, unfenced bool) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyNetdev, Name: wardTable(tap)}
	c.AddTable(table)
	c.DelTable(table) // as it was, so that the next lines find none
	w := &warder{Conn: c, table: c.AddTable(table)}
	for _, name := range []string{counterFake, counterRest} {
		c.AddObj(&nftables.CounterObj{Table: w.table, Name: name})
	}
	w.tapRules(tap, l, unfenced)
	w.linkRules(link)
	w.bridgeRules(bridge, l)
	if w.err != nil {
		return fmt.Errorf("write rules: %w", w.err)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("install rules: %w", err)
	}
	return nil
}

// unward removes the rules of every tap.
func unward() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyNetdev)
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	for _, t := range tables {
		if strings.HasPrefix(t.Name, wardTable(tapPrefix)) {
			c.DelTable(t)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("remove rules: %w", err)
	}
	return nil
}

// warder writes chains until something fails.
type warder struct {
	*nftables.Conn
	table *nftables.Table
	chain *nftables.Chain
	err   error
}

func (w *warder) begin(name, device string, policy nftables.ChainPolicy) {
	w.chain = w.AddChain(&nftables.Chain{Name: name, Table: w.table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookIngress, Priority: nftables.ChainPriorityFilter, Policy: &policy, Device: device})
}

func (w *warder) rule(parts ...[]expr.Any) {
	w.AddRule(&nftables.Rule{Table: w.table, Chain: w.chain, Exprs: join(parts...)})
}

// member matches what was loaded into register 1 against addresses.
func (w *warder) member(key nftables.SetDatatype, invert bool, all []netip.Addr) []expr.Any {
	set := &nftables.Set{Table: w.table, Anonymous: true, Constant: true, KeyType: key}
	var elements []nftables.SetElement
	for _, a := range all {
		elements = append(elements, nftables.SetElement{Key: a.AsSlice()})
	}
	if err := w.AddSet(set, elements); err != nil && w.err == nil {
		w.err = err
	}
	return []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID, Invert: invert}}
}

func (w *warder) tapRules(tap string, l Link, unfenced bool) {
	w.begin("guest", tap, nftables.ChainPolicyDrop)
	accept, drop := verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
	spoofed := join(counted(counterFake), drop)
	rest := join(counted(counterRest), drop)
	toHost := match(expr.PayloadBaseLLHeader, 0, expr.CmpOpEq, HostEndMAC)

	w.rule(frameSource(expr.CmpOpNeq, l.MAC), toHost, spoofed)
	if l.LocalNet {
		w.rule(toHost, answersHostEnd(), accept)
	}
	w.rule(toHost, rest)
	// From here on 127.0.0.0/8 is on its way to somebody else.
	w.rule(etherType(unix.ETH_P_IP), network(12, []byte{127}), spoofed)
	w.rule(etherType(unix.ETH_P_IP), network(16, []byte{127}), spoofed)
	if unfenced {
		w.rule(accept)
		return
	}
	w.rule(frameSource(expr.CmpOpNeq, l.MAC), spoofed)
	for _, tag := range [][]byte{{0x81, 0x00}, {0x88, 0xa8}} { // the kernel looks past them for the kind
		w.rule(match(expr.PayloadBaseLLHeader, 12, expr.CmpOpEq, tag), rest)
	}
	four, six := []netip.Addr{}, []netip.Addr{linkLocal(l.MAC)}
	for _, p := range l.Addresses {
		if p.Addr().Is4() {
			four = append(four, p.Addr())
		} else if p.Addr() != six[0] {
			six = append(six, p.Addr())
		}
	}
	if len(four) > 0 {
		arp := join(etherType(unix.ETH_P_ARP), network(0, []byte{0, 1, 8, 0, 6, 4}), network(8, l.MAC))
		probe := netip.IPv4Unspecified()
		w.rule(arp, load(14, 4), w.member(nftables.TypeIPAddr, false, append([]netip.Addr{probe}, four...)), accept)
		w.rule(etherType(unix.ETH_P_IP), load(12, 4), w.member(nftables.TypeIPAddr, false, four), accept)
	}
	w.rule(etherType(unix.ETH_P_ARP), spoofed)
	w.rule(etherType(unix.ETH_P_IP), spoofed)
	if !l.NoIPv6 {
		ip6 := etherType(unix.ETH_P_IPV6)
		w.rule(ip6, icmp6(routerAdvertisement), spoofed)
		w.rule(ip6, icmp6(redirect), spoofed)
		w.rule(ip6, icmp6(neighbourAdvert), transport(8, 16), w.member(nftables.TypeIP6Addr, true, six), spoofed)
		w.rule(ip6, load(8, 16), w.member(nftables.TypeIP6Addr, false, six), accept)
		for _, t := range []byte{neighbourSolicitation, listenerReport, listenerReport2} {
			w.rule(ip6, network(8, make([]byte, 16)), icmp6(t), accept)
		}
	}
	w.rule(etherType(unix.ETH_P_IPV6), spoofed)
	w.rule(rest)
}

func (w *warder) linkRules(link string) {
	w.begin("network", link, nftables.ChainPolicyAccept)
	drop := verdict(expr.VerdictDrop)
	w.rule(match(expr.PayloadBaseLLHeader, 0, expr.CmpOpEq, HostEndMAC), drop)
	w.rule(etherType(unix.ETH_P_IP), network(12, []byte{127}), drop)
	w.rule(etherType(unix.ETH_P_IP), network(16, []byte{127}), drop)
}

func (w *warder) bridgeRules(bridge string, l Link) {
	w.begin("host", bridge, nftables.ChainPolicyDrop)
	if l.LocalNet {
		w.rule(match(expr.PayloadBaseLLHeader, 0, expr.CmpOpEq, HostEndMAC), frameSource(expr.CmpOpEq, l.MAC),
			answersHostEnd(), verdict(expr.VerdictAccept))
	}
}

// answersHostEnd matches TCP from the guest's 127.0.0.0/8 to HostEnd.
func answersHostEnd() []expr.Any {
	return join(etherType(unix.ETH_P_IP), network(12, []byte{127}), network(16, HostEnd.AsSlice()), protocol(unix.IPPROTO_TCP))
}

func icmp6(kind byte) []expr.Any {
	return join(protocol(unix.IPPROTO_ICMPV6), match(expr.PayloadBaseTransportHeader, 0, expr.CmpOpEq, []byte{kind}))
}

func load(offset, size uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}}
}

func transport(offset, size uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: size}}
}

// Stopped reads how many frames of the guest's taps were dropped in the
// namespace at a path: for a false sender, and for being of no kind that passes.
func Stopped(path string) (spoofed, rest uint64, err error) {
	ns, err := openForeign(path)
	if err != nil {
		return 0, 0, fmt.Errorf("read drops of %s: %w", path, err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := c.ListTablesOfFamily(nftables.TableFamilyNetdev)
		if err != nil {
			return err
		}
		for _, t := range tables {
			if !strings.HasPrefix(t.Name, wardTable(tapPrefix)) {
				continue
			}
			for name, n := range map[string]*uint64{counterFake: &spoofed, counterRest: &rest} {
				obj, err := c.GetObject(&nftables.CounterObj{Table: t, Name: name})
				if err != nil {
					return err
				}
				if counter, ok := obj.(*nftables.CounterObj); ok {
					*n += counter.Packets
				}
			}
		}
		return nil
	})
	if err != nil {
		return 0, 0, fmt.Errorf("read drops of %s: %w", path, err)
	}
	return spoofed, rest, nil
}
