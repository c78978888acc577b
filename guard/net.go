package guard

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"hauberk.dev/api/spec"
)

// kind is what an entry of the map of addresses is about, as in bpf/src/policy.h.
type kind uint16

const (
	to     kind = 0     // whom the workload may reach
	from   kind = 0x100 // who may reach it, at a port of its own
	atPort kind = 0x200 // ports that somebody may reach
	toName kind = 0x300 // whom the workload may reach by a name, whose number stands for the address
)

// sectionDomains is the section of the names that lists allow.
const sectionDomains = 48

// destination is a range of addresses and a port; port 0 is all.
type destination struct {
	kind   kind
	prefix netip.Prefix
	port   uint16
}

// allowance is the lists that allow a destination, by protocol.
type allowance struct{ tcp, udp, other uint32 }

func (a allowance) and(b allowance) allowance {
	return allowance{a.tcp | b.tcp, a.udp | b.udp, a.other | b.other}
}

var everyList = allowance{allLists, allLists, allLists}

// list is one policy's list of addresses. What is allowed must be on all lists
// of its kind.
type list struct {
	rule reference
	kind kind
	dns  bool // opens the ports of DNS only to whom it names
	own  bool // knows the name servers itself, so that the gateway is none
}

const (
	dnsPort          = 53
	encryptedDNSPort = 853
	maxDestinations  = 8192
	allLists         = ^uint32(0)
)

var (
	noPort    = netip.PrefixFrom(netip.IPv6Unspecified(), 128)
	anywhere  = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	ownAlways = []netip.Prefix{
		netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("0.0.0.0/32"), netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("::/128"),
	}
)

func (c *compiler) net(n *spec.GuardNet) {
	defer c.lower(n.Audit)()
	c.severity("net.severity", n.Severity)
	var servers []netip.Addr
	if n.DNS != nil {
		servers = c.dns(n)
		if n.DNS.Audit {
			c.fixed[dnsAudit] = 1
		}
	}
	if n.Egress != nil {
		c.egress(n, servers)
	}
	if n.Ingress != nil {
		c.ingress(n)
	}
	if len(c.destinations) > maxDestinations {
		c.fault("net", "", fmt.Sprintf("%d addresses and ports are more than %d: name ranges rather than addresses", len(c.destinations), maxDestinations))
	}
}

// list begins one; zero bit if there are too many.
func (c *compiler) list(field, text string, n *spec.GuardNet, l list) (bit uint32) {
	if len(c.lists) == maxEgressLists {
		c.fault(field, "", fmt.Sprintf("more than %d lists of addresses hold for one workload: join some policies", maxEgressLists))
		return 0
	}
	bit = 1 << len(c.lists)
	l.rule = c.rule(text, n.Severity)
	c.lists = append(c.lists, l)
	return bit
}

func (c *compiler) permit(k kind, prefix netip.Prefix, port uint16, a allowance) {
	d := destination{k, prefix, port}
	c.destinations[d] = c.destinations[d].and(a)
}

// protocol gives a list's bit to the protocols that are meant. What is neither
// TCP nor UDP has no ports.
func (c *compiler) protocol(field, name string, ports []int32, bit uint32) (a allowance) {
	switch name {
	case "":
		a = allowance{tcp: bit, udp: bit}
		if len(ports) == 0 {
			a.other = bit
		}
	case "tcp":
		a.tcp = bit
	case "udp":
		a.udp = bit
	default:
		c.fault(field+".protocol", name, "want tcp or udp, or nothing for both")
	}
	return a
}

// ports gives the ports of an entry that are some; 0 is all.
func (c *compiler) ports(field string, ports []int32) (out []uint16) {
	for j, p := range ports {
		if p < 1 || p > 65535 {
			c.fault(fmt.Sprintf("%s.ports[%d]", field, j), strconv.Itoa(int(p)), "want 1 to 65535")
			continue
		}
		out = append(out, uint16(p))
	}
	return out
}

// dns opens port 53 to the name servers and to nobody else, and 853 to none.
func (c *compiler) dns(n *spec.GuardNet) (servers []netip.Addr) {
	bit := c.list("net.dns", "names may only be asked of the listed servers", n, list{kind: to, dns: true, own: len(n.DNS.Servers) > 0})
	for i, text := range n.DNS.Servers {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" {
			c.fault(fmt.Sprintf("net.dns.servers[%d]", i), text, "want an address such as 10.0.0.10")
			continue
		}
		servers = append(servers, a.Unmap())
	}
	if len(n.DNS.Servers) == 0 && !c.facts.Gateway.IsValid() {
		c.unsupported = append(c.unsupported, fmt.Sprintf("policy %q: net.dns.servers: the sandbox has no name server of its own, so nobody may be asked", c.name))
	}
	for _, p := range anywhere {
		c.permit(to, p, 0, allowance{bit, bit, bit})
	}
	for _, p := range ownAlways {
		c.permit(to, p, dnsPort, everyList)
		c.permit(to, p, encryptedDNSPort, everyList)
	}
	for _, a := range servers {
		c.permit(to, netip.PrefixFrom(a, a.BitLen()), dnsPort, allowance{tcp: bit, udp: bit})
	}
	return servers
}

func (c *compiler) egress(n *spec.GuardNet, servers []netip.Addr) {
	bit := c.list("net.egress", "only the listed destinations may be reached", n, list{kind: to, own: len(servers) > 0})
	for i, e := range n.Egress {
		field := fmt.Sprintf("net.egress[%d]", i)
		if e.Name != "" && e.Service == "" && e.CIDR == "" {
			c.domain(field, e, bit)
			continue
		}
		prefix, ok := c.prefix(field, e)
		if !ok {
			continue
		}
		a := c.protocol(field, e.Protocol, e.Ports, bit)
		if len(e.Ports) == 0 {
			c.permit(to, prefix, 0, a)
		}
		for _, p := range c.ports(field, e.Ports) {
			c.permit(to, prefix, p, a)
		}
	}
	for _, a := range servers {
		c.permit(to, netip.PrefixFrom(a, a.BitLen()), dnsPort, allowance{tcp: bit, udp: bit})
	}
}

var domainPattern = regexp.MustCompile(`^(\*\.)?([a-z0-9_]([-a-z0-9_]*[a-z0-9])?\.)*[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

// domain allows what a name turns out to stand for.
func (c *compiler) domain(field string, e spec.GuardEgress, bit uint32) {
	const longest, longestLabel = 253, 63
	long := func(label string) bool { return len(label) > longestLabel }
	if !domainPattern.MatchString(e.Name) || len(e.Name) > longest || slices.ContainsFunc(strings.Split(e.Name, "."), long) {
		c.fault(field+".name", e.Name, "want a name such as api.example in small letters, or *. and one for all below it")
		return
	}
	ports := c.ports(field, e.Ports)
	if len(e.Ports) == 0 {
		ports = []uint16{0}
	}
	if c.domains == nil {
		c.domains = map[string]map[uint16]allowance{}
	}
	if c.domains[e.Name] == nil {
		c.domains[e.Name] = map[uint16]allowance{}
	}
	a := c.protocol(field, e.Protocol, e.Ports, bit)
	for _, p := range ports {
		c.domains[e.Name][p] = c.domains[e.Name][p].and(a)
	}
}

// covers says whether all that a pattern's names are is below another's.
func covers(wide, name string) bool {
	rest, ok := strings.CutPrefix(wide, "*")
	return ok && wide != name && strings.HasSuffix(name, rest)
}

// finishDomains gives each name the ports of those that cover it, for the kernel
// finds only the longest, and writes the section that finds them.
func (c *compiler) finishDomains() {
	if len(c.domains) == 0 {
		return
	}
	c.fixed[hasNames] = 1
	le := binary.LittleEndian
	names := slices.Sorted(maps.Keys(c.domains))
	data := le.AppendUint32(nil, uint32(len(names)))
	for _, name := range names {
		id := domainNumber(name)
		var addr [16]byte
		copy(addr[:], id[:])
		prefix := netip.PrefixFrom(netip.AddrFrom16(addr), 128)
		for _, of := range names {
			if of != name && !covers(of, name) {
				continue
			}
			for port, a := range c.domains[of] {
				c.permit(toName, prefix, port, a)
			}
		}
		data = append(data, id[:]...)
		data = appendText(data, turned(name))
	}
	c.sections = append(c.sections, section{sectionDomains, data})
}

// domainNumber is the same in every generation.
func domainNumber(name string) (id [8]byte) {
	sum := sha256.Sum256([]byte(name))
	copy(id[:], sum[:])
	return id
}

// turned is a name the wrong way round: what is below it begins with it.
func turned(name string) string {
	name, below := strings.CutPrefix(name, "*.")
	b := []byte(name)
	slices.Reverse(b)
	if below {
		return string(b) + "."
	}
	return string(b) + "\x00"
}

// ingress opens ports to peers. A port is open as soon as one peer may reach it;
// which is judged by packets.
func (c *compiler) ingress(n *spec.GuardNet) {
	bit := c.list("net.ingress", "only the listed peers may connect, and only to the listed ports", n, list{kind: from})
	for i, e := range n.Ingress {
		field := fmt.Sprintf("net.ingress[%d]", i)
		if len(e.Ports) == 0 {
			c.fault(field+".ports", "", "name the ports that may be reached")
		}
		peers := anywhere
		if e.CIDR != "" {
			p, ok := c.cidr(field, e.CIDR)
			if !ok {
				continue
			}
			peers = []netip.Prefix{p}
		}
		a := c.protocol(field, e.Protocol, e.Ports, bit)
		for _, port := range c.ports(field, e.Ports) {
			c.permit(atPort, noPort, port, a)
			for _, p := range peers {
				c.permit(from, p, port, a)
			}
		}
	}
}

// prefix gives the range of an entry. A service that is not known yet is
// allowed nothing until it is.
func (c *compiler) prefix(field string, e spec.GuardEgress) (netip.Prefix, bool) {
	switch {
	case (e.Service == "") == (e.CIDR == "") || e.Name != "":
		c.fault(field, e.Service+e.CIDR+e.Name, "set exactly one of service, cidr and name")
		return netip.Prefix{}, false
	case e.Service == "":
		return c.cidr(field, e.CIDR)
	}
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
}

func (c *compiler) cidr(field, text string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil && !strings.Contains(text, "/"):
		c.fault(field+".cidr", text, "want a range: for one address add /32 or /128")
	case err != nil:
		c.fault(field+".cidr", text, "want a range such as 10.0.0.0/8")
	case p.Addr().Is4In6():
		c.fault(field+".cidr", text, "write an IPv4 range as such")
	case p.Masked() != p:
		c.fault(field+".cidr", text, fmt.Sprintf("write it as %s", p.Masked()))
	default:
		return p, true
	}
	return netip.Prefix{}, false
}

// always allows what no list may take away: a workload's own loopback, and
// names of those that do not know better servers.
func (c *compiler) always() {
	for _, p := range ownAlways {
		c.permit(to, p, 0, everyList)
		if slices.ContainsFunc(c.lists, func(l list) bool { return l.kind == from }) {
			c.permit(from, p, 0, everyList)
		}
	}
	c.finishDomains()
	if a := c.facts.Gateway.Unmap(); a.IsValid() {
		lists := allLists
		for i, l := range c.lists {
			if l.own {
				lists &^= 1 << i
			}
		}
		c.permit(to, netip.PrefixFrom(a, a.BitLen()), dnsPort, allowance{lists, lists, 0})
	}
	for i, l := range c.lists {
		bit := reference(1) << i
		switch {
		case l.kind == from && l.rule&denies != 0:
			c.fixed[ingressDeny] |= bit
		case l.kind == from:
			c.fixed[ingressAudit] |= bit
		case l.dns:
			c.fixed[dnsLists] |= bit
		}
	}
}

// egressMasks are the lists of destinations that deny and those that report.
func (c *compiler) egressMasks() (deny, audit uint32) {
	for i, l := range c.lists {
		switch {
		case l.kind != to:
		case l.rule&denies != 0:
			deny |= 1 << i
		default:
			audit |= 1 << i
		}
	}
	return deny, audit
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
		return cmp.Or(cmp.Compare(a.kind, b.kind), a.prefix.Addr().Compare(b.prefix.Addr()), cmp.Compare(a.prefix.Bits(), b.prefix.Bits()), cmp.Compare(a.port, b.port))
	})
	b = le.AppendUint32(b, uint32(len(keys)))
	for _, k := range keys {
		var lists allowance
		for bits := 0; bits <= k.prefix.Bits(); bits++ {
			around := netip.PrefixFrom(k.prefix.Addr(), bits).Masked()
			lists = lists.and(c.destinations[destination{k.kind, around, k.port}])
		}
		b = appendKey(b, k)
		for _, l := range [...]uint32{lists.tcp, lists.udp, lists.other} {
			b = le.AppendUint32(b, l)
		}
	}
	return b
}

// appendKey is struct destination of bpf/src/policy.h: an IPv4 address stands in
// its IPv6 form, but under a family of its own.
func appendKey(b []byte, d destination) []byte {
	const ahead = 32 // bits of family and port
	family, bits := uint16(6), d.prefix.Bits()
	switch {
	case d.kind == atPort:
		family = 0
	case d.prefix.Addr().Is4():
		family, bits = 4, bits+96
	}
	addr := d.prefix.Addr().As16()
	b = binary.LittleEndian.AppendUint32(b, uint32(ahead+bits))
	b = binary.LittleEndian.AppendUint16(b, family|uint16(d.kind))
	b = binary.BigEndian.AppendUint16(b, d.port)
	return append(b, addr[:]...)
}
