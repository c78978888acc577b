package guard

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/api/spec"
)

// Proposal is a policy that allows what was observed and not much more, and why
// it says what it says. It is for a person to read, change and put in force; what
// is in doubt it leaves out and says so.
type Proposal struct {
	Spec spec.GuardPolicy `json:"spec"`
	// Evidence of its fields, in their order.
	Evidence []Evidence `json:"evidence"`
	// Refuses is what was done and would be denied: it is what intruders do, or no
	// rule can say it.
	Refuses []Evidence `json:"refuses,omitempty"`
	// Notes say what a person should know before believing it.
	Notes []string `json:"notes,omitempty"`
}

// Evidence is what was seen that a field of the proposal stands for.
type Evidence struct {
	Field   string    `json:"field"` // such as exec.allow[0]
	Text    string    `json:"text"`
	Count   uint64    `json:"count"`
	First   time.Time `json:"first,omitzero"`
	Last    time.Time `json:"last,omitzero"`
	Example string    `json:"example,omitempty"`
}

// ProposeFacts is what is known besides what was seen.
type ProposeFacts struct {
	// Base is the policy in learn. The proposal keeps how it is rolled out, what of
	// it is recorded, and what becomes of a rule that cannot be held.
	Base spec.GuardPolicy
	// Services names workloads by address.
	Services map[netip.Addr]string
	// Ports that the workload says it serves: they are open whether or not somebody
	// came.
	Ports []int32
	// Digest gives the SHA-256 of a program of the image, or nothing. It may be nil.
	Digest func(path string) string
}

// Limits of the API.
const (
	maxProposedPrograms = 512
	maxProposedFiles    = 512
	maxProposedEgress   = 256
	maxProposedJIT      = 64
)

// Propose makes a policy of an observation.
func Propose(o Observation, known ProposeFacts) Proposal {
	p := proposer{o: o, known: known, names: map[string][]string{}}
	for _, f := range o.Facts {
		p.by(f)
	}
	p.out.Spec = spec.GuardPolicy{Mode: "enforce", OnFailure: known.Base.OnFailure, Limits: known.Base.Limits, Rollout: known.Base.Rollout}
	p.exec()
	p.files()
	p.net()
	p.sys()
	p.doubts()
	return p.out
}

type proposer struct {
	o     Observation
	known ProposeFacts
	out   Proposal
	facts map[Kind][]Fact
	names map[string][]string // by address
}

func (p *proposer) by(f Fact) {
	if p.facts == nil {
		p.facts = map[Kind][]Fact{}
	}
	p.facts[f.Kind] = append(p.facts[f.Kind], f)
	if f.Kind == FactName {
		p.names[f.By] = append(p.names[f.By], f.What)
	}
}

// evidence sums facts up for a field.
func (p *proposer) evidence(field, text string, facts ...Fact) {
	p.out.Evidence = append(p.out.Evidence, sum(field, text, facts))
}

func sum(field, text string, facts []Fact) Evidence {
	var all Fact
	for _, f := range facts {
		join(&all, &f)
	}
	return Evidence{Field: field, Text: text, Count: all.Count, First: all.First, Last: all.Last, Example: all.Example}
}

func (p *proposer) refuse(field, text string, facts ...Fact) {
	if len(facts) > 0 {
		p.out.Refuses = append(p.out.Refuses, sum(field, text, facts))
	}
}

// sayable tells whether a policy can name the path.
func sayable(name string) bool {
	return strings.HasPrefix(name, "/") && path.Clean(name) == name && len(name) <= maxPath && !strings.ContainsAny(name, "*?[\x00\uFFFD")
}

// grouped puts facts together by what they are about.
func grouped(facts []Fact, key func(Fact) string) (keys []string, by map[string][]Fact) {
	by = map[string][]Fact{}
	for _, f := range facts {
		by[key(f)] = append(by[key(f)], f)
	}
	return slices.Sorted(maps.Keys(by)), by
}

func whatOf(f Fact) string { return f.What }
func byOf(f Fact) string   { return f.By }

// exec allows the programs that were started, each for those who started it.
func (p *proposer) exec() {
	e := &spec.GuardExec{Origin: "image", AnonymousMemory: "deny", ShellOnSocket: "deny", Preload: "deny", Allow: []spec.GuardProgram{}, Severity: spec.SeverityWarning}
	p.out.Spec.Exec = e
	programs, by := grouped(p.facts[FactProgram], whatOf)
	for _, name := range programs {
		if !sayable(name) || len(e.Allow) == maxProposedPrograms {
			p.refuse("exec.allow", "started "+strconv.Quote(name)+", which no rule can name", by[name]...)
			continue
		}
		field := fmt.Sprintf("exec.allow[%d]", len(e.Allow))
		entry, text := allowed(name, by[name])
		if p.known.Digest != nil {
			if d := p.known.Digest(name); d != "" {
				text += ", sha256:" + d
			}
		}
		e.Allow = append(e.Allow, entry)
		p.evidence(field, text, by[name]...)
	}
	p.memory(e)
	if seen := p.facts[FactPreload]; len(seen) > 0 {
		e.Preload = "allow"
		p.evidence("exec.preload", "started with LD_PRELOAD or LD_AUDIT", seen...)
	}
	p.refuse("exec.origin", "ran code that is not of the image: name its volume in exec.volumes if that is meant", p.facts[FactForeign]...)
	p.refuse("exec.shellOnSocket", "started a program on a network socket, as a reverse shell does", p.facts[FactShell]...)
	p.interpreters(e)
}

// allowed is the entry of a program. One that only the agent started is listed
// for itself as its parent, for a list without parents means all.
func allowed(name string, facts []Fact) (spec.GuardProgram, string) {
	entry := spec.GuardProgram{Path: name}
	agent, text := false, ""
	for _, f := range facts {
		switch {
		case f.By == "":
			agent = true
		case sayable(f.By) && !slices.Contains(entry.Parents, f.By):
			entry.Parents = append(entry.Parents, f.By)
		case !sayable(f.By):
			return spec.GuardProgram{Path: name}, "started by programs that no rule can name"
		}
	}
	slices.Sort(entry.Parents)
	switch {
	case len(entry.Parents) > maxParents:
		return spec.GuardProgram{Path: name}, fmt.Sprintf("started by %d programs", len(entry.Parents))
	case len(entry.Parents) == 0:
		entry.Parents, text = []string{name}, "started by the agent alone, so by no program but itself"
	case agent:
		text = "started by the agent and " + strings.Join(entry.Parents, ", ")
	default:
		text = "started by " + strings.Join(entry.Parents, ", ")
	}
	return entry, text
}

// memory lets the programs make code that did.
func (p *proposer) memory(e *spec.GuardExec) {
	programs, by := grouped(p.facts[FactMemory], byOf)
	for _, name := range programs {
		var makes, refused []Fact
		for _, f := range by[name] {
			if f.What == memoryWhy[4] { // /proc/PID/mem
				refused = append(refused, f)
			} else {
				makes = append(makes, f)
			}
		}
		p.refuse("exec.anonymousMemory", "wrote code through /proc/PID/mem", refused...)
		switch {
		case len(makes) == 0:
		case sayable(name) && len(e.JIT) < maxProposedJIT:
			p.evidence(fmt.Sprintf("exec.jit[%d]", len(e.JIT)), "makes code while it runs", makes...)
			e.JIT = append(e.JIT, name)
		default:
			p.refuse("exec.jit", "made memory executable in "+strconv.Quote(name)+", which no rule can name", makes...)
		}
	}
}

// interpreters are told of: what they read and are handed is not watched, so that
// nothing is proposed about it.
func (p *proposer) interpreters(e *spec.GuardExec) {
	var list []string
	for _, a := range e.Allow {
		if isInterpreter(a.Path) && len(list) < 8 {
			list = append(list, a.Path)
		}
	}
	if len(list) > 0 {
		p.out.Notes = append(p.out.Notes, "it starts interpreters ("+strings.Join(list, ", ")+"): exec.scripts can hold what they read and are handed, of which nothing is proposed")
	}
}

// isInterpreter knows interpreters by the names that they have.
func isInterpreter(name string) bool {
	base := path.Base(name)
	shells := []string{"sh", "bash", "dash", "ash", "zsh", "ksh", "busybox"}
	return slices.Contains(shells, base) || slices.ContainsFunc(dialects, func(d struct{ name, code, value string }) bool {
		return d.name != "" && strings.HasPrefix(base, d.name)
	})
}

// net lists what was reached, by the best name that is known for it.
func (p *proposer) net() {
	n := &spec.GuardNet{Egress: []spec.GuardEgress{}, Ingress: []spec.GuardIngress{}, Severity: spec.SeverityWarning}
	p.out.Spec.Net = n
	targets, by := grouped(p.facts[FactConnect], func(f Fact) string { return p.destination(f.What) })
	for _, name := range targets {
		ports, facts := portsOf(by[name]), by[name]
		entry, ok := egressOf(name)
		if !ok || len(n.Egress) == maxProposedEgress {
			p.refuse("net.egress", "reached "+strconv.Quote(name)+", which no rule can name", facts...)
			continue
		}
		text := "reached by " + strings.Join(bys(facts), ", ")
		if len(ports) <= 64 {
			entry.Ports = ports
		} else {
			text += fmt.Sprintf(", at %d ports", len(ports))
		}
		p.evidence(fmt.Sprintf("net.egress[%d]", len(n.Egress)), text, facts...)
		n.Egress = append(n.Egress, entry)
	}
	p.ingress(n)
}

// ingress opens the ports that were opened, and those that the workload names.
func (p *proposer) ingress(n *spec.GuardNet) {
	seen := map[int32][]Fact{}
	for _, f := range p.facts[FactListen] {
		if port, err := strconv.ParseUint(f.What, 10, 16); err == nil && port > 0 {
			seen[int32(port)] = append(seen[int32(port)], f)
		}
	}
	for _, port := range p.known.Ports {
		if port > 0 && port <= 65535 && seen[port] == nil {
			seen[port] = []Fact{}
		}
	}
	for _, port := range slices.Sorted(maps.Keys(seen)) {
		if len(n.Ingress) == maxProposedEgress {
			p.refuse("net.ingress", fmt.Sprintf("opened port %d, beyond what a policy can list", port), seen[port]...)
			continue
		}
		text := "opened by " + strings.Join(bys(seen[port]), ", ")
		if len(seen[port]) == 0 {
			text = "the workload says that it serves it; it was not opened while it was watched"
		}
		p.evidence(fmt.Sprintf("net.ingress[%d]", len(n.Ingress)), text, seen[port]...)
		n.Ingress = append(n.Ingress, spec.GuardIngress{Ports: []int32{port}})
	}
}

// destination is a service, a name or an address: the first that is known.
func (p *proposer) destination(target string) string {
	at, err := netip.ParseAddrPort(target)
	if err != nil {
		return target
	}
	if s := p.known.Services[at.Addr()]; s != "" {
		return "service " + s
	}
	if names := p.names[at.Addr().String()]; len(names) > 0 {
		slices.Sort(names)
		for _, n := range names {
			if domainPattern.MatchString(n) {
				return "name " + n
			}
		}
	}
	return "cidr " + netip.PrefixFrom(at.Addr(), at.Addr().BitLen()).String()
}

func egressOf(destination string) (e spec.GuardEgress, ok bool) {
	kind, value, ok := strings.Cut(destination, " ")
	switch kind {
	case "service":
		e.Service = value
	case "name":
		e.Name = value
	case "cidr":
		e.CIDR = value
	default:
		return e, false
	}
	return e, ok
}

func portsOf(facts []Fact) (out []int32) {
	for _, f := range facts {
		if at, err := netip.ParseAddrPort(f.What); err == nil && at.Port() > 0 && !slices.Contains(out, int32(at.Port())) {
			out = append(out, int32(at.Port()))
		}
	}
	slices.Sort(out)
	return out
}

// bys names the programs behind facts, for people.
func bys(facts []Fact) (out []string) {
	for _, f := range facts {
		name := cmp.Or(f.By, "what the agent started")
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out[:min(len(out), 8)]
}

// sys denies every operation that was not done, and every capability that was
// not used.
func (p *proposer) sys() {
	s := &spec.GuardSys{Capabilities: &spec.GuardCapabilities{Keep: []string{}}, Severity: spec.SeverityWarning}
	p.out.Spec.Sys = s
	done, by := grouped(p.facts[FactOperation], whatOf)
	for _, name := range slices.Sorted(maps.Keys(operations)) {
		if !slices.Contains(done, string(name)) {
			s.Deny = append(s.Deny, name)
		}
	}
	for _, name := range done {
		p.evidence("sys.deny", fmt.Sprintf("%s is not denied: done by %s", name, strings.Join(bys(by[name]), ", ")), by[name]...)
	}
	used, by := grouped(p.facts[FactCapability], whatOf)
	for _, name := range used {
		if !slices.Contains(capabilityNames, name) {
			continue
		}
		p.evidence(fmt.Sprintf("sys.capabilities.keep[%d]", len(s.Capabilities.Keep)), "used by "+strings.Join(bys(by[name]), ", "), by[name]...)
		s.Capabilities.Keep = append(s.Capabilities.Keep, name)
	}
}

// doubts says why the proposal may be wrong.
func (p *proposer) doubts() {
	note := func(format string, args ...any) { p.out.Notes = append(p.out.Notes, fmt.Sprintf(format, args...)) }
	if p.o.Acts == 0 {
		note("nothing was seen: the proposal allows nothing")
	}
	if p.o.Lost > 0 {
		note("%d records were lost while it was watched: what they told of would be denied", p.o.Lost)
	}
	if p.o.Beyond > 0 {
		note("%d acts found no room or have no whole path: they would be denied unless others like them are listed", p.o.Beyond)
	}
	if p.o.Denied > 0 {
		note("%d acts were refused by other policies: nothing was learnt of them", p.o.Denied)
	}
	if watched := p.o.Until.Sub(p.o.Since); p.o.Acts > 0 && watched < time.Hour {
		note("it was watched for %s only: what happens once a day or at the end was not seen", watched.Round(time.Second))
	}
}
