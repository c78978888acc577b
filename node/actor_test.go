package node

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/plan"
)

// fakeBody is a sandbox that does what its test says.
type fakeBody struct {
	launch    func(ctx context.Context) error
	adopt     error
	enforce   error
	freezeErr []error // of the first freezes

	mu       sync.Mutex
	beat     wire.GuardHeartbeat
	silent   bool
	wrong    error // of the heartbeat
	enforced []uint64
	stopErr  []error // of the first stops
	stops    int
	freezes  int
	adopted  bool
	exited   chan int
	died     chan struct{}
}

func (b *fakeBody) Launch(ctx context.Context, i wire.Instance) (launched, error) {
	if b.launch != nil {
		if err := b.launch(ctx); err != nil {
			return launched{}, err
		}
	}
	return launched{process: 7, env: []string{"A=b"}, ready: time.Millisecond}, nil
}
func (b *fakeBody) Adopt(context.Context, entry) error { b.adopted = true; return b.adopt }
func (b *fakeBody) Enforce(_ context.Context, g wire.Guard) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.enforce == nil {
		b.enforced = append(b.enforced, g.Generation)
	}
	return b.enforce
}
func (b *fakeBody) Heartbeat(context.Context) (wire.GuardHeartbeat, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.silent {
		return wire.GuardHeartbeat{}, errors.New("no answer")
	}
	if b.wrong != nil {
		return wire.GuardHeartbeat{}, b.wrong
	}
	return b.beat, nil
}
func (b *fakeBody) Exited() <-chan int    { return b.exited }
func (b *fakeBody) Died() <-chan struct{} { return b.died }
func (b *fakeBody) Freeze(context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.freezes++
	return take(&b.freezeErr)
}
func (b *fakeBody) Stop(context.Context, time.Duration) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stops++
	return take(&b.stopErr)
}

func take(errs *[]error) (err error) {
	if len(*errs) > 0 {
		err, *errs = (*errs)[0], (*errs)[1:]
	}
	return err
}

// set changes the body while it is in use.
func (b *fakeBody) set(change func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change()
}

func newFakeNode(t *testing.T) *Node {
	t.Helper()
	j, err := openJournal(filepath.Join(t.TempDir(), "instances"))
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{conf: Config{Name: "n1"}, slog: slog.New(slog.NewTextHandler(io.Discard, nil)), journal: j,
		slots: make(chan struct{}, 1), keep: make(chan struct{}), news: make(chan struct{}, 1),
		reports: make(chan wire.Report, 16), alarms: make(chan wire.Report, 16), actors: map[string]*actor{}}
	n.mesh = newMeshPart(n)
	return n
}

// stage runs one actor on a fake body in a bubble with its own time.
func stage(t *testing.T, e entry, b *fakeBody, adopt bool, play func(n *Node, a *actor)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t)
		b.exited, b.died = make(chan int, 1), make(chan struct{})
		e.Instance.ID = "web-1"
		if err := n.journal.put(e); err != nil {
			t.Fatal(err)
		}
		a := newActor(n, e, b)
		if a.frozen = e.Contained; a.frozen {
			close(a.ice)
		}
		go a.run(t.Context(), adopt)
		synctest.Wait()
		play(n, a)
		a.end()
		<-a.done
		n.wg.Wait()
		select {
		case <-n.keep:
		default:
			if left, err := n.journal.all(); err != nil || len(left) != 0 {
				t.Errorf("the journal still has %+v, %v", left, err)
			}
			if b.stops == 0 {
				t.Error("nothing was taken down")
			}
		}
	})
}

func wantPhase(t *testing.T, a *actor, p wire.Phase, reason string) {
	t.Helper()
	if s := a.status(); s.Phase != p || s.Reason != reason {
		t.Errorf("phase %s, reason %q (%s); want %s, %q", s.Phase, s.Reason, s.Message, p, reason)
	}
}

func TestActorEnds(t *testing.T) {
	gone := errors.New("gone")
	for name, c := range map[string]struct {
		launch func(context.Context) error
		beat   wire.GuardHeartbeat
		play   func(b *fakeBody)
		phase  wire.Phase
		reason string
	}{
		"runs":    {phase: wire.PhaseRunning},
		"refused": {launch: func(context.Context) error { return &RefusalError{"TicketInvalid", gone} }, phase: wire.PhaseRefused, reason: "TicketInvalid"},
		"fails":   {launch: func(context.Context) error { return gone }, phase: wire.PhaseFailed, reason: "Failed"},
		"exits":   {play: func(b *fakeBody) { b.exited <- 3 }, phase: wire.PhaseExited, reason: "Exited"},
		"dies":    {play: func(b *fakeBody) { close(b.died) }, phase: wire.PhaseFailed, reason: "Failed"},
		"one silence": {play: func(b *fakeBody) {
			b.set(func() { b.silent = true })
			time.Sleep(heartbeatEvery + time.Millisecond)
			b.set(func() { b.silent = false })
			time.Sleep(5 * heartbeatEvery)
		}, phase: wire.PhaseRunning},
		"two silences": {play: func(b *fakeBody) {
			b.set(func() { b.silent = true })
			time.Sleep(2*heartbeatEvery + time.Millisecond)
		}, phase: wire.PhaseContained, reason: "Contained"},
		"another policy": {play: func(b *fakeBody) {
			b.set(func() { b.wrong = &MismatchError{"policy", "ab", "cd"} })
			time.Sleep(heartbeatEvery + time.Millisecond)
		}, phase: wire.PhaseContained, reason: "Contained"},
		"programs vanish": {beat: wire.GuardHeartbeat{Programs: 9}, play: func(b *fakeBody) {
			b.set(func() { b.beat.Programs = 8 })
			time.Sleep(heartbeatEvery + time.Millisecond)
		}, phase: wire.PhaseContained, reason: "Contained"},
	} {
		t.Run(name, func(t *testing.T) {
			b := &fakeBody{launch: c.launch, beat: c.beat}
			stage(t, entry{Phase: wire.PhasePending}, b, false, func(n *Node, a *actor) {
				if c.play != nil {
					c.play(b)
				}
				synctest.Wait()
				wantPhase(t, a, c.phase, c.reason)
				if c.phase == wire.PhaseContained && (b.freezes == 0 || len(n.alarms) != 1) {
					t.Errorf("%d freezes, %d alarms", b.freezes, len(n.alarms))
				}
				if s := a.status(); name == "exits" && (s.ExitCode == nil || *s.ExitCode != 3) {
					t.Errorf("exit code %v", s.ExitCode)
				}
			})
		})
	}
}

// TestRefusedPolicyIsTold: what was not put in force is said with the reason,
// until another is; an older one never is.
func TestRefusedPolicyIsTold(t *testing.T) {
	b := &fakeBody{}
	stage(t, entry{Phase: wire.PhasePending, Instance: wire.Instance{Guard: wire.Guard{Generation: 3}}}, b, false, func(n *Node, a *actor) {
		n.actors[a.id] = a
		order := func(generation uint64) wire.InstanceStatus {
			i := a.current().Instance
			i.Guard = wire.Guard{Generation: generation}
			n.apply(t.Context(), wire.Desired{Instances: []wire.Instance{i}})
			synctest.Wait()
			return a.status()
		}
		b.set(func() { b.enforce = errors.New("no such hook") })
		if s := order(4); s.Refused != 4 || s.RefusedReason != "no such hook" {
			t.Errorf("told %+v", s)
		}
		b.set(func() { b.enforce = nil })
		if s := order(5); s.Refused != 0 || s.RefusedReason != "" || len(b.enforced) != 1 {
			t.Errorf("told %+v, enforced %v", s, b.enforced)
		}
		if s := order(2); s.Refused != 2 || !strings.Contains(s.RefusedReason, "older") || len(b.enforced) != 1 {
			t.Errorf("an older generation: %+v, enforced %v", s, b.enforced)
		}
		delete(n.actors, a.id)
	})
}

func TestStoppedWhileLaunching(t *testing.T) {
	b := &fakeBody{launch: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }}
	stage(t, entry{Phase: wire.PhasePending}, b, false, func(*Node, *actor) {}) // its end must end the launch
}

// TestContainedWhileLaunching: whether the launch gives up or has just worked,
// the instance never counts as running and what was made is frozen.
func TestContainedWhileLaunching(t *testing.T) {
	for name, late := range map[string]error{"gives up": context.Canceled, "has worked": nil} {
		t.Run(name, func(t *testing.T) {
			b := &fakeBody{launch: func(ctx context.Context) error { <-ctx.Done(); return late }}
			stage(t, entry{Phase: wire.PhasePending}, b, false, func(n *Node, a *actor) {
				if err := a.contain(context.Background(), "broke a rule"); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				wantPhase(t, a, wire.PhaseContained, "Contained")
				if b.freezes != 2 {
					t.Errorf("%d freezes, want another after the launch ended", b.freezes)
				}
			})
		})
	}
}

// TestNoFalseReceipt: a machine that could not be stopped is tried again, and
// is never said to be contained before it is.
func TestNoFalseReceipt(t *testing.T) {
	b := &fakeBody{freezeErr: []error{errors.New("monitor is busy")}}
	stage(t, entry{Phase: wire.PhasePending}, b, false, func(_ *Node, a *actor) {
		if err := a.contain(context.Background(), "r"); err == nil {
			t.Error("the machine moves on and counts as contained")
		}
		if err := a.contain(context.Background(), "r"); err != nil || b.freezes != 2 {
			t.Errorf("second try: %v after %d freezes", err, b.freezes)
		}
		if err := a.contain(context.Background(), "r"); err != nil || b.freezes != 2 {
			t.Errorf("third: %v after %d freezes", err, b.freezes)
		}
		if !a.receiptDue() || a.receiptDue() {
			t.Error("the receipt is not given exactly once")
		}
	})
}

func TestRefusedPolicyKeepsTheOld(t *testing.T) {
	b := &fakeBody{}
	stage(t, entry{Phase: wire.PhasePending}, b, false, func(n *Node, a *actor) {
		a.want(wire.Guard{Generation: 4})
		synctest.Wait()
		b.set(func() { b.enforce = errors.New("does not fit") })
		a.want(wire.Guard{Generation: 5})
		synctest.Wait()
		if e := a.current(); e.Instance.Guard.Generation != 4 || len(b.enforced) != 1 {
			t.Errorf("generation %d in force, enforced %v", e.Instance.Guard.Generation, b.enforced)
		}
		if r := <-n.reports; r.Severity != spec.SeverityWarning || r.Rule != "policy" {
			t.Errorf("report %+v", r)
		}
		wantPhase(t, a, wire.PhaseRunning, "")
		if a.guardWanted() != 5 {
			t.Error("the refused generation would be tried for ever")
		}
	})
}

func TestKeptAndAdopted(t *testing.T) {
	b := &fakeBody{}
	var kept entry
	stage(t, entry{Phase: wire.PhasePending}, b, false, func(n *Node, a *actor) {
		close(n.keep)
		<-a.done
		left, err := n.journal.all()
		if err != nil || len(left) != 1 || b.stops != 0 {
			t.Fatalf("kept %+v, %v, %d stops", left, err, b.stops)
		}
		kept = left[0]
	})
	if kept.Phase != wire.PhaseRunning || kept.Process != 7 || len(kept.Env) != 1 {
		t.Errorf("kept %+v", kept)
	}
	for name, c := range map[string]struct {
		change func(*entry)
		err    error
		phase  wire.Phase
		reason string
	}{
		"runs on":     {phase: wire.PhaseRunning},
		"is gone":     {err: errors.New("gone"), phase: wire.PhaseFailed, reason: "Failed"},
		"interrupted": {change: func(e *entry) { e.Phase = wire.PhasePending }, phase: wire.PhaseRefused, reason: "Interrupted"},
		"contained": {change: func(e *entry) { e.Phase, e.Reason, e.Contained = wire.PhaseContained, "Contained", true },
			phase: wire.PhaseContained, reason: "Contained"},
		"contained and gone": {change: func(e *entry) { e.Phase, e.Reason, e.Contained = wire.PhaseContained, "Contained", true },
			err: errors.New("gone"), phase: wire.PhaseContained, reason: "Contained"},
	} {
		t.Run(name, func(t *testing.T) {
			e := kept
			if c.change != nil {
				c.change(&e)
			}
			stage(t, e, &fakeBody{adopt: c.err}, true, func(_ *Node, a *actor) { wantPhase(t, a, c.phase, c.reason) })
		})
	}
}

// TestWhatCannotBeEndedStaysInTheJournal: the next process finds it.
func TestWhatCannotBeEndedStaysInTheJournal(t *testing.T) {
	stuck := errors.New("busy")
	for tries, left := range map[int]int{cleanTries - 1: 0, cleanTries: 1} {
		synctest.Test(t, func(t *testing.T) {
			n := newFakeNode(t)
			b := &fakeBody{exited: make(chan int, 1), died: make(chan struct{})}
			for range tries {
				b.stopErr = append(b.stopErr, stuck)
			}
			e := entry{Instance: wire.Instance{ID: "web-1"}, Phase: wire.PhasePending}
			a := newActor(n, e, b)
			go a.run(t.Context(), false)
			synctest.Wait()
			a.end()
			<-a.done
			if all, err := n.journal.all(); err != nil || len(all) != left {
				t.Errorf("after %d failures %d entries are left, want %d; %v", tries, len(all), left, err)
			}
		})
	}
}

// TestFullDiskHidesNothing: the end of an instance is told even if it cannot
// be written.
func TestFullDiskHidesNothing(t *testing.T) {
	b := &fakeBody{}
	stage(t, entry{Phase: wire.PhasePending}, b, false, func(n *Node, a *actor) {
		dir := n.journal.dir
		if err := os.Rename(dir, dir+".away"); err != nil {
			t.Fatal(err)
		}
		if err := a.contain(context.Background(), "r"); err != nil {
			t.Errorf("the journal's trouble kept it from being contained: %v", err)
		}
		wantPhase(t, a, wire.PhaseContained, "Contained")
		if err := os.Rename(dir+".away", dir); err != nil {
			t.Fatal(err)
		}
	})
}

// TestRevokedIsNotLaunchedAgain: a node that lost a contained machine boots no
// other in its place.
func TestRevokedIsNotLaunchedAgain(t *testing.T) {
	i := wire.Instance{ID: "web-1", Identity: "spiffe://d/ns/b/sa/web", Digest: "sha256:1"}
	for _, e := range []plan.Epoch{{Instances: []string{i.ID}}, {Identities: []string{i.Identity}}, {Digests: []string{i.Digest}}} {
		if !revokes(e, i) || revokes(e, wire.Instance{ID: "web-2"}) {
			t.Errorf("epoch %+v", e)
		}
	}
	b := &fakeBody{launch: func(context.Context) error { t.Error("launched"); return nil }}
	stage(t, entry{Phase: wire.PhaseContained, Reason: "Contained", Contained: true}, b, false, func(_ *Node, a *actor) {
		wantPhase(t, a, wire.PhaseContained, "Contained")
		if err := a.contain(context.Background(), "r"); err != nil || !a.receiptDue() {
			t.Errorf("no receipt for it: %v", err)
		}
	})
}

func TestJournal(t *testing.T) {
	n := newFakeNode(t)
	code := 3
	e := entry{Instance: wire.Instance{ID: "web-1", Ticket: []byte(`{}`)}, Phase: wire.PhaseExited, ExitCode: &code, Env: []string{"A=b"}}
	if err := n.journal.put(e); err != nil {
		t.Fatal(err)
	}
	all, err := n.journal.all()
	if err != nil || len(all) != 1 || all[0].Phase != e.Phase || *all[0].ExitCode != 3 || all[0].Boot != n.journal.boot {
		t.Errorf("%+v, %v", all, err)
	}
	for _, id := range []string{"", ".", "..", "../web", "a/b", "/etc/passwd"} {
		if err := n.journal.put(entry{Instance: wire.Instance{ID: id}}); err == nil {
			t.Errorf("an instance called %q was written", id)
		}
	}
	for name, data := range map[string]string{"torn": `{"instance":`, "of another": `{"instance":{"id":"web-9"}}`, "empty": ""} {
		path := n.journal.path("bad")
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := n.journal.all(); err == nil {
			t.Errorf("an entry that is %s was guessed", name)
		}
		if err := n.journal.remove("bad"); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(n.journal.remove("web-1"), n.journal.remove("web-1")); err != nil {
		t.Errorf("remove twice: %v", err)
	}
}
