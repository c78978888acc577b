package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	tableName   = "hauberk"
	bypassSet   = "bypass"
	bypassLimit = 256 // destinations counted apart; the rest share one counter
	blockedSet  = "blocked"
	blockLimit  = 4096 // connections dropped one by one, see Watch.Block
	counterFake = "spoofed"
	counterRest = "rest"
)

// Drop is traffic that tried to pass the interception and was dropped.
type Drop struct {
	Destination netip.Addr
	Protocol    uint8 // IP protocol number
	Port        uint16
	Packets     uint64
	Bytes       uint64
}

// Drops is everything dropped since the tap was made.
type Drops struct {
	Bypass []Drop // by destination
	// Spoofed counts frames with addresses that are not the guest's.
	Spoofed uint64
	// Rest counts packets to destinations beyond the first 256, and frames that
	// are neither IPv4 nor ARP.
	Rest uint64
}

// fence installs the rules, in one transaction:
//
//	netdev ingress on the tap, policy drop: spoofed frames counted and dropped;
//	ARP accepted; TCP of connections that were blocked dropped, all other
//	accepted; UDP 53 to the gateway accepted; the rest counted by destination
//	and dropped.
//	ip prerouting: TCP to the listener, except TCP 53 to the gateway, which has
//	its own, and replies to sockets inside the namespace, which find them. What
//	finds neither is counted by destination and dropped.
//	ip forward: all counted by destination and dropped. There is nowhere to go.
//
// Rules that are there already give way to these in the same step.
func fence(device string, g Guest) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	for _, family := range []nftables.TableFamily{nftables.TableFamilyNetdev, nftables.TableFamilyIPv4} {
		c.DelTable(c.AddTable(&nftables.Table{Family: family, Name: tableName}))
	}
	if err := fenceIngress(c, device, g); err != nil {
		return fmt.Errorf("add set of bypasses: %w", err)
	}
	if err := fenceIP(c, device); err != nil {
		return fmt.Errorf("add set of bypasses: %w", err)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("install rules: %w", err)
	}
	return nil
}

func fenceIngress(c *nftables.Conn, device string, g Guest) error {
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyNetdev, Name: tableName})
	set := bypasses(table)
	blocked := &nftables.Set{Table: table, Name: blockedSet, Concatenation: true, Size: blockLimit,
		KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService, nftables.TypeInetService)}
	if err := errors.Join(c.AddSet(set, nil), c.AddSet(blocked, nil)); err != nil {
		return err
	}
	for _, name := range []string{counterFake, counterRest} {
		c.AddObj(&nftables.CounterObj{Table: table, Name: name})
	}
	drop := nftables.ChainPolicyDrop
	chain := c.AddChain(&nftables.Chain{Name: "ingress", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookIngress, Priority: nftables.ChainPriorityFilter, Policy: &drop, Device: device})
	rule := func(parts ...[]expr.Any) {
		var exprs []expr.Any
		for _, p := range parts {
			exprs = append(exprs, p...)
		}
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
	}
	guest := g.Address.AsSlice()
	spoofed := join(counted(counterFake), verdict(expr.VerdictDrop))

	rule(frameSource(expr.CmpOpNeq, g.MAC), spoofed)
	// ARP for IPv4 over Ethernet, from the guest's own pair of addresses.
	rule(etherType(unix.ETH_P_ARP), network(0, []byte{0, 1, 8, 0, 6, 4}), network(8, g.MAC), network(14, guest), verdict(expr.VerdictAccept))
	rule(etherType(unix.ETH_P_ARP), spoofed)
	rule(etherType(unix.ETH_P_IP), networkNot(12, guest), spoofed)
	rule(etherType(unix.ETH_P_IP), protocol(unix.IPPROTO_TCP), among(blocked), verdict(expr.VerdictDrop))
	rule(etherType(unix.ETH_P_IP), protocol(unix.IPPROTO_TCP), verdict(expr.VerdictAccept))
	rule(etherType(unix.ETH_P_IP), protocol(unix.IPPROTO_UDP), network(16, Gateway.AsSlice()), transportPort(53), verdict(expr.VerdictAccept))
	for _, port := range g.Answers {
		rule(etherType(unix.ETH_P_IP), protocol(unix.IPPROTO_UDP), network(16, Gateway.AsSlice()), sourcePort(port), verdict(expr.VerdictAccept))
	}
	rule(etherType(unix.ETH_P_IP), protocol(unix.IPPROTO_UDP), count(set, true), verdict(expr.VerdictDrop))
	rule(etherType(unix.ETH_P_IP), count(set, false), verdict(expr.VerdictDrop))
	rule(counted(counterRest), verdict(expr.VerdictDrop))
	return nil
}

// bypasses are counted by destination, protocol and port.
func bypasses(table *nftables.Table) *nftables.Set {
	return &nftables.Set{Table: table, Name: bypassSet, Dynamic: true, Concatenation: true, Size: bypassLimit, Counter: true,
		KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)}
}

func fenceIP(c *nftables.Conn, device string) error {
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: tableName})
	set := bypasses(table)
	if err := c.AddSet(set, nil); err != nil {
		return err
	}
	chain := c.AddChain(&nftables.Chain{Name: "prerouting", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: join(
		network(16, Gateway.AsSlice()), protocol(unix.IPPROTO_TCP), transportPort(53), verdict(expr.VerdictAccept))})
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, device)
	mark := binary.NativeEndian.AppendUint32(nil, interceptMark)
	from := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
	}
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: join(from,
		protocol(unix.IPPROTO_TCP),
		[]expr.Any{
			&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, InterceptPort)},
			&expr.TProxy{Family: unix.NFPROTO_IPV4, TableFamily: unix.NFPROTO_IPV4, RegPort: 1},
			&expr.Immediate{Register: 1, Data: mark},
			&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
		},
		verdict(expr.VerdictAccept))})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: join(from, network(16, Gateway.AsSlice()), verdict(expr.VerdictAccept))})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: join(from, count(set, true), verdict(expr.VerdictDrop))})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: join(from, verdict(expr.VerdictDrop))})

	drop := nftables.ChainPolicyDrop
	forward := c.AddChain(&nftables.Chain{Name: "forward", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop})
	c.AddRule(&nftables.Rule{Table: table, Chain: forward, Exprs: join(count(set, true), verdict(expr.VerdictDrop))})
	return nil
}

// Dropped reads what was dropped so far.
func (ns *Namespace) Dropped() (Drops, error) {
	if ns.file == nil {
		return Drops{}, fmt.Errorf("read drops of %q: %w", ns.name, unix.EBADF)
	}
	c, err := nftables.New(nftables.WithNetNSFd(int(ns.file.Fd())), nftables.AsLasting())
	if err != nil {
		return Drops{}, fmt.Errorf("read drops of %q: %w", ns.name, err)
	}
	defer c.CloseLasting()
	table := &nftables.Table{Family: nftables.TableFamilyNetdev, Name: tableName}
	elements, err := c.GetSetElements(&nftables.Set{Table: table, Name: bypassSet})
	if err != nil {
		return Drops{}, fmt.Errorf("read drops of %q: %w", ns.name, err)
	}
	within, err := c.GetSetElements(&nftables.Set{Table: &nftables.Table{Family: nftables.TableFamilyIPv4, Name: tableName}, Name: bypassSet})
	if err != nil {
		return Drops{}, fmt.Errorf("read drops of %q: %w", ns.name, err)
	}
	elements = append(elements, within...)
	var d Drops
	for _, e := range elements {
		if len(e.Key) < 12 || e.Counter == nil {
			continue
		}
		d.Bypass = append(d.Bypass, Drop{
			Destination: netip.AddrFrom4([4]byte(e.Key[:4])),
			Protocol:    e.Key[4],
			Port:        binary.BigEndian.Uint16(e.Key[8:]),
			Packets:     e.Counter.Packets,
			Bytes:       e.Counter.Bytes,
		})
	}
	for name, n := range map[string]*uint64{counterFake: &d.Spoofed, counterRest: &d.Rest} {
		obj, err := c.GetObject(&nftables.CounterObj{Table: table, Name: name})
		if err != nil {
			return Drops{}, fmt.Errorf("read counter %s of %q: %w", name, ns.name, err)
		}
		if counter, ok := obj.(*nftables.CounterObj); ok {
			*n = counter.Packets
		}
	}
	return d, nil
}

// The words rules are made of.

func join(parts ...[]expr.Any) (all []expr.Any) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }

func counted(name string) []expr.Any {
	return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}}
}

func match(base expr.PayloadBase, offset uint32, op expr.CmpOp, data []byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(data))},
		&expr.Cmp{Op: op, Register: 1, Data: data},
	}
}

func frameSource(op expr.CmpOp, mac []byte) []expr.Any {
	return match(expr.PayloadBaseLLHeader, 6, op, mac)
}

func network(offset uint32, data []byte) []expr.Any {
	return match(expr.PayloadBaseNetworkHeader, offset, expr.CmpOpEq, data)
}

func networkNot(offset uint32, data []byte) []expr.Any {
	return match(expr.PayloadBaseNetworkHeader, offset, expr.CmpOpNeq, data)
}

func transportPort(port uint16) []expr.Any {
	return match(expr.PayloadBaseTransportHeader, 2, expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, port))
}

func sourcePort(port uint16) []expr.Any {
	return match(expr.PayloadBaseTransportHeader, 0, expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, port))
}

func etherType(t uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, t)},
	}
}

func protocol(p byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{p}},
	}
}

// among tells whether a packet of TCP is of one of the connections in a set.
func among(set *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG32_00, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Payload{DestRegister: unix.NFT_REG32_00 + 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
		&expr.Payload{DestRegister: unix.NFT_REG32_00 + 2, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: set.Name, SetID: set.ID},
	}
}

// count adds destination, protocol and port (or 0) to the set of bypasses. A
// full set breaks off the rule, so the last rule of the chain still drops.
func count(set *nftables.Set, ports bool) []expr.Any {
	exprs := []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG32_00, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG32_00 + 1},
	}
	if ports {
		exprs = append(exprs, &expr.Payload{DestRegister: unix.NFT_REG32_00 + 2, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
	} else {
		exprs = append(exprs, &expr.Immediate{Register: unix.NFT_REG32_00 + 2, Data: []byte{0, 0}})
	}
	return append(exprs, &expr.Dynset{SrcRegKey: unix.NFT_REG32_00, SetName: set.Name, SetID: set.ID, Operation: unix.NFT_DYNSET_OP_ADD})
}
