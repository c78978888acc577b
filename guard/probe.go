package guard

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// Finding is what policies say of one act, in words.
type Finding struct {
	Section string  `json:"section"`
	Act     string  `json:"act"`
	Verdict string  `json:"verdict"`
	Policy  string  `json:"policy,omitempty"`
	Rule    string  `json:"rule,omitempty"`
	verdict Verdict // the same
}

// Change is what becomes of one act under other policies.
type Change struct {
	Section string `json:"section"`
	Act     string `json:"act"`
	Before  string `json:"before"`
	After   string `json:"after"`
	Policy  string `json:"policy,omitempty"` // whose rule decides after it, or did before
	Rule    string `json:"rule,omitempty"`
	// Stricter, else looser.
	Stricter bool `json:"stricter"`
}

// Sections of a policy, in the order in which they are explained.
var Sections = []string{"programs", "memory", "scripts", "files", "network", "system"}

// Kernels are the series of guests' kernels that the whole language is held in,
// which the corpus shows.
func Kernels() []string { return []string{"6.1", "6.12"} }

// Offline is what policies are compiled with where no workload and no image is
// known: services have addresses that are nobody's, and digests are files of
// their own.
func Offline(policies []node.NamedGuardPolicy) (node.Guard, CompileFacts) {
	g := node.Guard{Generation: 1, Policies: policies, Services: map[string]string{}}
	addr := netip.MustParseAddr("198.18.0.1") // kept for benchmarks, reached by nobody
	for _, name := range services(policies) {
		g.Services[name] = addr.String()
		addr = addr.Next()
	}
	return g, CompileFacts{Gateway: offlineGateway, FilesWith: func(digests []string) (map[string][]string, error) {
		out := map[string][]string{}
		for _, d := range digests {
			out[d] = []string{digestPrefix + d}
		}
		return out, nil
	}}
}

// offlineGateway is the name server of every guest.
var offlineGateway = netip.AddrFrom4([4]byte{169, 254, 1, 1})

func services(policies []node.NamedGuardPolicy) (out []string) {
	for _, p := range policies {
		if p.Spec.Net == nil {
			continue
		}
		for _, e := range p.Spec.Net.Egress {
			if e.Service != "" && !slices.Contains(out, e.Service) {
				out = append(out, e.Service)
			}
		}
	}
	slices.Sort(out)
	return out
}

// Explain says what policies, which hold together, allow and deny.
func Explain(policies []node.NamedGuardPolicy) ([]Finding, error) {
	s := newProber(policies)
	j, err := s.judge(policies)
	if err != nil {
		return nil, err
	}
	var out []Finding
	for _, p := range s.probes {
		out = append(out, p.finding(j.Judge(p.event)))
	}
	return out, nil
}

// Diff says what changes if one set of policies takes the place of another.
func Diff(before, after []node.NamedGuardPolicy) ([]Change, error) {
	s := newProber(slices.Concat(before, after))
	old, err := s.judge(before)
	if err != nil {
		return nil, fmt.Errorf("the old: %w", err)
	}
	next, err := s.judge(after)
	if err != nil {
		return nil, fmt.Errorf("the new: %w", err)
	}
	var out []Change
	for _, p := range s.probes {
		a, b := p.finding(old.Judge(p.event)), p.finding(next.Judge(p.event))
		if strictness(a.verdict) == strictness(b.verdict) {
			continue
		}
		c := Change{Section: p.section, Act: p.text, Before: a.Verdict, After: b.Verdict, Policy: b.Policy, Rule: b.Rule, Stricter: strictness(b.verdict) > strictness(a.verdict)}
		if !c.Stricter {
			c.Policy, c.Rule = a.Policy, a.Rule
		}
		out = append(out, c)
	}
	return out, nil
}

func strictness(v Verdict) int {
	switch v {
	case Denied, Killed:
		return 3
	case Unknown:
		return 2
	case Reported:
		return 1
	}
	return 0
}

// probe is an act that some policy says something of.
type probe struct {
	section, text string
	event         Event
}

func (p probe) finding(j Judgement) Finding {
	return Finding{Section: p.section, Act: p.text, Verdict: j.Verdict.String(), Policy: j.Rule.Policy, Rule: j.Rule.Text, verdict: j.Verdict}
}

// prober makes the acts that policies tell apart, and one of each kind that none
// of them names.
type prober struct {
	guard    node.Guard
	facts    CompileFacts
	names    map[string]netip.Addr
	probes   []probe
	policies []node.NamedGuardPolicy
}

// stranger is a program that no policy names.
const stranger = "/any/other"

func newProber(policies []node.NamedGuardPolicy) *prober {
	s := &prober{policies: policies, names: map[string]netip.Addr{}}
	s.guard, s.facts = Offline(policies)
	s.programs()
	s.memory()
	s.scripts()
	s.files()
	s.network()
	s.system()
	return s
}

// judge reads policies; to all of them the same names have the same addresses.
func (s *prober) judge(policies []node.NamedGuardPolicy) (*Judge, error) {
	g := s.guard
	g.Policies = policies
	j, err := NewJudge(g, JudgeFacts{CompileFacts: s.facts, Mounted: true})
	if err != nil {
		return nil, err
	}
	for name, addr := range s.names {
		j.names[addr] = []learntName{{name, 0}}
	}
	return j, nil
}

func (s *prober) add(section, text string, e Event) {
	if !slices.ContainsFunc(s.probes, func(p probe) bool { return p.section == section && p.text == text }) {
		s.probes = append(s.probes, probe{section, text, e})
	}
}

// each gives the programs that a field of all policies names, sorted.
func (s *prober) each(field func(spec.GuardPolicy) []string) (out []string) {
	for _, p := range s.policies {
		for _, v := range field(p.Spec) {
			if !slices.Contains(out, v) {
				out = append(out, v)
			}
		}
	}
	slices.Sort(out)
	return out
}

func (s *prober) exec(field func(*spec.GuardExec) []string) []string {
	return s.each(func(p spec.GuardPolicy) []string {
		if p.Exec == nil {
			return nil
		}
		return field(p.Exec)
	})
}

func named(program string) string {
	if program == stranger {
		return "any other program"
	}
	return program
}

func (s *prober) programs() {
	const section = "programs"
	s.add(section, "running what was written or changed since the image was made", Event{Op: OpExec, Path: stranger, Why: fromChange})
	s.add(section, "running what is on another file system", Event{Op: OpExec, Path: stranger, Why: fromElsewhere})
	for _, v := range s.exec(func(e *spec.GuardExec) []string { return e.Volumes }) {
		s.add(section, "running what is in the volume "+v, Event{Op: OpExec, Path: v + "/x", Why: fromElsewhere})
	}
	for _, p := range append(s.exec(func(e *spec.GuardExec) []string { return e.Deny }), stranger) {
		if p != stranger {
			s.add(section, "running "+p+", for a list of what may not run", Event{Op: OpListed, Path: p})
		}
	}
	allowed := s.exec(func(e *spec.GuardExec) (out []string) {
		for _, a := range e.Allow {
			out = append(out, programOf(a))
		}
		return out
	})
	for _, p := range append(allowed, stranger) {
		s.add(section, "the agent starting "+named(p), Event{Op: OpUnlisted, Path: p})
		for _, parent := range append(s.parents(p), stranger) {
			s.add(section, named(parent)+" starting "+named(p), Event{Op: OpUnlisted, Path: p, Exe: parent})
		}
	}
	s.add(section, "starting with LD_PRELOAD or LD_AUDIT", Event{Op: OpPreload})
	s.add(section, "starting with a network socket as input or output", Event{Op: OpShell})
}

func programOf(a spec.GuardProgram) string {
	if a.SHA256 != "" {
		return digestPrefix + a.SHA256
	}
	return a.Path
}

func (s *prober) parents(program string) []string {
	return s.exec(func(e *spec.GuardExec) (out []string) {
		for _, a := range e.Allow {
			if programOf(a) == program {
				out = append(out, a.Parents...)
			}
		}
		return out
	})
}

func (s *prober) memory() {
	for _, p := range append(s.exec(func(e *spec.GuardExec) []string { return e.JIT }), stranger) {
		s.add("memory", named(p)+" making memory executable", Event{Op: OpMemory, Why: 1, Exe: p})
	}
}

func (s *prober) scripts() {
	list := s.exec(func(e *spec.GuardExec) []string {
		if e.Scripts == nil {
			return nil
		}
		return e.Scripts.Interpreters
	})
	for _, p := range append(list, stranger) {
		s.add("scripts", named(p)+" reading a script that is not of the image", Event{Op: OpScript, Why: fromChange, Exe: p, Path: stranger})
		if p != stranger {
			s.add("scripts", p+" being handed code in its arguments", Event{Op: OpInline, Exe: p})
		}
	}
}

func (s *prober) files() {
	paths := s.each(func(p spec.GuardPolicy) (out []string) {
		for _, f := range p.Files {
			out = append(out, f.Path)
		}
		return out
	})
	for _, path := range paths {
		by := s.each(func(p spec.GuardPolicy) (out []string) {
			for _, f := range p.Files {
				if f.Path == path {
					out = append(out, f.By...)
				}
			}
			return out
		})
		for _, program := range append(by, stranger) {
			who := named(program)
			if len(by) == 0 {
				who = "anybody"
			}
			s.add("files", who+" reading "+path, Event{Op: OpRead, Path: path, Exe: program})
			s.add("files", who+" changing "+path, Event{Op: OpWrite, Path: path, Exe: program})
		}
	}
}

// Addresses and ports that no policy is about.
var (
	strangers = []netip.AddrPort{netip.MustParseAddrPort("203.0.113.77:443"), netip.MustParseAddrPort("203.0.113.77:53")}
	firstName = netip.MustParseAddr("198.19.0.1")
)

const strangePort = 64999

func (s *prober) network() {
	const section = "network"
	for _, p := range s.policies {
		if p.Spec.Net == nil {
			continue
		}
		for _, e := range p.Spec.Net.Egress {
			s.egress(e)
		}
		if p.Spec.Net.DNS == nil {
			continue
		}
		for _, text := range p.Spec.Net.DNS.Servers {
			if a, err := netip.ParseAddr(text); err == nil {
				s.add(section, "asking "+text+" for names", Event{Op: OpEgress, Target: netip.AddrPortFrom(a, dnsPort)})
			}
		}
	}
	s.add(section, "reaching an address that no list names", Event{Op: OpConnected, Target: strangers[0]})
	s.add(section, "asking a name server that no list names", Event{Op: OpEgress, Target: strangers[1]})
	s.add(section, "asking the sandbox's own name server", Event{Op: OpEgress, Target: netip.AddrPortFrom(offlineGateway, dnsPort)})
	s.ingress()
	s.add(section, "making a raw or packet socket", Event{Op: OpRawSocket})
}

func (s *prober) egress(e spec.GuardEgress) {
	addr, what := netip.Addr{}, ""
	switch {
	case e.Service != "":
		addr, _ = netip.ParseAddr(s.guard.Services[e.Service])
		what = "workload " + e.Service
	case e.CIDR != "":
		prefix, err := netip.ParsePrefix(e.CIDR)
		if err != nil {
			return
		}
		addr, what = prefix.Addr(), e.CIDR
	default:
		name := strings.Replace(e.Name, "*.", "any.", 1)
		if _, known := s.names[name]; !known {
			s.names[name] = next(firstName, len(s.names))
		}
		addr, what = s.names[name], e.Name
	}
	for _, port := range append(slices.Clone(e.Ports), strangePort) {
		text := fmt.Sprintf("reaching %s at port %d", what, port)
		if port == strangePort {
			text = "reaching " + what + " at a port that no list names"
		}
		at := netip.AddrPortFrom(addr, uint16(port))
		s.add("network", text+" by TCP", Event{Op: OpNames, Target: at, Names: &Names{Protocol: "tcp"}})
		s.add("network", text+" by UDP", Event{Op: OpNames, Target: at, Names: &Names{Protocol: "udp"}})
	}
}

func next(a netip.Addr, n int) netip.Addr {
	for range n {
		a = a.Next()
	}
	return a
}

func (s *prober) ingress() {
	anybody := netip.MustParseAddr("203.0.113.78")
	for _, p := range s.policies {
		if p.Spec.Net == nil {
			continue
		}
		for _, e := range p.Spec.Net.Ingress {
			for _, port := range e.Ports {
				peer, who := anybody, "anybody"
				if prefix, err := netip.ParsePrefix(e.CIDR); err == nil {
					peer, who = prefix.Addr(), e.CIDR
				}
				s.add("network", fmt.Sprintf("opening port %d", port), Event{Op: OpListening, Target: netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(port))})
				s.add("network", fmt.Sprintf("being reached by %s at port %d", who, port), Event{Op: OpIngress, Target: netip.AddrPortFrom(peer, 40000), Detail: uint64(port)})
				s.add("network", fmt.Sprintf("being reached by anybody at port %d", port), Event{Op: OpIngress, Target: netip.AddrPortFrom(anybody, 40000), Detail: uint64(port)})
			}
		}
	}
	s.add("network", "opening a port that no list names", Event{Op: OpListening, Target: netip.AddrPortFrom(netip.IPv4Unspecified(), strangePort)})
}

// eventOf is how an operation of sys.deny is told of.
func eventOf(name spec.GuardOperation) Event {
	for op, n := range operationOf {
		if n == string(name) {
			return Event{Op: op, Detail: 11} // of bpf: what only looks
		}
	}
	return Event{Op: OpOperation, Detail: uint64(operations[name].index)}
}

func (s *prober) system() {
	for _, name := range slices.Sorted(maps.Keys(operations)) {
		if name == "rawsocket" {
			continue // of the network
		}
		e := eventOf(name)
		if name == "module" || name == "reboot" {
			continue // no policy allows it
		}
		s.add("system", "the operation "+string(name), e)
	}
	for n, name := range capabilityNames {
		if slices.Contains([]string{"SYS_MODULE", "SYS_RAWIO", "SYS_BOOT"}, name) {
			continue // nor these
		}
		s.add("system", "using the capability "+name, Event{Op: OpCapability, Detail: uint64(n)})
	}
}
