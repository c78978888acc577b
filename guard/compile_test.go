package guard

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// parsed is what a blob says, read the way the guest does.
type parsed struct {
	fixed           []byte
	files, programs []string
	destinations    map[string]uint32
	allowed         map[string][3]uint32
	sections        map[uint16][]byte
}

func parse(t *testing.T, blob []byte) (p parsed) {
	t.Helper()
	le := binary.LittleEndian
	b := blob[len(policyMagic)+8+32:]
	p.fixed, b = b[:fixedSize], b[fixedSize:]
	text := func(head int) string {
		n := int(le.Uint16(b[head:]))
		s := fmt.Sprintf("%x %s", b[:head], b[head+2:head+2+n])
		b = b[head+2+n:]
		return s
	}
	n := le.Uint32(b)
	b = b[4:]
	for range n {
		p.programs = append(p.programs, text(4))
	}
	n = le.Uint32(b)
	b = b[4:]
	p.destinations, p.allowed = map[string]uint32{}, map[string][3]uint32{}
	for range n {
		var addr [16]byte
		copy(addr[:], b[8:24])
		bits := int(le.Uint32(b)) - 32
		a := netip.AddrFrom16(addr)
		if le.Uint16(b[4:])&0xff == 4 {
			a, bits = a.Unmap(), bits-96
		}
		key := map[kind]string{from: "from ", atPort: "at "}[kind(le.Uint16(b[4:])&^0xff)]
		key += fmt.Sprintf("%s/%d:%d", a, bits, binary.BigEndian.Uint16(b[6:]))
		p.allowed[key] = [3]uint32{le.Uint32(b[24:]), le.Uint32(b[28:]), le.Uint32(b[32:])}
		p.destinations[fmt.Sprintf("%s/%d:%d", a, bits, binary.BigEndian.Uint16(b[6:]))] = le.Uint32(b[24:])
		b = b[36:]
	}
	p.sections = map[uint16][]byte{}
	for len(b) >= 6 {
		n := int(le.Uint32(b[2:]))
		p.sections[le.Uint16(b)], b = b[6:6+n], b[6+n:]
	}
	if len(b) != 0 {
		t.Fatalf("%d bytes behind the blob", len(b))
	}
	p.readFiles()
	return p
}

// readFiles reads the section for files: "base allow list path" of each rule.
func (p *parsed) readFiles() {
	le := binary.LittleEndian
	b := p.sections[sectionFiles]
	if b == nil {
		return
	}
	text := func() string {
		n := int(le.Uint16(b))
		s := string(b[2 : 2+n])
		b = b[2+n:]
		return s
	}
	n := le.Uint32(b)
	b = b[4:]
	for range n {
		programs := int(le.Uint16(b))
		b = b[2:]
		for range programs {
			text()
		}
	}
	n = le.Uint32(b)
	b = b[4:]
	for range n {
		head := fmt.Sprintf("%d %d %d %08x ", b[4], b[5], le.Uint16(b[2:]), le.Uint32(b[6:]))
		b = b[14:]
		p.files = append(p.files, head+text())
	}
}

func (p parsed) rule(i int) uint32 { return binary.LittleEndian.Uint32(p.fixed[32+4*i:]) }

func TestCompileWithoutPolicyIsBaseline(t *testing.T) {
	c := compileForTest(t, 4)
	p := parse(t, c.Blob)
	for i, r := range []uint32{p.rule(onOrigin), p.rule(onShell), p.rule(onBPF), p.rule(onMount), p.rule(onUserNS)} {
		if r&uint32(denies) == 0 {
			t.Errorf("rule %d of the baseline does not deny", i)
		}
	}
	if p.rule(onMemory) != 0 {
		t.Error("the baseline denies executable memory, which just-in-time compilers need")
	}
	if r, ok := c.Rule(p.rule(onOrigin) &^ uint32(denies)); !ok || r.Policy != "baseline" {
		t.Errorf("rule %+v; want one of the baseline", r)
	}
}

func TestCompileIntersects(t *testing.T) {
	audit := spec.GuardPolicy{Mode: "audit", Sys: &spec.GuardSys{Deny: []spec.GuardOperation{"mount", "ptrace"}, Severity: spec.SeverityCritical}}
	mild := spec.GuardPolicy{Sys: &spec.GuardSys{Deny: []spec.GuardOperation{"mount"}, Severity: spec.SeverityInfo}}
	severe := spec.GuardPolicy{Sys: &spec.GuardSys{Deny: []spec.GuardOperation{"mount"}, Severity: spec.SeverityCritical}}
	c := compileForTest(t, 1, audit, mild, severe)
	p := parse(t, c.Blob)
	mount, _ := c.Rule(p.rule(onMount) &^ uint32(denies))
	if p.rule(onMount)&uint32(denies) == 0 || mount.Policy != "policy-2" || mount.Severity != spec.SeverityCritical {
		t.Errorf("mount is held by %+v; want the enforcing, critical one", mount)
	}
	if p.rule(onPtrace) == 0 || p.rule(onPtrace)&uint32(denies) != 0 {
		t.Errorf("ptrace has rule %x; want one that reports", p.rule(onPtrace))
	}
	if p.rule(onBPF) != 0 {
		t.Errorf("bpf has rule %x; want none", p.rule(onBPF))
	}
}

func TestCompileDestinations(t *testing.T) {
	wide := spec.GuardPolicy{Net: &spec.GuardNet{Egress: []spec.GuardEgress{{CIDR: "10.0.0.0/8"}, {CIDR: "2001:db8::/32", Ports: []int32{443}}}}}
	narrow := spec.GuardPolicy{Net: &spec.GuardNet{Egress: []spec.GuardEgress{{CIDR: "10.1.0.0/16"}, {Service: "ledger", Ports: []int32{80}}, {Service: "gone"}}}}
	none := spec.GuardPolicy{Mode: "audit", Net: &spec.GuardNet{Egress: []spec.GuardEgress{}}}
	c := compileForTest(t, 1, wide, narrow, none)
	p := parse(t, c.Blob)
	all := allLists
	want := map[string]uint32{
		"10.0.0.0/8:0": 1, "10.1.0.0/16:0": 3, "2001:db8::/32:443": 1, "198.51.100.7/32:80": 2,
		"127.0.0.0/8:0": all, "0.0.0.0/32:0": all, "::1/128:0": all, "::/128:0": all, "192.0.2.1/32:53": all,
	}
	for k, v := range want {
		if p.destinations[k] != v {
			t.Errorf("%s is on lists %b, want %b", k, p.destinations[k], v)
		}
	}
	if len(p.destinations) != len(want) {
		t.Errorf("%d destinations, want %d: %v", len(p.destinations), len(want), p.destinations)
	}
	if deny, audit := binary.LittleEndian.Uint32(p.fixed[24:]), binary.LittleEndian.Uint32(p.fixed[28:]); deny != 3 || audit != 4 {
		t.Errorf("lists %b deny and %b report; want 11 and 100", deny, audit)
	}
	if len(c.Unsupported) != 1 || !strings.Contains(c.Unsupported[0], `"gone"`) {
		t.Errorf("unsupported %q; want the service that is not known", c.Unsupported)
	}
}

func TestCompileOrdersRulesOfOneFile(t *testing.T) {
	c := compileForTest(t, 1,
		spec.GuardPolicy{Mode: "audit", Files: []spec.GuardFile{{Path: "/a", Deny: "rw", Severity: spec.SeverityCritical}}},
		spec.GuardPolicy{Files: []spec.GuardFile{{Path: "/a", Deny: "w", Severity: spec.SeverityInfo}, {Path: "/b", Deny: "rw", Severity: spec.SeverityCritical}}},
	)
	var paths []string
	for _, f := range parse(t, c.Blob).files {
		paths = append(paths, f[strings.LastIndexByte(f, ' ')+1:])
	}
	if !slices.Equal(paths, []string{"/b", "/a", "/a"}) {
		t.Errorf("files in order %q; want those that deny before those that report, the severe first", paths)
	}
}

func TestCompileNamesEveryFault(t *testing.T) {
	bad := spec.GuardPolicy{
		Mode:  "block",
		Exec:  &spec.GuardExec{Origin: "host", AnonymousMemory: "maybe", ShellOnSocket: "no", Deny: []string{"curl", "/bin/../bin/sh", "/bin/*"}, Severity: "urgent"},
		Files: []spec.GuardFile{{Path: "etc", Deny: "w"}, {Path: "/etc", Deny: "x"}, {Path: "/a\x00b", Deny: "w"}, {Path: "/" + strings.Repeat("x", 5000), Deny: "w"}},
		Net: &spec.GuardNet{Egress: []spec.GuardEgress{
			{}, {CIDR: "10.0.0.0/8", Service: "a"}, {CIDR: "10.0.0.1/8"}, {CIDR: "10.0.0.1"}, {CIDR: "all/0"}, {CIDR: "::ffff:10.0.0.0/104"},
			{CIDR: "10.0.0.0/8", Ports: []int32{0, 70000}}, {Service: "broken"},
		}},
		Sys: &spec.GuardSys{Deny: []spec.GuardOperation{"everything"}},
	}
	_, err := Compile(node.Guard{
		Policies: []node.NamedGuardPolicy{{Name: "pay", Spec: bad}, {Name: ""}}, Services: map[string]string{"broken": "web:80"},
	}, CompileFacts{})
	if err == nil {
		t.Fatal("a policy full of faults was compiled")
	}
	for _, want := range []string{
		`guard generation 0`,
		`policy "pay": mode "block": want enforce, audit or learn`,
		`exec.origin "host": want image or any`, `exec.anonymousMemory "maybe"`, `exec.shellOnSocket "no"`, `exec.severity "urgent"`,
		`exec.deny[0] "curl": want an absolute path`, `exec.deny[1] "/bin/../bin/sh": write it as "/bin/sh"`, `exec.deny[2] "/bin/*": patterns are not understood`,
		`files[0].path "etc"`, `files[1].deny "x": want r, w or rw`, `files[2].path "/a\x00b": want no NUL`, `files[3].path`,
		`net.egress[0] "": set exactly one`, `net.egress[1] "a10.0.0.0/8": set exactly one`, `net.egress[2].cidr "10.0.0.1/8": write it as 10.0.0.0/8`,
		`net.egress[3].cidr "10.0.0.1": want a range: for one address add /32`, `net.egress[4].cidr "all/0"`, `net.egress[5].cidr "::ffff:10.0.0.0/104": write an IPv4 range as such`,
		`net.egress[6].ports[0] "0"`, `net.egress[6].ports[1] "70000"`, `net.egress[7].service "broken": its address "web:80" is none`,
		`sys.deny[0] "everything"`, `policy "": name "": want 1 to 255`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %s", want)
		}
	}
	if t.Failed() {
		t.Log(err)
	}
}

func TestCompileBoundsTheBlob(t *testing.T) {
	var big spec.GuardPolicy
	for i := range 512 {
		big.Files = append(big.Files, spec.GuardFile{Path: fmt.Sprintf("/%s/%d", strings.Repeat("x", 2000), i), Deny: "w"})
	}
	_, err := Compile(node.Guard{Generation: 1, Policies: []node.NamedGuardPolicy{{Name: "big", Spec: big}}}, CompileFacts{})
	if err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("%v; want the size refused", err)
	}
	lists := node.Guard{Generation: 1}
	for i := range 33 {
		lists.Policies = append(lists.Policies, node.NamedGuardPolicy{Name: fmt.Sprint(i), Spec: spec.GuardPolicy{Net: &spec.GuardNet{Egress: []spec.GuardEgress{{CIDR: "10.0.0.0/8"}}}}})
	}
	if _, err := Compile(lists, CompileFacts{}); err == nil || !strings.Contains(err.Error(), "more than 32") {
		t.Errorf("%v; want the number of lists refused", err)
	}
}

func TestCompileTwiceGivesTheSameBytes(t *testing.T) {
	a, b := compileForTest(t, 9, strict(), Baseline()), compileForTest(t, 9, strict(), Baseline())
	if !bytes.Equal(a.Blob, b.Blob) || a.Digest != b.Digest || len(a.Digest) != 64 {
		t.Error("one policy compiled twice differs")
	}
	if c := compileForTest(t, 10, strict(), Baseline()); c.Digest == a.Digest {
		t.Error("two generations have one digest")
	}
}

func TestDecodeStatusRefuses(t *testing.T) {
	for _, b := range [][]byte{nil, {1}, make([]byte, 77), append([]byte{1}, make([]byte, 77)...)} {
		if s, err := DecodeStatus(b); !errors.Is(err, errStatus) {
			t.Errorf("%d bytes: %+v, %v; want a refusal", len(b), s, err)
		}
		if a, err := DecodeApplied(b); !errors.Is(err, errStatus) {
			t.Errorf("%d bytes: %+v, %v; want a refusal", len(b), a, err)
		}
	}
}

func FuzzDecodeAnswers(f *testing.F) {
	f.Add([]byte{})
	f.Add(append([]byte{1}, make([]byte, 76)...))
	f.Add([]byte{1, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 16, 0, 0, 0, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := DecodeStatus(b); err == nil && len(s.Tags)*8 > len(b) {
			t.Errorf("%d tags in %d bytes", len(s.Tags), len(b))
		}
		if a, err := DecodeApplied(b); err == nil && (len(a.Absent)+len(a.Lost))*7 > len(b) {
			t.Errorf("%d rules in %d bytes", len(a.Absent), len(b))
		}
	})
}
