package guard

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// CompileFacts is what a policy's meaning depends on besides its text.
type CompileFacts struct {
	// Gateway answers DNS; it is always allowed on port 53. The zero address
	// allows none.
	Gateway netip.Addr
	// FilesWith gives the paths of the files of the image that have one of some
	// digests, SHA-256 in lower-case hexadecimal. It is asked only for a policy
	// that names one. Where the image is not known it is nil, and such a policy is
	// refused.
	FilesWith func(digests []string) (map[string][]string, error)
	// Shared says that the policy is for a container that shares a node's kernel:
	// what can be held only in a guest is refused.
	Shared bool
}

// Compiled is what the guest's agent puts in force, and what its events mean.
type Compiled struct {
	Generation uint64
	Digest     string // of the blob, SHA-256 in lower-case hexadecimal
	Blob       []byte
	Rules      []Rule
	// Unsupported lists, in words, what was asked and cannot be held. It is
	// never simply dropped: what is listed here is refused more, not less.
	Unsupported []string
	// Learns: some policy is in learn.
	Learns bool
}

// Rule finds a rule by its number.
func (c *Compiled) Rule(id uint32) (Rule, bool) {
	i := slices.IndexFunc(c.Rules, func(r Rule) bool { return r.ID == id })
	if i < 0 {
		return Rule{}, false
	}
	return c.Rules[i], true
}

const (
	policyMagic = "HBPOLCY\x02"
	fixedSize   = 32 + 4*ruleIndexes + 4*maxEgressLists // struct policy of bpf/src/policy.h
	// maxBlob leaves room for the frame around it.
	maxBlob        = 240 << 10
	maxEgressLists = 32
	maxPath        = 4095
	maxName        = 255
)

// Compile turns the policies of an instance into one. They intersect: what any
// of them denies is denied, and a destination must be on every list. Without a
// policy the baseline holds. An error names every fault by policy, field,
// value and what to write instead.
func Compile(g node.Guard, facts CompileFacts) (Compiled, error) {
	c, err := gather(g, facts)
	if err != nil {
		return Compiled{}, err
	}
	c.execSections()
	blob := c.blob()
	if len(blob) > maxBlob {
		return Compiled{}, fmt.Errorf("compile guard policy: %s: all rules together take %d bytes, at most %d are carried: name directories rather than files, ranges rather than addresses", c.longest(), len(blob), maxBlob)
	}
	digest := sha256.Sum256(blob)
	copy(blob[len(policyMagic)+8:], digest[:])
	learns := slices.ContainsFunc(c.rules, func(r Rule) bool { return r.Learn })
	return Compiled{g.Generation, hex.EncodeToString(digest[:]), blob, c.rules, c.unsupported, learns}, nil
}

// gather reads all policies and brings together what they say.
func gather(g node.Guard, facts CompileFacts) (*compiler, error) {
	policies := g.Policies
	if len(policies) == 0 {
		policies = []node.NamedGuardPolicy{{Name: baselineName, Spec: Baseline()}}
	}
	c := compiler{guard: g, facts: facts, rules: builtInRules(), destinations: map[destination]allowance{}}
	if g.Generation == 0 {
		c.faults = append(c.faults, errors.New("guard generation 0: generations start at 1"))
	}
	c.findDigests(policies, facts)
	for i, p := range policies {
		c.policy(i, p)
	}
	if len(c.faults) > 0 {
		return nil, fmt.Errorf("compile guard policy: %w", errors.Join(c.faults...))
	}
	c.always()
	return &c, nil
}

// compiler gathers what all policies say.
type compiler struct {
	guard       node.Guard
	facts       CompileFacts
	name        string // of the policy being read
	enforce     bool
	rules       []Rule
	faults      []error
	unsupported []string

	fixed        [ruleIndexes]reference
	files        []fileRule
	programLists [][]string  // that files name
	open         [][2]uint32 // rules, first and last, of policies that may be held in part
	denied       []pathRule  // programs
	execs        execLists
	lists        []list // of addresses: what is allowed must be on each of its kind
	destinations map[destination]allowance
	domains      map[string]map[uint16]allowance // by name or "*." and one
	digests      map[string][]string             // paths in the image
	sections     []section
	auditRate    uint32
}

// section is a part of the blob that only policies which need it have. The
// guest refuses one that it does not know.
type section struct {
	tag  uint16
	data []byte
}

// sectionLimits is how many records of allowed acts are sent in a second.
const sectionLimits = 0x40

// pathRule is a rule about a program.
type pathRule struct {
	path string
	rule reference
}

// fault notes an error in a field of the policy being read.
func (c *compiler) fault(field, value, want string) {
	c.faults = append(c.faults, &Fault{c.name, field, value, want})
}

// Fault is what is wrong with a field of a policy.
type Fault struct {
	Policy string `json:"policy"`
	Field  string `json:"field"` // below spec, such as net.egress[0].cidr
	Value  string `json:"value"`
	Fix    string `json:"fix"` // what to write instead
}

func (f *Fault) Error() string {
	return fmt.Sprintf("policy %q: %s %q: %s", f.Policy, f.Field, f.Value, f.Fix)
}

// Faults lists what is wrong with fields, of all that an error of Compile says.
func Faults(err error) (out []*Fault) {
	switch e := err.(type) {
	case *Fault:
		return []*Fault{e}
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			out = append(out, Faults(err)...)
		}
	case interface{ Unwrap() error }:
		return Faults(e.Unwrap())
	}
	return out
}

// rule makes a rule of the policy being read.
func (c *compiler) rule(text string, severity spec.Severity) reference {
	if severity == "" {
		severity = spec.SeverityWarning
	}
	id := uint32(len(c.rules) - len(builtInRules()) + firstRule)
	c.rules = append(c.rules, Rule{ID: id, Policy: c.name, Text: text, Severity: severity})
	if c.enforce {
		return reference(id) | denies
	}
	return reference(id)
}

// stronger chooses between two rules about one thing: one that denies, then
// the more severe, then the first.
func (c *compiler) stronger(a, b reference) reference {
	if a == 0 || b != 0 && c.compare(b, a) < 0 {
		return b
	}
	return a
}

// compare orders rules, the stronger first.
func (c *compiler) compare(a, b reference) int {
	if a&denies != b&denies {
		return cmp.Compare(b&denies, a&denies)
	}
	return cmp.Compare(c.severityOf(b), c.severityOf(a))
}

func (c *compiler) severityOf(r reference) int {
	id := int(r &^ denies)
	if id < firstRule {
		return -1
	}
	return strength(c.rules[id-firstRule+len(builtInRules())].Severity)
}

func (c *compiler) severity(field string, s spec.Severity) {
	switch s {
	case "", spec.SeverityInfo, spec.SeverityWarning, spec.SeverityCritical:
	default:
		c.fault(field, string(s), "want info, warning or critical")
	}
}

func (c *compiler) oneOf(field, value, first, second string) bool {
	if value != "" && value != first && value != second {
		c.fault(field, value, "want "+first+" or "+second)
	}
	return value == "" || value == first
}

func (c *compiler) policy(index int, p node.NamedGuardPolicy) {
	c.name = p.Name
	if p.Name == "" || len(p.Name) > maxName {
		c.fault("name", p.Name, "want 1 to 255 characters")
	}
	learns := p.Spec.Mode == "learn"
	switch p.Spec.Mode {
	case "", "enforce", "audit", "learn":
	default:
		c.fault("mode", p.Spec.Mode, "want enforce, audit or learn")
	}
	c.enforce = p.Spec.Mode == "" || p.Spec.Mode == "enforce"
	if c.facts.Shared {
		c.shared(p.Spec)
	}
	first := uint32(len(c.rules) - len(builtInRules()) + firstRule)
	if p.Spec.Exec != nil {
		c.exec(p.Spec.Exec)
	}
	c.filesOf(index, p)
	if p.Spec.Net != nil {
		c.net(p.Spec.Net)
	}
	if p.Spec.Limits != nil {
		c.limits(p.Spec.Limits)
	}
	if p.Spec.Sys != nil {
		c.sys(p.Spec.Sys)
	}
	if learns {
		c.watch(index)
	}
	end := uint32(len(c.rules) - len(builtInRules()) + firstRule)
	if !c.oneOf("onFailure", p.Spec.OnFailure, "closed", "open") && end > first {
		c.open = append(c.open, [2]uint32{first, end - 1})
	}
}

func (c *compiler) set(index int, text string, severity spec.Severity) reference {
	r := c.rule(text, severity)
	c.fixed[index] = c.stronger(c.fixed[index], r)
	return r
}

// path checks that a path says what it means and can be held.
func (c *compiler) path(field, p string) bool {
	switch {
	case !strings.HasPrefix(p, "/"):
		c.fault(field, p, "want an absolute path")
	case len(p) > maxPath:
		c.fault(field, p[:64]+"...", "want at most 4095 characters")
	case strings.ContainsRune(p, 0):
		c.fault(field, p, "want no NUL")
	case strings.ContainsAny(p, "*?["):
		c.fault(field, p, "patterns are not understood: name the directory, which covers what is below it")
	case path.Clean(p) != p:
		c.fault(field, p, fmt.Sprintf("write it as %q", path.Clean(p)))
	default:
		return true
	}
	return false
}

// limits takes the policy that wants the most recorded: none may make another's
// record shorter.
func (c *compiler) limits(l *spec.GuardLimits) {
	if l.AuditPerSecond < 0 || l.AuditPerSecond > 100_000 {
		c.fault("limits.auditPerSecond", fmt.Sprint(l.AuditPerSecond), "want 0 to 100000")
		return
	}
	c.auditRate = max(c.auditRate, uint32(l.AuditPerSecond))
}

// blob lays everything out as package guest/guard reads it.
func (c *compiler) blob() []byte {
	le := binary.LittleEndian
	b := append([]byte(policyMagic), make([]byte, 0, 1024)...)
	b = le.AppendUint64(b, c.guard.Generation)
	b = append(b, make([]byte, sha256.Size)...)
	b = c.fixedPart(b)
	// Where two rules are about one object the guest keeps the first of equal
	// strength.
	slices.SortStableFunc(c.denied, func(a, b pathRule) int { return c.compare(a.rule, b.rule) })
	b = le.AppendUint32(b, uint32(len(c.denied)))
	for _, p := range c.denied {
		b = appendText(le.AppendUint32(b, uint32(p.rule)), p.path)
	}
	b = c.appendDestinations(b)
	if c.auditRate > 0 {
		c.sections = append(c.sections, section{sectionLimits, le.AppendUint32(nil, c.auditRate)})
	}
	c.fileSections()
	slices.SortFunc(c.sections, func(a, b section) int { return cmp.Compare(a.tag, b.tag) })
	for _, s := range c.sections {
		b = append(le.AppendUint32(le.AppendUint16(b, s.tag), uint32(len(s.data))), s.data...)
	}
	return b
}

// fixedPart is struct policy of bpf/src/policy.h.
func (c *compiler) fixedPart(b []byte) []byte {
	le := binary.LittleEndian
	var lists [maxEgressLists]reference
	deny, audit := c.egressMasks()
	for i, l := range c.lists {
		lists[i] = l.rule
	}
	b = le.AppendUint64(b, c.guard.Generation)
	for _, v := range [...]uint32{0, uint32(len(c.files)), flag(c.reads()), c.listedBits(), deny, audit} {
		b = le.AppendUint32(b, v)
	}
	for _, r := range c.fixed {
		b = le.AppendUint32(b, uint32(r))
	}
	for _, r := range lists {
		b = le.AppendUint32(b, uint32(r))
	}
	return b
}

// longest names the field that takes most of the blob.
func (c *compiler) longest() string {
	sizes := map[string]int{"exec": 0, "files": 0, "net": len(c.appendDestinations(nil))}
	for _, d := range c.denied {
		sizes["exec"] += len(d.path)
	}
	for _, s := range c.sections {
		switch s.tag {
		case sectionFiles:
			sizes["files"] += len(s.data)
		case sectionPrograms:
			sizes["exec"] += len(s.data)
		case sectionDomains:
			sizes["net"] += len(s.data)
		}
	}
	names := slices.Sorted(maps.Keys(sizes))
	return slices.MaxFunc(names, func(a, b string) int { return cmp.Compare(sizes[a], sizes[b]) })
}

func flag(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

func appendText(b []byte, s string) []byte {
	return append(binary.LittleEndian.AppendUint16(b, uint16(len(s))), s...)
}
