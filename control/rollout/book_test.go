package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/spec"
)

// tape is a recorder and contents that a book can be rebuilt from.
type tape struct {
	records  []Record
	contents map[string][]byte
	broken   error
}

func (t *tape) Record(_ context.Context, r Record) error {
	if t.broken != nil {
		return t.broken
	}
	t.records = append(t.records, r)
	return nil
}

func (t *tape) Put(digest string, content []byte) error {
	t.contents[digest] = slices.Clone(content)
	return nil
}

func (t *tape) Read(digest string) ([]byte, error) {
	if c, ok := t.contents[digest]; ok {
		return c, nil
	}
	return nil, errors.New("lost")
}

// house is a book, its tape and its clock.
type house struct {
	*testing.T
	*Book
	tape *tape
	at   time.Time
}

func newHouse(t *testing.T) *house {
	h := &house{T: t, tape: &tape{contents: map[string][]byte{}}, at: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)}
	h.Book = New(h.tape, h.tape, func() time.Time { return h.at })
	return h
}

// again rebuilds the book from what was recorded.
func (h *house) again() *Book {
	h.Helper()
	b := New(h.tape, h.tape, func() time.Time { return h.at })
	for _, r := range h.tape.records {
		if err := b.Replay(r.Kind, r.Body); err != nil {
			h.Fatal(err)
		}
	}
	return b
}

// same checks that a book rebuilt is the book.
func (h *house) same() {
	h.Helper()
	if a, b := show(h.State()), show(h.again().State()); a != b {
		h.Errorf("rebuilt from the records the book is\n%s\nand not\n%s", b, a)
	}
}

func show(s State) string {
	raw, err := json.Marshal(s)
	if err != nil {
		return err.Error()
	}
	for _, p := range s.Policies {
		raw = fmt.Appendf(raw, "%+v %+v", p.Current, p.Past)
	}
	return string(raw)
}

var (
	web   = Name{Namespace: "bank", Name: "web"}
	floor = Name{Name: "floor", Floor: true}
)

func denying(path string) spec.ClusterGuardPolicy {
	return spec.ClusterGuardPolicy{GuardPolicy: spec.GuardPolicy{Files: []spec.GuardFile{{Path: path, Deny: "w"}}}}
}

func (h *house) accept(n Name, object int64, s spec.ClusterGuardPolicy, stages []int32, instances int) {
	h.Helper()
	p := Plan{Stages: stages, Soak: time.Minute, Allowed: 5}
	for i := range instances {
		p.Instances = append(p.Instances, fmt.Sprintf("web-%02d", i))
	}
	if _, err := h.Accept(h.Context(), n, object, s, p); err != nil {
		h.Fatal(err)
	}
}

func (h *house) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
	h.same()
}

// paths are what the policies of an instance protect, by policy.
func paths(s State, i Subject) string {
	var out []string
	for _, p := range s.For(i, spec.GuardPolicy{}) {
		for _, f := range p.Spec.Files {
			out = append(out, p.Name+":"+f.Path+":"+p.Spec.Mode)
		}
	}
	return strings.Join(out, " ")
}

func subject(name string) Subject {
	return Subject{Instance: name, Namespace: "bank", Workload: "web", Node: "n1", Labels: map[string]string{"tier": "front"}, Policies: []string{"web"}}
}

func TestStagesGrow(t *testing.T) {
	h := newHouse(t)
	h.accept(web, 1, denying("/a"), nil, 0)
	h.accept(web, 2, denying("/b"), []int32{10, 50, 100}, 20)
	h.same()
	for n, want := range []int{2, 10, 20} {
		p := h.Policy(web)
		if len(p.Stage.Instances) != want || len(p.Stage.Held) != 20-want || p.Stage.Phase != Applying {
			t.Fatalf("stage %d: %+v", n+1, p.Stage)
		}
		if err := h.Confirm(t.Context(), web, "ann"); !errors.Is(err, ErrPhase) {
			t.Errorf("confirmed while it is applied: %v", err)
		}
		for _, held := range p.Stage.Held {
			if got := paths(h.State(), subject(held)); got != "web:/a:" {
				t.Errorf("%s, which waits, has %s", held, got)
			}
		}
		if got := paths(h.State(), subject(p.Stage.Instances[0])); got != "web:/b:" {
			t.Errorf("stage %d has %s", n+1, got)
		}
		h.must(h.Applied(t.Context(), web))
		h.must(h.Soaked(t.Context(), web))
		if n < 2 {
			h.must(h.Confirm(t.Context(), web, "ann"))
		}
	}
	p := h.Policy(web)
	if p.Stage != nil || p.Current.Number != 2 || len(p.Past) != 1 || paths(h.State(), subject("new")) != "web:/b:" {
		t.Errorf("at the end %+v", p)
	}
	text := h.tape.records[len(h.tape.records)-2].Text
	if !strings.Contains(h.tape.records[4].Text, "ann confirmed stage 1 of 3") || h.tape.records[4].By != "ann" {
		t.Errorf("who confirmed is not recorded: %q, %q", h.tape.records[4].Text, text)
	}
}

func TestNothingWithoutARecord(t *testing.T) {
	h := newHouse(t)
	h.accept(web, 1, denying("/a"), nil, 0)
	h.accept(web, 2, denying("/b"), []int32{50, 100}, 4)
	before := show(h.State())
	h.tape.broken = errors.New("the disk is full")
	for name, act := range map[string]func() error{
		"halt":     func() error { return h.Halt(t.Context(), web, "denials") },
		"abort":    func() error { return h.Abort(t.Context(), web, "ann", "") },
		"rollback": func() error { _, err := h.RollBack(t.Context(), web, 2, "ann", ""); return err },
		"degrade": func() error {
			return h.Degrade(t.Context(), Switch{Scope: ScopeCluster, To: ToOff, By: "ann", Reason: "r", Until: h.at.Add(time.Hour)})
		},
		"accept": func() error { _, err := h.Accept(t.Context(), floor, 1, denying("/c"), Plan{}); return err },
	} {
		if err := act(); !errors.Is(err, h.tape.broken) || show(h.State()) != before {
			t.Errorf("%s without a record: %v", name, err)
		}
	}
}

func TestNumbersNeverGoBack(t *testing.T) {
	h := newHouse(t)
	h.accept(web, 1, denying("/a"), nil, 0)
	h.accept(web, 2, denying("/b"), nil, 0)
	h.accept(web, 3, denying("/c"), []int32{50, 100}, 4)
	h.must(h.Halt(t.Context(), web, "denials"))
	h.must(h.Resume(t.Context(), web, "ann", ""))
	h.must(h.Pause(t.Context(), web, "ann", "lunch"))
	h.must(h.Abort(t.Context(), web, "ann", ""))
	if p := h.Policy(web); p.Current.Number != 2 || p.Last != 3 || p.Rejected != 3 || p.Next != nil {
		t.Errorf("after the abort %+v", p)
	}
	v, err := h.RollBack(t.Context(), web, 3, "ann", "")
	h.must(err)
	if v.Number != 4 || paths(h.State(), subject("x")) != "web:/a:" {
		t.Errorf("rolled back to %+v: %s", v, paths(h.State(), subject("x")))
	}
	h.must(h.Forget(t.Context(), web))
	if _, err := h.RollBack(t.Context(), web, 3, "ann", ""); !errors.Is(err, ErrNone) {
		t.Errorf("rolled back nothing: %v", err)
	}
	h.accept(web, 1, denying("/d"), nil, 0)
	if p := h.Policy(web); p.Current.Number != 5 {
		t.Errorf("made again it has number %d", p.Current.Number)
	}
}

// TestFirstContent: what runs waits for its stage, and what is new does not
// start without.
func TestFirstContent(t *testing.T) {
	h := newHouse(t)
	h.accept(floor, 1, denying("/srv"), []int32{50, 100}, 4)
	s := h.Policy(floor).Stage
	for name, want := range map[string]string{s.Instances[0]: "cluster/floor:/srv:", s.Held[0]: "", "new": "cluster/floor:/srv:"} {
		if got := paths(h.State(), subject(name)); got != want {
			t.Errorf("%s has %q, want %q", name, got, want)
		}
	}
}

func TestFloorHoldsWhateverIsBelowIt(t *testing.T) {
	h := newHouse(t)
	audit := denying("/a")
	audit.Mode = "audit"
	h.accept(web, 1, audit, nil, 0)
	h.accept(floor, 1, denying("/srv"), nil, 0)
	until := h.at.Add(time.Hour)
	for _, c := range []struct {
		over Switch
		want string
	}{
		{Switch{}, "web:/a:audit cluster/floor:/srv:"},
		{Switch{Scope: ScopeInstance, Target: "web-1", To: ToOff}, "cluster/floor:/srv:"},
		{Switch{Scope: ScopeInstance, Target: "web-2", To: ToOff}, "web:/a:audit cluster/floor:/srv:"},
		{Switch{Scope: ScopeWorkload, Target: "bank/web", To: ToOff}, "cluster/floor:/srv:"},
		{Switch{Scope: ScopeNode, Target: "n1", To: ToAudit}, "web:/a:audit cluster/floor:/srv:"},
		{Switch{Scope: ScopeCluster, To: ToAudit}, "web:/a:audit cluster/floor:/srv:audit"},
		{Switch{Scope: ScopeCluster, To: ToOff}, ""},
	} {
		if c.over.Scope != "" {
			c.over.By, c.over.Reason, c.over.Until = "ann", "r", until
			h.must(h.Degrade(t.Context(), c.over))
		}
		if got := paths(h.State(), subject("web-1")); got != c.want {
			t.Errorf("%s %s to %q: %q, want %q", c.over.Scope, c.over.Target, c.over.To, got, c.want)
		}
		if c.over.Scope != "" {
			h.must(h.Restore(t.Context(), c.over.Scope, c.over.Target, "ann", ""))
		}
	}
	bare := subject("web-1")
	bare.Policies = nil
	list := h.State().For(bare, spec.GuardPolicy{Mode: "enforce"})
	if len(list) != 2 || list[0].Name != "baseline" {
		t.Errorf("a floor took the baseline away: %+v", list)
	}
}

func TestSelects(t *testing.T) {
	for name, c := range map[string]struct {
		sel  spec.GuardSelect
		want bool
	}{
		"all":             {spec.GuardSelect{}, true},
		"namespace":       {spec.GuardSelect{Namespaces: []string{"x", "bank"}}, true},
		"other namespace": {spec.GuardSelect{Namespaces: []string{"x"}}, false},
		"labels":          {spec.GuardSelect{WorkloadLabels: map[string]string{"tier": "front"}}, true},
		"other labels":    {spec.GuardSelect{WorkloadLabels: map[string]string{"tier": "back"}}, false},
		"missing label":   {spec.GuardSelect{WorkloadLabels: map[string]string{"team": ""}}, false},
	} {
		if got := Selects(floor, c.sel, subject("w")); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if Selects(Name{Namespace: "other", Name: "web"}, spec.GuardSelect{}, subject("w")) {
		t.Error("a policy of another namespace holds")
	}
}

func TestSwitchesSayEverything(t *testing.T) {
	h := newHouse(t)
	good := Switch{Scope: ScopeNode, Target: "n1", To: ToAudit, By: "ann", Reason: "r", Until: h.at.Add(time.Hour)}
	for name, spoil := range map[string]func(*Switch){
		"no reason": func(s *Switch) { s.Reason = " " }, "no end": func(s *Switch) { s.Until = time.Time{} },
		"past": func(s *Switch) { s.Until = h.at }, "for ever": func(s *Switch) { s.Until = h.at.Add(longest + time.Second) },
		"nobody": func(s *Switch) { s.By = "" }, "scope": func(s *Switch) { s.Scope = "planet" },
		"target": func(s *Switch) { s.Target = "" }, "cluster's target": func(s *Switch) { s.Scope = ScopeCluster },
		"to": func(s *Switch) { s.To = "half" }, "to full": func(s *Switch) { s.To = ToFull },
	} {
		s := good
		spoil(&s)
		if err := h.Degrade(t.Context(), s); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	h.must(h.Degrade(t.Context(), good))
	own := good
	own.To, own.By, own.Scope, own.Target = ToQuiet, "", ScopeInstance, "web-1"
	h.must(h.Degrade(t.Context(), own)) // by itself it only records less
	h.at = h.at.Add(2 * time.Hour)
	if got := h.State().Switches; len(got) != 0 {
		t.Errorf("expired switches lower: %+v", got)
	}
	ended, err := h.Expire(t.Context())
	h.must(err)
	if len(ended) != 2 {
		t.Errorf("ended %+v", ended)
	}
	if err := h.Restore(t.Context(), ScopeNode, "n1", "ann", ""); !errors.Is(err, ErrNone) {
		t.Errorf("restored nothing: %v", err)
	}
}

// TestLostContent: what was in force and is lost is no reason not to start.
func TestLostContent(t *testing.T) {
	h := newHouse(t)
	h.accept(web, 1, denying("/a"), nil, 0)
	clear(h.tape.contents)
	b := h.again()
	if p := b.Policy(web); p.Current != nil || p.Last != 1 {
		t.Errorf("%+v", p)
	}
}

func FuzzReplay(f *testing.F) {
	f.Add(KindPolicy, []byte(`{"name":{"namespace":"bank","name":"web"},"act":"accept","stage":{"percents":[10,100]}}`))
	f.Add(KindPolicy, []byte(`{"act":"complete"}`))
	f.Add(KindDegrade, []byte(`{"scope":"cluster","to":"off"}`))
	f.Fuzz(func(t *testing.T, kind string, body []byte) {
		tp := &tape{contents: map[string][]byte{}}
		b := New(tp, tp, time.Now)
		if b.Replay(kind, body) == nil {
			b.State().For(subject("web-1"), spec.GuardPolicy{})
		}
	})
}
