package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/plan"
)

const (
	// heartbeatEvery is how often a guest is asked about its Guard. Silence
	// over two of them contains the instance.
	heartbeatEvery = 3 * time.Second
	heartbeatTime  = 2 * time.Second
	// graceTime is how long a workload has between SIGTERM and the end.
	graceTime = 5 * time.Second
	// freezeTime bounds the stop of a machine's processors.
	freezeTime = 2 * time.Second
)

// body is a sandbox as its actor drives it: a machine, its network, its guest.
// Its methods are called by one goroutine at a time, Freeze excepted.
type body interface {
	// Launch starts the workload; Adopt takes over what an earlier process of
	// this node left running. Both tell how far they came by their error.
	Launch(ctx context.Context, i wire.Instance) (launched, error)
	Adopt(ctx context.Context, e entry) error
	// Enforce puts a Guard policy in force without a gap.
	Enforce(ctx context.Context, g wire.Guard) error
	Heartbeat(ctx context.Context) (wire.GuardHeartbeat, error)
	// Exited receives the exit code of the workload, once.
	Exited() <-chan int
	// Died is closed when the machine ended by itself.
	Died() <-chan struct{}
	// Freeze stops every processor of the machine at once.
	Freeze(ctx context.Context) error
	// Stop ends the workload politely, then everything. It is safe at any
	// moment, also before Launch and twice.
	Stop(ctx context.Context, grace time.Duration) error
}

// launched is what Launch says of a success.
type launched struct {
	process uint32
	env     []string
	ready   time.Duration
}

// RefusalError says why an instance may not be launched here; it will not be
// tried again.
type RefusalError struct {
	Reason string
	Err    error
}

func (e *RefusalError) Error() string { return e.Err.Error() }
func (e *RefusalError) Unwrap() error { return e.Err }

// actor runs one instance from its order to its end.
type actor struct {
	n    *Node
	id   string // of the instance
	body body

	guard chan wire.Guard // newest policy wanted; capacity 1
	stop  chan struct{}   // closed when the instance is no longer wanted
	keep  chan struct{}   // closed when the node ends and leaves it running
	once  sync.Once
	done  chan struct{}
	ice   chan struct{} // closed when the instance is to be frozen
	began chan struct{} // closed when the launch or adoption has ended, well or not

	containing sync.Mutex // held by contain, so that a second call waits for the first

	mu        sync.Mutex
	entry     entry
	heartbeat wire.GuardHeartbeat
	serial    string
	frozen    bool   // nothing moves in it any more, or soon
	held      bool   // by this process: it is certain that nothing does
	receipted bool   // this process has given the receipt of its containment
	asked     uint64 // newest policy generation handed to want
	refused   uint64 // policy generation last refused, 0 once another is in force
	why       string // it was refused
}

func newActor(n *Node, e entry, b body) *actor {
	return &actor{n: n, id: e.Instance.ID, body: b, entry: e, guard: make(chan wire.Guard, 1),
		stop: make(chan struct{}), keep: n.keep, done: make(chan struct{}), ice: make(chan struct{}), began: make(chan struct{})}
}

// end says that the instance is no longer wanted.
func (a *actor) end() { a.once.Do(func() { close(a.stop) }) }

// want hands over the newest policy, replacing one not taken yet.
func (a *actor) want(g wire.Guard) {
	a.mu.Lock()
	a.asked = g.Generation
	a.mu.Unlock()
	select {
	case <-a.guard:
	default:
	}
	a.guard <- g
}

// set changes the entry and writes it before anybody can act on the change. If
// it cannot be written it holds nevertheless: a full disk does not make an
// instance run that has ended.
func (a *actor) set(change func(*entry)) error {
	a.mu.Lock()
	change(&a.entry)
	err := a.n.journal.put(a.entry)
	a.mu.Unlock()
	a.n.said()
	return err
}

// status is what the node tells of the instance.
func (a *actor) status() wire.InstanceStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	e := a.entry
	var unsupported []string
	if b, ok := a.body.(interface{ Unsupported() []string }); ok {
		unsupported = b.Unsupported()
	}
	return wire.InstanceStatus{Refused: a.refused, RefusedReason: a.why, Unsupported: unsupported, ID: e.Instance.ID, Phase: e.Phase, Reason: e.Reason, Message: e.Message,
		StartedAt: e.StartedAt, ExitCode: e.ExitCode, ReadyMillis: e.ReadyMillis, Serial: a.serial, Guard: a.heartbeat}
}

// run drives the instance until it is stopped or, for an instance that ended
// by itself, until its end has been heard and it is no longer wanted.
func (a *actor) run(ctx context.Context, adopt bool) {
	defer close(a.done)
	err := a.start(ctx, adopt)
	close(a.began)
	if err == nil {
		err = a.live(ctx)
	}
	select {
	case <-a.keep:
		return // the journal stays; the next process adopts it
	default:
	}
	if err != nil {
		a.n.note(a.fail(err))
		a.n.note(a.clean())
		select {
		case <-a.stop:
		case <-a.keep:
			return
		}
	}
	// What could not be ended stays in the journal, so that it is found again.
	err = a.clean()
	for try := 1; err != nil && try < cleanTries; try++ {
		time.Sleep(cleanPause)
		err = a.clean()
	}
	if err == nil {
		err = a.n.journal.remove(a.id)
	}
	a.n.note(err)
}

// A sandbox that cannot be ended is tried again so often.
const (
	cleanTries = 3
	cleanPause = 300 * time.Millisecond
)

// current is the entry as it is now.
func (a *actor) current() entry {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.entry
}

// start launches or adopts, and gives up when the instance is not wanted any
// more or is contained meanwhile.
func (a *actor) start(ctx context.Context, adopt bool) error {
	e := a.current()
	if !adopt && e.Contained {
		return &RefusalError{"Revoked", fmt.Errorf("launch of %s: it is revoked", a.id)}
	}
	ice := a.ice
	if adopt {
		ice = nil // what is contained is adopted too, and stays frozen
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-a.stop:
		case <-a.keep:
		case <-ice:
		case <-ctx.Done():
		}
		cancel()
	}()
	if adopt {
		if e.Phase != wire.PhaseRunning && e.Phase != wire.PhaseContained {
			return &RefusalError{"Interrupted", fmt.Errorf("launch of %s was interrupted by a restart of the node", a.id)}
		}
		return a.body.Adopt(ctx, e)
	}
	release, err := a.n.launchSlot(ctx, a.stop)
	if err != nil {
		return err
	}
	defer release()
	l, err := a.body.Launch(ctx, e.Instance)
	if err != nil {
		return err
	}
	return a.set(func(e *entry) {
		e.StartedAt, e.Process, e.Env = a.n.now(), l.process, l.env
		if !e.Contained { // it may have been just now
			e.Phase, e.Reason, e.Message = wire.PhaseRunning, "", ""
		}
		e.ReadyMillis = max(1, l.ready.Milliseconds())
	})
}

var errStopped = errors.New("stopped")

// live watches a running instance. It returns nil when the instance is no
// longer wanted, else why it ended.
func (a *actor) live(ctx context.Context) error {
	beat := time.NewTicker(heartbeatEvery)
	defer beat.Stop()
	missed := 0
	a.beat(ctx, &missed)
	for {
		select {
		case <-a.stop:
			return nil
		case <-a.keep:
			return nil
		case g := <-a.guard:
			if a.isFrozen() {
				continue // nothing moves in there; a new policy has no meaning
			}
			if err := a.body.Enforce(ctx, g); err != nil {
				a.refuse(g.Generation, err)
				a.n.violation(a, wire.Report{Severity: spec.SeverityWarning, Cause: "guard", Rule: "policy",
					Detail: fmt.Sprintf("policy generation %d was refused and the one before stays in force: %v", g.Generation, err)})
				continue
			}
			a.n.note(a.set(func(e *entry) { e.Instance.Guard, a.refused, a.why = g, 0, "" }))
			a.beat(ctx, &missed)
		case <-beat.C:
			a.beat(ctx, &missed)
		case code := <-a.body.Exited():
			return a.exited(code)
		case <-a.body.Died():
			return errors.New("the sandbox machine ended by itself; its console log says more")
		case <-ctx.Done():
			return nil
		}
	}
}

// refuse notes that policies were not put in force; what held before holds on.
func (a *actor) refuse(generation uint64, why error) {
	a.n.note(fmt.Errorf("enforce policy on %s: %w", a.id, why))
	a.mu.Lock()
	a.refused, a.why = generation, why.Error()
	a.mu.Unlock()
	a.n.said()
}

// MismatchError is a heartbeat that says another thing is in force than what
// was sent.
type MismatchError struct{ What, Got, Want string }

func (e *MismatchError) Error() string {
	return fmt.Sprintf("the Guard's %s is %s, not %s as it was sent", e.What, e.Got, e.Want)
}

// beat asks the Guard how it is. Two silences in a row are a violation: what
// cannot be heard cannot be believed.
func (a *actor) beat(ctx context.Context, missed *int) {
	if a.isFrozen() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, heartbeatTime)
	defer cancel()
	h, err := a.body.Heartbeat(ctx)
	if err != nil {
		select {
		case <-a.body.Died():
			return
		case <-a.ice:
			return
		default:
		}
		if wrong := (*MismatchError)(nil); errors.As(err, &wrong) {
			a.n.violation(a, wire.Report{Severity: spec.SeverityCritical, Cause: "guard", Rule: "heartbeat", Denied: true, Detail: wrong.Error()})
			return
		}
		if *missed++; *missed == 2 {
			a.n.violation(a, wire.Report{Severity: spec.SeverityCritical, Cause: "guard", Rule: "heartbeat", Denied: true,
				Detail: fmt.Sprintf("the Guard was silent for two heartbeats: %v", err)})
		}
		return
	}
	*missed = 0
	before := a.heard(h)
	if before.Programs > 0 && h.Programs < before.Programs {
		a.n.violation(a, wire.Report{Severity: spec.SeverityCritical, Cause: "guard", Rule: "heartbeat", Denied: true,
			Detail: fmt.Sprintf("%d of %d Guard programs are gone", before.Programs-h.Programs, before.Programs)})
	}
	if before.Generation != h.Generation || before.Lost != h.Lost || before.Programs == 0 {
		a.n.said()
	}
}

// heard notes a heartbeat and returns the one before.
func (a *actor) heard(h wire.GuardHeartbeat) (before wire.GuardHeartbeat) {
	a.mu.Lock()
	defer a.mu.Unlock()
	before, a.heartbeat = a.heartbeat, h
	return before
}

func (a *actor) isFrozen() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.frozen
}

// exitError is the end of a workload by itself.
type exitError struct{ code int }

func (e *exitError) Error() string { return fmt.Sprintf("the workload exited with code %d", e.code) }

func (a *actor) exited(code int) error { return &exitError{code} }

// fail records why the instance ended.
func (a *actor) fail(err error) error {
	if errors.Is(err, errStopped) {
		return nil
	}
	return a.set(func(e *entry) {
		var refused *RefusalError
		var exit *exitError
		switch {
		case e.Contained: // the end of a contained machine changes nothing
		case errors.As(err, &refused):
			e.Phase, e.Reason, e.Message = wire.PhaseRefused, refused.Reason, err.Error()
		case errors.As(err, &exit):
			e.Phase, e.Reason, e.Message, e.ExitCode = wire.PhaseExited, "Exited", err.Error(), &exit.code
		default:
			e.Phase, e.Reason, e.Message = wire.PhaseFailed, "Failed", err.Error()
		}
	})
}

// clean ends everything of the instance, whatever state it is in.
func (a *actor) clean() error {
	ctx, cancel := context.WithTimeout(context.Background(), graceTime+30*time.Second)
	defer cancel()
	a.n.mesh.remove(ctx, a.id)
	grace := graceTime
	if a.isFrozen() {
		grace = 0
	}
	return a.body.Stop(ctx, grace)
}

// contain freezes the machine and cuts its connections, at once and once. The
// journal says so before it happens, so that a restart keeps it frozen. Only
// when it is certain that nothing moves any more is the error nil; until then
// it can be called again.
func (a *actor) contain(ctx context.Context, reason string) error {
	a.containing.Lock()
	defer a.containing.Unlock()
	a.mu.Lock()
	fresh, held := !a.frozen, a.held
	a.frozen = true
	a.mu.Unlock()
	if held {
		return nil
	}
	launching := true
	select {
	case <-a.began:
		launching = false
	default:
	}
	if fresh {
		close(a.ice)
		a.n.note(a.set(func(e *entry) {
			e.Contained, e.Phase, e.Reason, e.Message = true, wire.PhaseContained, "Contained", reason
		}))
	}
	ctx, cancel := context.WithTimeout(ctx, freezeTime)
	defer cancel()
	err := a.freeze(ctx)
	if launching {
		// A launch under way gives up now; what it made meanwhile is frozen too.
		select {
		case <-a.began:
			err = a.freeze(ctx)
		case <-ctx.Done():
			err = errors.Join(err, errors.New("its launch does not end"))
		}
	}
	if err != nil {
		return fmt.Errorf("contain %s: %w", a.id, err)
	}
	a.mu.Lock()
	a.held = true
	a.mu.Unlock()
	return nil
}

// freeze stops the machine and cuts it off, both at once.
func (a *actor) freeze(ctx context.Context) error {
	frozen := make(chan error, 1)
	go func() { frozen <- a.body.Freeze(ctx) }()
	a.n.mesh.remove(ctx, a.id)
	return <-frozen
}

// receiptDue says whether the receipt of the containment is still owed, and notes
// that it is given.
func (a *actor) receiptDue() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.receipted {
		return false
	}
	a.receipted = true
	return true
}

// guardWanted is the policy generation last asked of the Guard.
func (a *actor) guardWanted() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return max(a.entry.Instance.Guard.Generation, a.asked)
}

// containedBy says whether the epoch revokes the instance.
func (a *actor) containedBy(e plan.Epoch) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return revokes(e, a.entry.Instance)
}

func revokes(e plan.Epoch, i wire.Instance) bool {
	return slices.Contains(e.Instances, i.ID) || slices.Contains(e.Identities, i.Identity) || slices.Contains(e.Digests, i.Digest)
}
