package contain

import (
	"context"
	"errors"
	"testing"
	"time"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// tape is a Recorder that remembers, and can be told to fail.
type tape struct {
	records []Record
	fail    error
}

func (t *tape) Record(_ context.Context, r Record) error {
	if t.fail != nil {
		return t.fail
	}
	t.records = append(t.records, r)
	return nil
}

func violation(instance string, at time.Time) spec.Incident {
	return spec.Incident{Instance: instance, Workload: "assistant", Application: "helper", Node: "n1",
		Cause: "guard", Rule: "exec origin", Observed: at.Format(time.RFC3339Nano)}
}

func TestIncidentIsContainedWhenEveryPointHasAnswered(t *testing.T) {
	ctx, tp := t.Context(), &tape{}
	b := New(tp)
	seen := time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)
	needs := []Point{{"mesh", "n1"}, {"mesh", "n2"}, {"sandbox", "n1"}}
	in, fresh, err := b.Open(ctx, "bank", violation("a-1", seen), needs)
	if err != nil || !fresh || in.State() != Containing || in.Epoch != 1 {
		t.Fatalf("open: %+v fresh=%v err=%v", in, fresh, err)
	}
	if again, fresh, _ := b.Open(ctx, "bank", violation("a-1", seen), needs); fresh || again.Name != in.Name {
		t.Errorf("second violation of the same instance opened %+v", again)
	}
	for i, p := range needs {
		r := node.Receipt{Epoch: 1, Instance: "a-1", Point: p.Kind, Node: p.Node, Act: "done", At: seen.Add(time.Duration(i+1) * time.Millisecond)}
		complete, err := b.Receipt(ctx, r)
		if err != nil || (len(complete) == 1) != (i == 2) {
			t.Fatalf("receipt %d: complete=%v err=%v", i, complete, err)
		}
		if len(complete) == 1 && complete[0].Elapsed() != 3*time.Millisecond {
			t.Errorf("elapsed %v, want 3ms", complete[0].Elapsed())
		}
		if complete, err := b.Receipt(ctx, r); len(complete) > 0 || err != nil {
			t.Errorf("repeated receipt: complete=%v err=%v", complete, err)
		}
	}
	if _, revoked := b.Revoked("a-1", "", "", ""); !revoked {
		t.Error("the instance is not revoked")
	}
	if _, revoked := b.Revoked("a-2", "", "", ""); revoked {
		t.Error("a neighbour is revoked")
	}
}

func TestReplayRebuildsTheBook(t *testing.T) {
	ctx, tp := t.Context(), &tape{}
	b := New(tp)
	now := time.Now()
	if _, _, err := b.Open(ctx, "bank", violation("a-1", now), []Point{{"mesh", "n1"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Revoke(ctx, "digest", "sha256:00", "leaked"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Receipt(ctx, node.Receipt{Epoch: 1, Point: "mesh", Node: "n1", At: now}); err != nil {
		t.Fatal(err)
	}
	again := New(&tape{})
	for _, r := range tp.records {
		if err := again.Replay(r.Kind, r.Body); err != nil {
			t.Fatal(err)
		}
	}
	if e := again.Epoch(); e.Number != 2 || len(e.Instances) != 1 || len(e.Digests) != 1 {
		t.Errorf("epoch after replay: %+v", e)
	}
	if all := again.Incidents(); len(all) != 1 || all[0].State() != Contained {
		t.Errorf("incidents after replay: %+v", all)
	}
	if _, fresh, err := again.Open(ctx, "bank", violation("a-2", now), nil); err != nil || !fresh || again.Epoch().Number != 3 {
		t.Errorf("epoch after replay and one more: %d, %v", again.Epoch().Number, err)
	}
}

func TestNoRecordNoAct(t *testing.T) {
	full := errors.New("disk full")
	b := New(&tape{fail: full})
	if _, _, err := b.Open(t.Context(), "bank", violation("a-1", time.Now()), nil); !errors.Is(err, full) {
		t.Errorf("open: %v", err)
	}
	if _, err := b.Revoke(t.Context(), "serial", "01", ""); !errors.Is(err, full) {
		t.Errorf("revoke: %v", err)
	}
	if e := b.Epoch(); e.Number != 0 || len(e.Instances)+len(e.Serials) != 0 {
		t.Errorf("something took effect without its record: %+v", e)
	}
}

func TestBadInput(t *testing.T) {
	b := New(&tape{})
	if _, err := b.Receipt(t.Context(), node.Receipt{Epoch: 7}); !errors.Is(err, ErrUnknown) {
		t.Errorf("receipt of the future: %v", err)
	}
	for _, c := range [][2]string{{"colour", "red"}, {"digest", " "}} {
		if _, err := b.Revoke(t.Context(), c[0], c[1], ""); err == nil {
			t.Errorf("revoke %q %q was accepted", c[0], c[1])
		}
	}
	if _, _, err := b.Open(t.Context(), "bank", spec.Incident{}, nil); err == nil {
		t.Error("an incident without an instance was accepted")
	}
}

func TestWatchersHearOfChanges(t *testing.T) {
	b := New(&tape{})
	c, stop := b.Watch()
	for _, name := range []string{"a-1", "a-2"} { // the second must not block
		if _, _, err := b.Open(t.Context(), "bank", violation(name, time.Now()), nil); err != nil {
			t.Fatal(err)
		}
	}
	<-c
	stop()
	if _, _, err := b.Open(t.Context(), "bank", violation("a-3", time.Now()), nil); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c:
		t.Error("heard after stop")
	default:
	}
}

// TestReceiptsAddUp: a node that was away hears of several epochs at once and
// answers for the last; a sandbox answers for itself only.
func TestReceiptsAddUp(t *testing.T) {
	ctx, tp := t.Context(), &tape{}
	b := New(tp)
	now := time.Now().UTC()
	for _, name := range []string{"a-1", "a-2"} {
		if _, _, err := b.Open(ctx, "bank", violation(name, now), []Point{{"sandbox", "n1"}, {"mesh", "n1"}}); err != nil {
			t.Fatal(err)
		}
	}
	at := func(ms int) time.Time { return now.Add(time.Duration(ms) * time.Millisecond) }
	states := func(b *Book) (out [2]State) {
		for n, i := range b.Incidents() {
			out[n] = i.State()
		}
		return out
	}
	for n, c := range []struct {
		r    node.Receipt
		want [2]State
	}{
		{node.Receipt{Epoch: 2, Instance: "a-9", Point: "sandbox", Node: "n1"}, [2]State{Containing, Containing}},
		{node.Receipt{Epoch: 2, Instance: "a-2", Point: "sandbox", Node: "n2"}, [2]State{Containing, Containing}},
		{node.Receipt{Epoch: 1, Instance: "a-2", Point: "sandbox", Node: "n1"}, [2]State{Containing, Containing}},
		{node.Receipt{Epoch: 2, Instance: "a-1", Point: "sandbox", Node: "n1", At: at(90)}, [2]State{Containing, Containing}},
		{node.Receipt{Epoch: 2, Point: "mesh", Node: "n1", At: at(20)}, [2]State{Contained, Containing}},
		{node.Receipt{Epoch: 2, Instance: "a-2", Point: "sandbox", Node: "n1", At: at(30)}, [2]State{Contained, Contained}},
	} {
		if c.r.At.IsZero() {
			c.r.At = at(10)
		}
		if _, err := b.Receipt(ctx, c.r); err != nil || states(b) != c.want {
			t.Errorf("after receipt %d: %v, %v; want %v", n, states(b), err, c.want)
		}
	}
	if ms := b.Incidents()[0].Elapsed().Milliseconds(); ms != 90 {
		t.Errorf("contained after %d ms, want the 90 of the slowest point", ms)
	}
	again := New(&tape{})
	for _, r := range tp.records {
		if err := again.Replay(r.Kind, r.Body); err != nil {
			t.Fatal(err)
		}
	}
	if got := states(again); got != states(b) || again.Incidents()[0].Elapsed() != b.Incidents()[0].Elapsed() {
		t.Errorf("after replay %v", got)
	}
	if _, err := b.Receipt(ctx, node.Receipt{Epoch: 1, Point: "mesh", Node: "n1"}); err == nil {
		t.Error("a receipt that does not say when was accepted")
	}
}

// TestReceiptIsTriedAgainAfterFullDisk: what was not recorded was not heard.
func TestReceiptIsTriedAgainAfterFullDisk(t *testing.T) {
	tp := &tape{}
	b := New(tp)
	if _, _, err := b.Open(t.Context(), "bank", violation("a-1", time.Now()), []Point{{"mesh", "n1"}}); err != nil {
		t.Fatal(err)
	}
	r := node.Receipt{Epoch: 1, Point: "mesh", Node: "n1", At: time.Now()}
	tp.fail = errors.New("disk full")
	if _, err := b.Receipt(t.Context(), r); !errors.Is(err, tp.fail) || b.Incidents()[0].State() != Containing {
		t.Errorf("%v, %v", err, b.Incidents()[0].State())
	}
	tp.fail = nil
	if complete, err := b.Receipt(t.Context(), r); err != nil || len(complete) != 1 {
		t.Errorf("%v, %v", complete, err)
	}
}

func FuzzReplay(f *testing.F) {
	f.Add(KindIncident, []byte(`{"name":"a-1","namespace":"bank","spec":{"instance":"a"},"epoch":1,"needs":[{"kind":"mesh","node":"n1"}]}`))
	f.Add(KindReceipt, []byte(`{"epoch":1,"point":"mesh","node":"n1","act":"cut","at":"2026-11-22T09:00:00Z"}`))
	f.Add(KindRevoke, []byte(`{"epoch":2,"what":"digest","value":"sha256:00"}`))
	f.Fuzz(func(t *testing.T, kind string, body []byte) {
		b := New(&tape{})
		if _, _, err := b.Open(t.Context(), "bank", violation("a-1", time.Now()), []Point{{"mesh", "n1"}}); err != nil {
			t.Fatal(err)
		}
		if b.Replay(kind, body) != nil && b.Epoch().Number != 1 {
			t.Errorf("a record that was refused changed the epoch to %d", b.Epoch().Number)
		}
		if _, revoked := b.Revoked("a-1", "", "", ""); !revoked {
			t.Error("a record took a revocation back")
		}
	})
}
