package guard

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"hauberk.dev/api/spec"
)

// destination is a range of addresses and a port; port 0 is all.
type destination struct {
	prefix netip.Prefix
	port   uint16
}

const (
	dnsPort         = 53
	maxDestinations = 8192
	allLists        = ^uint32(0)
)

func (c *compiler) egress(n *spec.GuardNet) {
	c.severity("net.severity", n.Severity)
	if len(c.lists) == maxEgressLists {
		c.faults = append(c.faults, fmt.Errorf("policy %q: net.egress: more than %d policies with a list of destinations hold for one workload: join some", c.name, maxEgressLists))
		return
	}
	bit := uint32(1) << len(c.lists)
	c.lists = append(c.lists, c.rule("only the listed destinations may be reached", n.Severity))
	for i, e := range n.Egress {
		field := fmt.Sprintf("net.egress[%d]", i)
		prefix, ok := c.prefix(field, e)
		if !ok {
			continue
		}
		if len(e.Ports) == 0 {
			c.destinations[destination{prefix, 0}] |= bit
		}
		for j, p := range e.Ports {
			if p < 1 || p > 65535 {
				c.fault(fmt.Sprintf("%s.ports[%d]", field, j), strconv.Itoa(int(p)), "want 1 to 65535")
				continue
			}
			c.destinations[destination{prefix, uint16(p)}] |= bit
		}
	}
	if len(c.destinations) > maxDestinations {
		c.faults = append(c.faults, fmt.Errorf("policy %q: net.egress: %d destinations are more than %d: name ranges rather than addresses", c.name, len(c.destinations), maxDestinations))
	}
}

// prefix gives the range of an entry. A service that is not known yet is
// allowed nothing until it is.
func (c *compiler) prefix(field string, e spec.GuardEgress) (netip.Prefix, bool) {
	switch {
	case (e.Service == "") == (e.CIDR == ""):
		c.fault(field, e.Service+e.CIDR, "set exactly one of service and cidr")
	case e.Service != "":
		text, ok := c.guard.Services[e.Service]
		if !ok {
			c.unsupported = append(c.unsupported, fmt.Sprintf("policy %q: %s.service %q: no such workload is known, so nothing is allowed there", c.name, field, e.Service))
			return netip.Prefix{}, false
		}
		addr, err := netip.ParseAddr(text)
		if err != nil {
			c.fault(field+".service", e.Service, fmt.Sprintf("its address %q is none", text))
			return netip.Prefix{}, false
		}
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), true
	default:
		p, err := netip.ParsePrefix(e.CIDR)
		switch {
		case err != nil && !strings.Contains(e.CIDR, "/"):
			c.fault(field+".cidr", e.CIDR, "want a range: for one address add /32 or /128")
		case err != nil:
			c.fault(field+".cidr", e.CIDR, "want a range such as 10.0.0.0/8")
		case p.Addr().Is4In6():
			c.fault(field+".cidr", e.CIDR, "write an IPv4 range as such")
		case p.Masked() != p:
			c.fault(field+".cidr", e.CIDR, fmt.Sprintf("write it as %s", p.Masked()))
		default:
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// always allows what no list may take away: a workload's own loopback, and
// names.
func (c *compiler) always(facts CompileFacts) {
	for _, p := range []string{"127.0.0.0/8", "0.0.0.0/32", "::1/128", "::/128"} {
		c.destinations[destination{netip.MustParsePrefix(p), 0}] = allLists
	}
	if a := facts.Gateway.Unmap(); a.IsValid() {
		c.destinations[destination{netip.PrefixFrom(a, a.BitLen()), dnsPort}] = allLists
	}
}

// appendDestinations writes every range with the lists that allow it. The
// kernel takes the longest range that fits, so each carries the lists of all
// that contain it.
func (c *compiler) appendDestinations(b []byte) []byte {
	le := binary.LittleEndian
	if len(c.lists) == 0 {
		return le.AppendUint32(b, 0)
	}
	keys := slices.SortedFunc(maps.Keys(c.destinations), func(a, b destination) int {
		return cmp.Or(a.prefix.Addr().Compare(b.prefix.Addr()), cmp.Compare(a.prefix.Bits(), b.prefix.Bits()), cmp.Compare(a.port, b.port))
	})
	b = le.AppendUint32(b, uint32(len(keys)))
	for _, k := range keys {
		lists := uint32(0)
		for bits := 0; bits <= k.prefix.Bits(); bits++ {
			lists |= c.destinations[destination{netip.PrefixFrom(k.prefix.Addr(), bits).Masked(), k.port}]
		}
		b = appendKey(b, k)
		b = le.AppendUint32(b, lists)
	}
	return b
}

// appendKey is struct destination of bpf/src/policy.h: an IPv4 address stands in
// its IPv6 form, but under a family of its own.
func appendKey(b []byte, d destination) []byte {
	const ahead = 32 // bits of family and port
	family, bits := uint16(6), d.prefix.Bits()
	if d.prefix.Addr().Is4() {
		family, bits = 4, bits+96
	}
	addr := d.prefix.Addr().As16()
	b = binary.LittleEndian.AppendUint32(b, uint32(ahead+bits))
	b = binary.LittleEndian.AppendUint16(b, family)
	b = binary.BigEndian.AppendUint16(b, d.port)
	return append(b, addr[:]...)
}
