package guard

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

var learnDay = time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)

// seen are reports of a workload in learn: a server that runs a helper, keeps its
// data in one place, and calls a service, a name and an address.
func seen() []Event {
	at := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	events := []Event{
		{Op: OpUnlisted, Path: "/usr/bin/app"},
		{Op: OpUnlisted, Path: "/usr/bin/helper", Exe: "/usr/bin/app"},
		{Op: OpUnlisted, Path: "/bin/sh", Exe: "/usr/bin/app"},
		{Op: OpUnlisted, Path: "/bin/sh"},
		{Op: OpRead, Path: "/usr/lib/x86_64-linux-gnu/libc.so.6", Exe: "/usr/bin/app"},
		{Op: OpRead, Path: "/etc/app/conf", Exe: "/usr/bin/app"},
		{Op: OpRead, Path: "/srv/www/index.html", Exe: "/usr/bin/app"},
		{Op: OpWrite, Path: "/etc/app.state", Exe: "/usr/bin/app"},
		{Op: OpWrite, Path: "/tmp/a1", Exe: "/usr/bin/app"},
		{Op: OpWrite, Path: "/tmp/a2", Exe: "/usr/bin/helper"},
		{Op: OpMemory, Why: 1, Exe: "/usr/bin/app"},
		{Op: OpMemory, Why: memoryProc, Exe: "/usr/bin/helper"},
		{Op: OpNames, Names: &Names{Answer: true, Questions: []NameRecord{{Name: "API.example.com.", Type: "A"}}, Answers: []NameRecord{{Name: "api.example.com.", Type: "A", Data: "203.0.113.5", TTL: 60}}}},
		{Op: OpEgress, Target: at("203.0.113.5:443"), Exe: "/usr/bin/app"},
		{Op: OpEgress, Target: at("198.51.100.7:5000"), Exe: "/usr/bin/app"},
		{Op: OpEgress, Target: at("198.51.100.7:5001"), Exe: "/usr/bin/helper"},
		{Op: OpEgress, Target: at("[2001:db8::7]:25"), Exe: "/usr/bin/app"},
		{Op: OpBind, Target: at("0.0.0.0:8080"), Exe: "/usr/bin/app"},
		{Op: OpListening, Target: at("0.0.0.0:8080"), Exe: "/usr/bin/app"},
		{Op: OpOperation, Detail: uint64(onSetUID), Exe: "/usr/bin/app"},
		{Op: OpCapability, Detail: 7, Exe: "/usr/bin/app"},
		{Op: OpCapability, Detail: 10, Exe: "/usr/bin/app"},
		{Op: OpExec, Why: fromChange, Path: "/tmp/dropped", Exe: "/usr/bin/app"},
		{Op: OpShell, Path: "/bin/sh", Exe: "/usr/bin/app"},
	}
	for n := range 12 {
		for _, name := range []string{"a", "b"} {
			events = append(events, Event{Op: OpWrite, Path: fmt.Sprintf("/var/lib/app/%d/%s", n, name), Exe: "/usr/bin/app"})
		}
	}
	for i := range events {
		events[i].Verdict, events[i].Sequence = Reported, uint64(i+1)
		if events[i].Op == OpNames || events[i].Op == OpListening {
			events[i].Verdict = Allowed
		}
	}
	return events
}

func observe(events []Event) Observation {
	var l Learner
	for i, e := range events {
		l.Add(e, 1, learnDay.Add(time.Duration(i)*time.Second))
	}
	return l.Observation()
}

func knownForTest() ProposeFacts {
	return ProposeFacts{Services: map[netip.Addr]string{netip.MustParseAddr("198.51.100.7"): "ledger"}, Ports: []int32{8080, 9000},
		Digest: func(path string) string {
			if path == "/usr/bin/app" {
				return strings.Repeat("ab", 32)
			}
			return ""
		}}
}

// TestPropose holds what is made of an observation to a file that people read.
func TestPropose(t *testing.T) {
	got, err := json.MarshalIndent(Propose(observe(seen()), knownForTest()), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/learn/proposal.json"
	if os.Getenv("HAUBERK_UPDATE") != "" {
		if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != string(got)+"\n" {
		t.Errorf("the proposal is not that of %s (HAUBERK_UPDATE=1 writes it):\n%s", golden, got)
	}
}

// TestProposalAllowsWhatWasSeen: what was learnt goes through, but for what the
// proposal says that it refuses; and what was not is denied.
func TestProposalAllowsWhatWasSeen(t *testing.T) {
	p := Propose(observe(seen()), knownForTest())
	j, err := NewJudge(node.Guard{Generation: 1, Services: map[string]string{"ledger": "198.51.100.7"}, Policies: []node.NamedGuardPolicy{{Name: "learnt", Spec: p.Spec}}}, JudgeFacts{})
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for _, e := range seen() {
		j.Learn(e)
		if got := j.Judge(e); got.Verdict >= Denied {
			refused++
			if e.Op != OpExec && e.Op != OpShell && e.Why != memoryProc {
				t.Errorf("%s: %s by %q", e, got.Verdict, got.Rule.Text)
			}
		}
	}
	if refused != 3 || len(p.Refuses) != 3 {
		t.Errorf("%d acts are refused, and the proposal tells of %d: want 3", refused, len(p.Refuses))
	}
	at := netip.MustParseAddrPort
	for _, e := range []Event{
		{Op: OpUnlisted, Path: "/bin/sh", Exe: "/usr/bin/helper"}, {Op: OpUnlisted, Path: "/bin/nc", Exe: "/usr/bin/app"}, {Op: OpUnlisted, Path: "/usr/bin/app", Exe: "/bin/sh"},
		{Op: OpRead, Path: "/root/.ssh/id", Exe: "/usr/bin/app"}, {Op: OpRead, Path: "/srv/other/x", Exe: "/usr/bin/app"},
		{Op: OpWrite, Path: "/usr/bin/app", Exe: "/usr/bin/app"}, {Op: OpWrite, Path: "/etc/passwd", Exe: "/usr/bin/app"},
		{Op: OpWrite, Path: "/var/lib/app/1/a", Exe: "/usr/bin/helper"}, {Op: OpMemory, Why: 1, Exe: "/usr/bin/helper"},
		{Op: OpEgress, Target: at("198.51.100.7:22"), Exe: "/usr/bin/app"}, {Op: OpEgress, Target: at("203.0.113.6:443"), Exe: "/usr/bin/app"},
		{Op: OpBind, Target: at("0.0.0.0:4444"), Exe: "/usr/bin/app"}, {Op: OpCapability, Detail: 21}, {Op: OpMount}, {Op: OpPtrace}, {Op: OpRawSocket}, {Op: OpPreload},
	} {
		if got := j.Judge(e); got.Verdict < Denied {
			t.Errorf("%s: %s %s; want it denied", e, got.Verdict, got.Lacks)
		}
	}
}

// TestLearnerIsBounded feeds it more than it can hold.
func TestLearnerIsBounded(t *testing.T) {
	var l Learner
	const acts = 50_000
	for n := range acts {
		e := Event{Verdict: Reported, Exe: "/bin/a", Series: uint64(n + 1), Sequence: uint64(n + 1)}
		switch n % 4 {
		case 0:
			e.Op, e.Path = OpWrite, fmt.Sprintf("/data/%d/%d/%d", n%7, n%997, n)
		case 1:
			e.Op, e.Path = OpRead, fmt.Sprintf("/etc/%d", n)
		case 2:
			e.Op, e.Target = OpEgress, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 80)
		case 3:
			e.Op, e.Path = OpUnlisted, fmt.Sprintf("/bin/%d", n)
		}
		l.Add(e, 1, learnDay)
	}
	l.Add(Event{Op: OpRead, Path: ".../x", Verdict: Reported}, 1, learnDay)
	l.Add(Event{Op: OpRead, Path: "/x", Verdict: Denied}, 1, learnDay)
	o := l.Observation()
	counted := uint64(0)
	for _, f := range o.Facts {
		counted += f.Count
	}
	if len(o.Facts) > maxFacts+maxFileFacts || len(l.series) > maxFactSeries || counted+o.Beyond+o.Denied != acts+2 || o.Denied != 1 || o.Whole() {
		t.Errorf("%d facts and %d series; %d acts counted, %d beyond, %d denied, of %d; want bounds, and every act in one", len(o.Facts), len(l.series), counted, o.Beyond, o.Denied, acts+2)
	}
	if !slices.ContainsFunc(o.Facts, func(f Fact) bool { return strings.HasSuffix(f.What, "/") }) {
		t.Error("no directory stands for its files")
	}
	p := Propose(o, ProposeFacts{})
	if _, err := Compile(node.Guard{Generation: 1, Policies: []node.NamedGuardPolicy{{Name: "p", Spec: p.Spec}}}, CompileFacts{}); err != nil {
		t.Errorf("a proposal from it: %v", err)
	}
	if len(p.Notes) == 0 {
		t.Error("a proposal from an observation with gaps does not say so")
	}
}

// TestRepetitionsCount: what the kernel merged counts for the same fact.
func TestRepetitionsCount(t *testing.T) {
	var l Learner
	l.Add(Event{Op: OpRead, Path: "/etc/x", Verdict: Reported, Series: 7, Sequence: 7}, 1, learnDay)
	l.Add(Event{Op: OpRepeated, Detail: uint64(OpRead), Verdict: Reported, Series: 7}, 41, learnDay.Add(time.Minute))
	o := l.Observation()
	if len(o.Facts) != 1 || o.Facts[0].Count != 42 || o.Acts != 42 || !o.Facts[0].Last.Equal(learnDay.Add(time.Minute)) {
		t.Errorf("%+v; want one fact of 42 acts", o)
	}
	joined := Join(o, o)
	if joined.Acts != 84 || joined.Facts[0].Count != 84 || len(joined.Facts) != 1 {
		t.Errorf("two instances: %+v", joined)
	}
}

// TestLearnDeniesNothing: a policy in learn only reports, whatever it says itself,
// and beside one that enforces nothing is weaker.
func TestLearnDeniesNothing(t *testing.T) {
	own := strict()
	own.Mode = "learn"
	floor := strict()
	alone := []node.NamedGuardPolicy{{Name: "learnt", Spec: own}}
	both := append(slices.Clone(alone), node.NamedGuardPolicy{Name: "floor", Spec: floor})
	s := newProber(both)
	learns, err := s.judge(alone)
	if err != nil {
		t.Fatal(err)
	}
	holds, err := s.judge(both[1:])
	if err != nil {
		t.Fatal(err)
	}
	beside, err := s.judge(both)
	if err != nil {
		t.Fatal(err)
	}
	reported := 0
	for _, p := range s.probes {
		a, b, c := learns.Judge(p.event), holds.Judge(p.event), beside.Judge(p.event)
		if a.Verdict >= Denied && a.Rule.Policy != builtIn {
			t.Errorf("%s: %s by learn", p.text, a.Verdict)
		}
		if a.Verdict == Reported {
			reported++
		}
		if b.Verdict >= Denied && (c.Verdict != b.Verdict || c.Rule.Learn) {
			t.Errorf("%s: %s by %q beside learn; want %s", p.text, c.Verdict, c.Rule.Text, b.Verdict)
		}
	}
	if reported < 60 {
		t.Errorf("%d of %d acts are reported in learn", reported, len(s.probes))
	}
	c, err := Compile(node.Guard{Generation: 1, Policies: both}, CompileFacts{FilesWith: filesForTest, Gateway: offlineGateway})
	if err != nil {
		t.Fatal(err)
	}
	if !c.Learns {
		t.Error("nobody is told that it is in learn")
	}
}

// FuzzPropose: whatever a workload calls its files, the proposal can be held.
func FuzzPropose(f *testing.F) {
	f.Add("/bin/a", "/bin/b", uint16(80), uint8(1))
	f.Add("/a*b/[x]", "...//", uint16(0), uint8(2))
	f.Add("", "\xff\x00", uint16(65535), uint8(3))
	f.Fuzz(func(t *testing.T, what, by string, port uint16, n uint8) {
		var facts []Fact
		for _, kind := range []Kind{FactProgram, FactForeign, FactMemory, FactPreload, FactShell, FactScript, FactInline, FactRead, FactWrite, FactConnect, FactName, FactListen, FactOperation, FactCapability} {
			facts = append(facts, Fact{Kind: kind, What: what, By: by, Count: 1})
			for i := range min(n, 20) {
				facts = append(facts, Fact{Kind: kind, What: fmt.Sprintf("%s/%d", what, i), By: by, Count: 1})
			}
		}
		facts = append(facts, Fact{Kind: FactListen, What: fmt.Sprint(port)}, Fact{Kind: FactConnect, What: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port).String()},
			Fact{Kind: FactName, What: what, By: "10.0.0.1"})
		p := Propose(Join(Observation{Facts: facts}), ProposeFacts{})
		if _, err := Compile(node.Guard{Generation: 1, Policies: []node.NamedGuardPolicy{{Name: "p", Spec: p.Spec}}}, CompileFacts{}); err != nil {
			t.Fatal(err)
		}
		raw, err := json.Marshal(p.Spec)
		var again spec.GuardPolicy
		if err == nil {
			err = json.Unmarshal(raw, &again)
		}
		if err != nil || (again.Net.Egress == nil) != (p.Spec.Net.Egress == nil) || (again.Exec.Allow == nil) != (p.Spec.Exec.Allow == nil) {
			t.Fatalf("it does not survive its way: %v", err)
		}
	})
}
