package guard

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	protocolTCP = iota
	protocolUDP
	protocolOther
)

func opText(op Op) string { return fmt.Sprint(uint8(op)) }

func (j *Judge) isNetwork(op Op) bool {
	return slices.Contains([]Op{OpEgress, OpConnected, OpNames, OpBind, OpListening, OpIngress, OpAccepted, OpRawSocket}, op)
}

// network judges acts on the network. A record does not always tell the protocol:
// then the verdict is known only if it is the same for each.
func (j *Judge) network(e Event) Judgement {
	switch e.Op {
	case OpEgress, OpConnected:
		return j.each(func(p int) Judgement { return j.egress(e, p) }, protocolTCP, protocolUDP)
	case OpNames:
		if e.Names == nil || e.Names.Answer {
			return Judgement{}
		}
		if e.Names.Protocol == "tcp" {
			return j.egress(e, protocolTCP)
		}
		return j.egress(e, protocolUDP)
	case OpListening:
		return j.port(e.Target, protocolTCP)
	case OpBind:
		return j.each(func(p int) Judgement { return j.port(e.Target, p) }, protocolTCP, protocolUDP)
	case OpIngress:
		at := netip.AddrPortFrom(e.Target.Addr(), uint16(e.Detail))
		return j.each(func(p int) Judgement { return j.ingress(at, p) }, protocolTCP, protocolUDP)
	case OpAccepted:
		if j.c.fixed[ingressDeny]|j.c.fixed[ingressAudit] != 0 {
			return lacks("the port that it was accepted at")
		}
		return Judgement{}
	}
	return j.rawSocket()
}

// each gives a judgement that holds for all protocols.
func (j *Judge) each(judge func(protocol int) Judgement, protocols ...int) Judgement {
	first := judge(protocols[0])
	for _, p := range protocols[1:] {
		if next := judge(p); next.Verdict != first.Verdict {
			return lacks("whether it was TCP or UDP")
		}
	}
	return first
}

// learntName is a name that an answer gave an address to, until when since boot; 0
// is for ever.
type learntName struct {
	name  string
	until time.Duration
}

// Learn notes where an answer said that names are. Answers come before what is
// reached by them, as they do in a record.
func (j *Judge) Learn(e Event) {
	if e.Names == nil {
		return
	}
	ttl := map[string]time.Duration{}
	for _, r := range e.Names.Answers {
		ttl[r.Data] = time.Duration(r.TTL) * time.Second
	}
	for _, k := range namesOf(e) {
		if a, err := netip.ParseAddr(k.by); err == nil {
			j.names[a.Unmap()] = append(j.names[a.Unmap()], learntName{k.what, e.SinceBoot + ttl[k.by]})
		}
	}
}

// lists are those that allow a key, as allowed of bpf/src/net.h: the longest range
// for the port and the longest for all ports.
func (j *Judge) lists(k kind, addr netip.Addr, port uint16, protocol int) uint32 {
	exact, anyPort := j.longest(k, addr, port, protocol), j.longest(k, addr, 0, protocol)
	if port == dnsPort || port == encryptedDNSPort {
		anyPort &^= uint32(j.c.fixed[dnsLists])
	}
	return exact | anyPort
}

func (j *Judge) longest(k kind, addr netip.Addr, port uint16, protocol int) (lists uint32) {
	for d, a := range j.c.destinations {
		if d.kind == k && d.port == port && d.prefix.Contains(addr) {
			lists |= [...]uint32{a.tcp, a.udp, a.other}[protocol]
		}
	}
	return lists
}

func (j *Judge) masks() (deny, audit uint32) { return j.c.egressMasks() }

// missingList is missing_ref of bpf/src/net.h.
func (j *Judge) missingList(deny, audit, lists uint32) Judgement {
	left := deny &^ lists
	if left == 0 {
		left = audit &^ lists
	}
	if left == 0 {
		return Judgement{}
	}
	return j.answer(j.c.lists[bits.TrailingZeros32(left)].rule, false)
}

func (j *Judge) egress(e Event, protocol int) Judgement {
	at := e.Target
	deny, audit := j.masks()
	if deny|audit == 0 {
		return Judgement{}
	}
	addr := at.Addr().Unmap()
	lists := j.lists(to, addr, at.Port(), protocol)
	if (deny|audit)&^lists != 0 && len(j.c.domains) > 0 {
		lists |= j.named(j.names[addr], e.SinceBoot, at.Port(), protocol)
		if (deny|audit)&^lists != 0 && len(j.names[addr]) == 0 {
			return lacks("by what name " + addr.String() + " was found, and a policy allows names")
		}
	}
	return j.missingList(deny, audit, lists)
}

// named are the lists that allow a name, or one above it.
func (j *Judge) named(names []learntName, now time.Duration, port uint16, protocol int) (lists uint32) {
	for _, n := range names {
		name := n.name
		if n.until != 0 && n.until < now {
			continue
		}
		for pattern, ports := range j.c.domains {
			if pattern != name && !(strings.HasPrefix(pattern, "*") && covers(pattern, name)) {
				continue
			}
			for p, a := range ports {
				if p == port || p == 0 {
					lists |= [...]uint32{a.tcp, a.udp, a.other}[protocol]
				}
			}
		}
	}
	return lists
}

// ingressMasks are the lists of peers that deny and those that report.
func (j *Judge) ingressMasks() (deny, audit uint32) {
	return uint32(j.c.fixed[ingressDeny]), uint32(j.c.fixed[ingressAudit])
}

// port is open_port of bpf/src/net.h.
func (j *Judge) port(own netip.AddrPort, protocol int) Judgement {
	deny, audit := j.ingressMasks()
	if deny|audit == 0 || own.Addr().Unmap().IsLoopback() {
		return Judgement{}
	}
	lists := uint32(0)
	if own.Port() != 0 {
		lists = j.longest(atPort, netip.IPv6Unspecified(), own.Port(), protocol)
	}
	return j.missingList(deny, audit, lists)
}

func (j *Judge) ingress(peer netip.AddrPort, protocol int) Judgement {
	deny, audit := j.ingressMasks()
	if deny|audit == 0 {
		return Judgement{}
	}
	return j.missingList(deny, audit, j.lists(from, peer.Addr().Unmap(), peer.Port(), protocol))
}

// rawSocket: a list of destinations means nothing to a socket that writes its own
// headers.
func (j *Judge) rawSocket() Judgement {
	ref := j.c.fixed[onRawSocket]
	deny, audit := j.masks()
	if ref&denies != 0 || deny|audit == 0 {
		return j.answer(ref, false)
	}
	other := j.missingList(deny, audit, 0)
	if other.Verdict == Denied || ref == 0 {
		return other
	}
	return j.answer(ref, false)
}
