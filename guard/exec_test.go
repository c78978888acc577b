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
			{SHA256: digestForTest, Parents: []string{"/bin/jit"}},
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
		{"exec=digested /bin/digested", list, OpUnlisted, "P2 T1059"},
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
	"exec=listed /bin/jit", "as=digested /bin/jit exec /opt/digested", "as=listed /bin/parent exec /bin/tool", "as=listedthread /bin/parent thread exec /bin/tool",
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
	if got := p.entries(programLimited)["/opt/digested < /bin/jit"]; got != 3 {
		t.Errorf("what has the digest is limited on lists %b, want 11", got)
	}
	gone := compileForTest(t, 1, spec.GuardPolicy{Exec: &spec.GuardExec{Deny: []string{"sha256:" + strings.Repeat("b", 64)}}})
	if len(gone.Unsupported) != 1 || !strings.Contains(gone.Unsupported[0], "no file of the image has this digest") {
		t.Errorf("%q; want told of the digest that is not there", gone.Unsupported)
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
		Deny:  []string{"sha256:abc", "sha256:" + digestForTest},
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
		`exec.jit[0] "node": want an absolute path`, `exec.allow[0] "": set exactly one of path and sha256`, `exec.allow[1].parents[0] "sh": want an absolute path`,
		`exec.allow[2].parents "17": want at most 16`, `more than 32 policies about programs`,
		`exec.deny[0] "abc": want 64 lower-case`, `exec.deny[1] "a1a1a1`, `the files of the image are not known here`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %s:\n%v", want, err)
		}
	}
}

// interpretersPolicy says all that is said of interpreters and of what they, and
// the loader, are told.
func interpretersPolicy() spec.GuardPolicy {
	return spec.GuardPolicy{Exec: &spec.GuardExec{
		AnonymousMemory: "allow", Preload: "deny",
		Scripts: &spec.GuardScripts{Interpreters: []string{"/bin/sh", "/bin/python3", "/bin/perl"}, Origin: "image", Inline: "deny"},
	}}
}

func interpretersAttempts() []attempt {
	const (
		preload = "LD_PRELOAD or LD_AUDIT"
		origin  = "interpreters may read only"
		inline  = "interpreters may be given no code"
		socket  = "nor an interpreter have one relayed"
	)
	return []attempt{
		{"relaypipe", socket, OpShell, "P3 T1059.004"},
		{"relaysocket", socket, OpShell, "P3 T1059.004"},
		{"relaypty", socket, OpShell, "P3 T1059.004"},
		{"relayabove", socket, OpShell, "P3 B25 T1059.004"},
		{"relayfifo", socket, OpShell, "P3 T1059.004"},
		{"relayfirst", socket, OpShell, "P3 T1059.004"},
		{"env=preload LD_PRELOAD=/tmp/x.so /bin/tool nothing", preload, OpPreload, "P4 B8 T1574.006"},
		{"env=audit LD_AUDIT=/tmp/x.so /bin/tool nothing", preload, OpPreload, "P4 B8 T1574.006"},
		{"manyenv LD_PRELOAD=/tmp/x.so /bin/tool nothing", preload, OpPreload, "P4 B2 B8 T1574.006"},
		{"as=shread /bin/sh readown /tmp/script.sh", origin, OpScript, "B12 T1059.004"},
		{"as=shshm /bin/sh readown /shm/script.sh", origin, OpScript, "B12 T1059.004"},
		{"as=shmemfd /bin/sh readmemfd", origin, OpScript, "P6 B12 T1059.004"},
		{"as=python /bin/python3 readown /tmp/script.py", origin, OpScript, "B12 T1059.006"},
		{"as=changed /bin/sh readown /etc/app/19", origin, OpScript, "B12 T1059.004"},
		{"args=dashc /bin/sh -c nothing", inline, OpInline, "B12 T1059.004"},
		{"args=cluster /bin/sh -ec nothing", inline, OpInline, "B12 T1059.004"},
		{"args=value /bin/sh -o errexit -c nothing", inline, OpInline, "B12 T1059.004"},
		{"args=input /bin/sh -s nothing", inline, OpInline, "B12 T1059.004"},
		{"args=python /bin/python3 -Ic nothing", inline, OpInline, "B12 T1059.006"},
		{"args=perl2 /bin/perl -we nothing", inline, OpInline, "B12 T1059"},
		{"args=perl3 /bin/perl -M strict - nothing", inline, OpInline, "B12 T1059"},
		{"args=long /bin/python3=" + strings.Repeat("x", 300) + " -c nothing", inline, OpInline, "B12 T1059.006"},
	}
}

var interpretersBenign = []string{
	"feed /bin/sh", "pipeshell=interpreter",
	"env=other LD_LIBRARY_PATH=/tmp /bin/tool nothing", "env=empty LD_PRELOAD= /bin/tool nothing", "manyenv=few X=y /bin/tool nothing",
	"env=near XLD_PRELOAD=/tmp/x.so /bin/tool nothing",
	"as=image /bin/sh read /etc/app/18", "as=proc /bin/sh read /proc/self/status", "as=null /bin/sh read /dev/null", "as=cat /bin/tool readown /tmp/data",
	"args=errexit /bin/sh -e nothing", "args=script /bin/sh nothing -c", "args=module /bin/python3 -m nothing -c", "args=noenv /bin/python3 -E nothing", "args=nosh /bin/tool -c nothing",
	"args=perl /bin/perl -Mstrict nothing", "args=plus /bin/sh +e nothing",
}

// volumesPolicy lets the programs of a volume run.
func volumesPolicy() spec.GuardPolicy {
	return spec.GuardPolicy{Exec: &spec.GuardExec{Volumes: []string{"/mnt/plugins", "/mnt/absent"}, AnonymousMemory: "allow"}}
}

func volumesAttempts() []attempt {
	const image = "only programs and libraries of the image"
	return []attempt{
		{"exec=othermount /shm/plugins/tool", image, OpExec, "B3 B11 T1059"},
		{"exec=root /proc/self/root/shm/plugins/tool", image, OpExec, "B5 B11 T1059"},
		{"linkinto /shm/outside1 /shm/plugins/linked", image, OpIntoVolume, "B3 B11 T1036"},
		{"renameinto /shm/outside2 /shm/plugins/renamed", image, OpIntoVolume, "B3 B11 T1036"},
		{"exchangeinto /shm/outside3 /shm/plugins/lib", image, OpIntoVolume, "B3 B11 T1036"},
		{"tmpfsover /mnt/plugins", image, OpExec, "B10 B11 T1564"},
		{"bindrun /mnt/plugins", image, OpExec, "B3 B11 T1564"},
		{"tmpfsover=below /mnt/plugins/below", image, OpExec, "B10 B11 T1564"},
		{"mapother /shm/plugins/lib", image, OpMap, "B8 B11 T1574"},
	}
}

var volumesBenign = []string{
	"exec=volume /mnt/plugins/tool", "drop=volume /mnt/plugins/new", "mapother=volume /mnt/plugins/lib", "linkinto=outside /shm/outside4 /shm/outside5",
	"linkinto=within /mnt/plugins/one /mnt/plugins/two",
}
