package guard

import (
	"encoding/binary"
	"strings"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// programsPolicy says what can be said of programs by lists.
func programsPolicy() spec.GuardPolicy {
	return spec.GuardPolicy{Exec: &spec.GuardExec{
		JIT: []string{"/bin/jit"},
		Allow: []spec.GuardProgram{
			{Path: "/attack"}, {Path: "/bin/jit"}, {Path: "/bin/parent"}, {Path: "/bin/script"}, {Path: "/bin/absent"},
			{Path: "/bin/tool", Parents: []string{"/bin/parent", "/bin/absent"}},
		},
	}}
}

func programsAttempts() []attempt {
	const (
		list   = "only the listed programs may run"
		memory = "memory that was written"
		image  = "only programs and libraries of the image"
	)
	return []attempt{
		{"exec=unlisted /bin/curl", list, OpUnlisted, "P2 T1059"},
		{"exec=linked /bin/curl-too", list, OpUnlisted, "P2 B3 T1059"},
		{"exec=parent /bin/tool", list, OpUnlisted, "P2 P5 T1059"},
		{"as=grandchild /bin/parent as /bin/jit exec /bin/tool", list, OpUnlisted, "P2 B25 T1059"},
		{"as=interpreter /bin/script", list, OpUnlisted, "P2 B12 T1059"},
		{"as=child /bin/jit as /bin/parent anonymous", memory, OpMemory, "B9 B25 T1620"},
		{"as=rwx /bin/parent rwx", memory, OpMemory, "B9 T1055"},
		{"as=procmem /bin/jit procmem", memory, OpMemory, "B13 T1055.009"},
		{"as=memfd /bin/jit memfdmap", image, OpMap, "B10 T1620"},
		{"as=renamed /bin/parent named jit anonymous", memory, OpMemory, "B14 T1036"},
		{"as=thread /bin/parent thread anonymous", memory, OpMemory, "B9 T1055"},
	}
}

var programsBenign = []string{
	"exec=listed /bin/jit", "as=listed /bin/parent exec /bin/tool", "as=listedthread /bin/parent thread exec /bin/tool",
	"as=jit /bin/jit anonymous", "as=jitrwx /bin/jit rwx", "as=jitthread /bin/jit thread anonymous",
}

// lists gives what the lists of an aspect refuse and report.
func (p parsed) lists(aspect int) (deny, audit uint32) {
	b := p.sections[sectionExecLists][aspect*(8+4*maxExecLists):]
	return binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
}

// entries gives the lists that each path is on for a kind.
func (p parsed) entries(kind programKind) map[string]uint32 {
	le := binary.LittleEndian
	b, found := p.sections[sectionPrograms], map[string]uint32{}
	n := le.Uint32(b)
	b = b[4:]
	text := func() string {
		n := int(le.Uint16(b))
		s := string(b[2 : 2+n])
		b = b[2+n:]
		return s
	}
	for range n {
		k, lists := le.Uint16(b), le.Uint32(b[2:])
		b = b[26:]
		path := text()
		parents := le.Uint16(b)
		b = b[2:]
		for range parents {
			path += " < " + text()
		}
		if programKind(k) == kind {
			found[path] |= lists
		}
	}
	return found
}

// A list lifts only what its own policy refuses, and a section that is only
// audited refuses nothing.
func TestCompileKeepsListsApart(t *testing.T) {
	audited := programsPolicy()
	audited.Exec.Audit = true
	c := compileForTest(t, 1, audited, programsPolicy(), spec.GuardPolicy{Exec: &spec.GuardExec{
		Origin: "any", AnonymousMemory: "allow", Allow: []spec.GuardProgram{{Path: "/attack"}, {Path: "/bin/curl"}},
	}})
	p := parse(t, c.Blob)
	for aspect, want := range map[int][2]uint32{aspectOrigin: {2, 1}, aspectMemory: {2, 1}, aspectProgram: {6, 1}} {
		if deny, audit := p.lists(aspect); deny != want[0] || audit != want[1] {
			t.Errorf("aspect %d: lists %b refuse and %b report, want %b", aspect, deny, audit, want)
		}
	}
	allowed := p.entries(programAllowed)
	for path, want := range map[string]uint32{"/attack": 7, "/bin/jit": 3, "/bin/curl": 4} {
		if allowed[path] != want {
			t.Errorf("%s is on lists %b, want %b", path, allowed[path], want)
		}
	}
	if got := p.entries(programLimited)["/bin/tool < /bin/parent < /bin/absent"]; got != 3 {
		t.Errorf("/bin/tool is limited on lists %b, want 11", got)
	}
	if got := p.entries(programJIT)["/bin/jit"]; got != 3 {
		t.Errorf("/bin/jit may make code by lists %b, want 11", got)
	}
	for _, i := range []int{onOrigin, onMemory, onUnlisted} {
		if p.rule(i)&uint32(denies) == 0 {
			t.Errorf("rule %d does not deny although a policy enforces it", i)
		}
	}
	alone := parse(t, compileForTest(t, 1, audited).Blob)
	for _, i := range []int{onOrigin, onMemory, onUnlisted, onShell} {
		if r := alone.rule(i); r == 0 || r&uint32(denies) != 0 {
			t.Errorf("rule %d of an audited section is %x, want one that reports", i, r)
		}
	}
}

func TestCompileNamesFaultsOfPrograms(t *testing.T) {
	many := make([]string, maxParents+1)
	for i := range many {
		many[i] = "/bin/sh"
	}
	g := node.Guard{Generation: 1, Policies: []node.NamedGuardPolicy{{Name: "pay", Spec: spec.GuardPolicy{Exec: &spec.GuardExec{
		JIT:   []string{"node"},
		Allow: []spec.GuardProgram{{}, {Path: "/bin/x", Parents: []string{"sh"}}, {Path: "/bin/x", Parents: many}},
	}}}}}
	for range maxExecLists {
		g.Policies = append(g.Policies, node.NamedGuardPolicy{Name: "more", Spec: spec.GuardPolicy{Exec: &spec.GuardExec{}}})
	}
	_, err := Compile(g, CompileFacts{})
	if err == nil {
		t.Fatal("a policy full of faults was compiled")
	}
	for _, want := range []string{
		`exec.jit[0] "node": want an absolute path`, `exec.allow[0].path "": want an absolute path`, `exec.allow[1].parents[0] "sh": want an absolute path`,
		`exec.allow[2].parents "17": want at most 16`, `more than 32 policies about programs`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %s:\n%v", want, err)
		}
	}
}
