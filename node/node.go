// Package node is the privileged agent of one machine: its parts, listed and
// wired.
//
// It makes true what the control plane asks of this machine: boots sandboxes
// from measured parts, gives them a network that leads only into the mesh,
// tells their Guards what to enforce, proves what it did, and freezes what
// broke a rule without asking anybody first. It decides no policy and signs no
// identity.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/evidence"
	"hauberk.dev/guard/trail"
	"hauberk.dev/internal/run"
	"hauberk.dev/plan"
)

// Config of a node.
type Config struct {
	// State is the folder of what survives: journal, images, artefacts, keys.
	// Run is the folder of sockets, machines and namespaces.
	State, Run string
	// Name of the node in its trust domain.
	Name string
	// Join is the socket on which the control plane admits a node.
	Join string
	// Control, Door and Gateway are host:port addresses.
	Control, Door, Gateway string
	// MeshLink is the socket of hauberk-mesh.
	MeshLink string
	// GuestAgent and Kernel are files; empty means the default.
	GuestAgent, Kernel string
	// Spares is how many machines are kept ahead of demand, of each of the two
	// sizes that were asked for last.
	Spares int
	// KeepSandboxes leaves them running when the node stops.
	KeepSandboxes bool
	// WithoutGuard boots sandboxes without the Guard, and says so everywhere.
	WithoutGuard bool
	Log          io.Writer
}

// Node is the agent of a machine.
type Node struct {
	conf    Config
	slog    *slog.Logger
	journal *journal
	guests  *guests // template and machines
	mesh    *meshPart
	uplink  *uplink
	signer  *evidence.KeySigner
	keys    *credential
	slots   chan struct{} // launches at once
	keep    chan struct{} // closed to leave sandboxes running
	news    chan struct{}
	reports chan wire.Report
	learnt  chan wire.Learnt
	metrics trail.Metrics
	views   viewCounts
	alarms  chan wire.Report // critical ones, which no flood of others may hold up

	mu     sync.Mutex
	actors map[string]*actor
	order  wire.Desired
	epoch  plan.Epoch
	closed bool
	wg     sync.WaitGroup
}

// Open prepares a node: it joins the control plane, prepares the kernel, and
// reads the journal. It runs nothing until Run.
func Open(ctx context.Context, c Config) (*Node, error) {
	if c.Spares < 0 || c.Spares > MaxSpares {
		return nil, fmt.Errorf("open node: %d spare machines: want 0 to %d", c.Spares, MaxSpares)
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("open node: user %d may not make namespaces: run hauberk-node as root", os.Geteuid())
	}
	n := &Node{
		conf: c, slog: slog.New(slog.NewTextHandler(c.Log, nil)),
		slots: make(chan struct{}, max(1, runtime.NumCPU())), keep: make(chan struct{}),
		news: make(chan struct{}, 1), reports: make(chan wire.Report, 1024), learnt: make(chan wire.Learnt, 16), alarms: make(chan wire.Report, 256), actors: map[string]*actor{},
	}
	for _, dir := range []string{c.State, c.Run} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("open node: %w", err)
		}
	}
	var err error
	if n.journal, err = openJournal(filepath.Join(c.State, "instances")); err != nil {
		return nil, err
	}
	if n.keys, err = join(ctx, c); err != nil {
		return nil, err
	}
	if n.signer, err = evidence.NewSigner(n.keys.key, "node "+c.Name); err != nil {
		return nil, err
	}
	n.uplink = newUplink(c.Control, n.keys.clientTLS())
	n.mesh = newMeshPart(n)
	if n.guests, err = openGuests(ctx, n); err != nil {
		return nil, err
	}
	return n, nil
}

// Run serves until ctx ends, then stops every sandbox, or leaves them if the
// node is told to keep them. It leaves them too when a part of the node failed:
// that is the node's fault and not the workloads'.
func (n *Node) Run(ctx context.Context) error {
	adopted, err := n.adopt(ctx)
	if err != nil {
		return err
	}
	if adopted == 0 {
		if err := n.guests.warm(ctx); err != nil {
			return err
		}
	}
	n.slog.Info("node is up", "name", n.conf.Name, "accelerator", n.guests.accelerator(), "adopted", adopted)
	err = run.All(ctx,
		run.Task{Name: "watch", Run: n.watchLoop},
		run.Task{Name: "status", Run: n.statusLoop},
		run.Task{Name: "reports", Run: func(ctx context.Context) error { return n.reportLoop(ctx, n.reports) }},
		run.Task{Name: "alarms", Run: func(ctx context.Context) error { return n.reportLoop(ctx, n.alarms) }},
		run.Task{Name: "learnt", Run: n.learntLoop},
		run.Task{Name: "mesh", Run: n.mesh.run},
		run.Task{Name: "door", Run: n.serveDoor},
		run.Task{Name: "metrics", Run: n.serveMetrics},
		run.Task{Name: "renew", Run: n.keys.renewLoop},
		run.Task{Name: "bypass", Run: n.bypassLoop},
		run.Task{Name: "views", Run: n.viewsLoop},
		run.Task{Name: "template", Run: n.makeTemplate},
		run.Task{Name: "spares", Run: n.guests.spares.Run},
	)
	n.shutdown(n.conf.KeepSandboxes || err != nil)
	return errors.Join(err, n.guests.Close())
}

// makeTemplate makes the first template while what was adopted is looked after.
// One that was not made is made again at the next launch, which then tells why.
func (n *Node) makeTemplate(ctx context.Context) error {
	if err := n.guests.warm(ctx); err != nil {
		n.note(err)
	}
	n.guests.spares.Want(n.guests.templateSpec(standard))
	<-ctx.Done()
	return nil
}

// adopt takes over what an earlier process left, and removes what nobody owns.
func (n *Node) adopt(ctx context.Context) (int, error) {
	left, err := n.journal.all()
	if err != nil {
		return 0, err
	}
	for _, e := range left {
		alive := e.Boot == n.journal.boot
		if !alive && !e.Contained {
			e.Phase = wire.PhasePending // makes start refuse it as interrupted
		}
		n.startActor(ctx, e, true)
	}
	return len(left), n.guests.sweep(left)
}

func (n *Node) startActor(ctx context.Context, e entry, adopt bool) {
	a := newActor(n, e, n.guests.newBody(e.Instance.ID))
	if a.frozen = e.Contained; a.frozen {
		close(a.ice)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed || n.actors[e.Instance.ID] != nil {
		return
	}
	n.actors[e.Instance.ID] = a
	n.wg.Go(func() {
		a.run(context.WithoutCancel(ctx), adopt)
		n.mu.Lock()
		delete(n.actors, e.Instance.ID)
		n.mu.Unlock()
		n.said()
	})
}

// launchSlot bounds how many sandboxes start at once.
func (n *Node) launchSlot(ctx context.Context, stop <-chan struct{}) (func(), error) {
	select {
	case n.slots <- struct{}{}:
		return func() { <-n.slots }, nil
	case <-stop:
		return nil, errStopped
	case <-ctx.Done():
		return nil, errStopped
	}
}

// watchLoop follows the control plane's orders and reconnects for ever.
func (n *Node) watchLoop(ctx context.Context) error {
	pause := 50 * time.Millisecond
	for {
		began := time.Now()
		err := n.uplink.watch(ctx, n.hello(), func(d wire.Desired) { n.apply(ctx, d) })
		if ctx.Err() != nil {
			return nil
		}
		n.note(fmt.Errorf("follow the control plane: %w", err))
		if time.Since(began) > time.Minute {
			pause = 50 * time.Millisecond
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, 2*time.Second)
	}
}

func (n *Node) hello() wire.Hello {
	return wire.Hello{Version: wire.Version, Node: n.conf.Name, Door: n.conf.Door, Gateway: n.conf.Gateway,
		Accelerator: n.guests.accelerator(), Measurement: n.guests.measurement, Guest: n.guests.facts()}
}

// apply makes a new order true: revocations first, then the end of what is
// not wanted, then everything else.
func (n *Node) apply(ctx context.Context, d wire.Desired) {
	n.mu.Lock()
	if d.Epoch.Number < n.epoch.Number {
		n.mu.Unlock()
		n.note(fmt.Errorf("apply orders: epoch %d is older than %d in force: refused", d.Epoch.Number, n.epoch.Number))
		return // restarting the node accepts a control plane that lost its ledger
	}
	fresh := d.Epoch.Number > n.epoch.Number
	n.epoch, n.order = d.Epoch, d
	wanted := map[string]wire.Instance{}
	for _, i := range d.Instances {
		wanted[i.ID] = i
	}
	running := make([]*actor, 0, len(n.actors))
	for _, a := range n.actors {
		running = append(running, a)
	}
	n.mu.Unlock()

	if fresh {
		n.enforceEpoch(ctx, d.Epoch, running)
	}
	for _, a := range running {
		i, ok := wanted[a.id]
		if !ok {
			a.end()
			continue
		}
		switch had := a.guardWanted(); {
		case i.Guard.Generation > had:
			a.want(i.Guard)
		case i.Guard.Generation < had:
			a.refuse(i.Guard.Generation, fmt.Errorf("policy generation %d is older than %d, which was asked for before: refused", i.Guard.Generation, had))
		}
		delete(wanted, i.ID)
	}
	n.mesh.setPlan(d.Mesh)
	for _, i := range wanted {
		e := entry{Instance: i, Phase: wire.PhasePending}
		if revokes(d.Epoch, i) { // its machine is gone; another must not take its place
			e.Contained, e.Phase, e.Reason, e.Message = true, wire.PhaseContained, "Contained", fmt.Sprintf("revoked by epoch %d; its machine is gone", d.Epoch.Number)
		}
		if err := n.journal.put(e); err != nil {
			n.note(fmt.Errorf("launch %s: %w", i.ID, err)) // asked again with the next order
			continue
		}
		n.startActor(ctx, e, false)
		if a, ok := n.find(i.ID); ok && e.Contained {
			n.wg.Go(func() { n.hold(ctx, a, d.Epoch) })
		}
	}
}

// enforceEpoch cuts and freezes what a new epoch revokes and gives receipts. It
// returns after the first try; what failed is tried again until it is done.
func (n *Node) enforceEpoch(ctx context.Context, e plan.Epoch, running []*actor) {
	var wg sync.WaitGroup
	first := func(try func() bool) {
		wg.Go(func() {
			if !try() {
				n.wg.Go(func() { insist(ctx, try) })
			}
		})
	}
	first(func() bool {
		if n.currentEpoch().Number > e.Number {
			return true // the receipt of the newer one counts for this one too
		}
		act, err := n.mesh.cut(ctx, e)
		n.receipt(ctx, wire.Receipt{Epoch: e.Number, Point: "mesh", Act: act}, err)
		return err == nil
	})
	for _, a := range running {
		if a.containedBy(e) {
			first(func() bool { return n.tryHold(ctx, a, e) })
		}
	}
	wg.Wait()
}

// hold contains an instance and gives the receipt, however long that takes.
func (n *Node) hold(ctx context.Context, a *actor, e plan.Epoch) {
	insist(ctx, func() bool { return n.tryHold(ctx, a, e) })
}

func (n *Node) tryHold(ctx context.Context, a *actor, e plan.Epoch) bool {
	err := a.contain(ctx, fmt.Sprintf("revoked by epoch %d", e.Number))
	if err == nil && !a.receiptDue() {
		return true
	}
	n.receipt(ctx, wire.Receipt{Epoch: e.Number, Instance: a.id, Point: "sandbox", Act: "paused"}, err)
	return err == nil
}

// insist tries until it succeeds or ctx ends.
func insist(ctx context.Context, try func() bool) {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		if try() {
			return
		}
	}
}

// receipt signs and sends what was done, and tries until it is heard.
func (n *Node) receipt(ctx context.Context, r wire.Receipt, failed error) {
	if failed != nil {
		n.note(fmt.Errorf("epoch %d at %s: %w", r.Epoch, r.Point, failed))
		return // no receipt for what was not done
	}
	r.Node, r.At = n.conf.Name, n.now().UTC()
	signed, err := evidence.SignReceipt(r, n.signer)
	if err != nil {
		n.note(err)
		return
	}
	n.wg.Go(func() {
		for pause := 20 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
			err := n.uplink.call(ctx, wire.PathReceipt, signed, nil)
			if err == nil || ctx.Err() != nil || isRefusal(err) {
				n.note(err)
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
		}
	})
}

func isRefusal(err error) bool {
	var e *wire.Error
	return errors.As(err, &e)
}

// violation contains the instance at once if the violation is critical, and
// tells the control plane in any case.
func (n *Node) violation(a *actor, r wire.Report) {
	r.Instance = a.id
	if r.Observed.IsZero() {
		r.Observed = n.now().UTC()
	}
	to := n.reports
	if critical(r) {
		to = n.alarms
	}
	select {
	case to <- r:
	default:
		n.note(fmt.Errorf("report violation of %s: the control plane does not keep up: %s", r.Instance, r.Rule))
	}
	if critical(r) {
		n.wg.Go(func() {
			err := a.contain(context.Background(), r.Rule+": "+r.Detail)
			for pause := 50 * time.Millisecond; err != nil; pause = min(2*pause, 2*time.Second) {
				n.note(err)
				select {
				case <-a.done:
					return
				case <-time.After(pause):
				}
				err = a.contain(context.Background(), r.Rule+": "+r.Detail)
			}
		})
	}
}

func critical(r wire.Report) bool {
	return r.Severity == "critical" && r.Denied || r.Cause == "bypass"
}

// reportLoop sends violations in order and keeps one until it is heard.
func (n *Node) reportLoop(ctx context.Context, reports <-chan wire.Report) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case r := <-reports:
			for pause := 20 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
				err := n.uplink.call(ctx, wire.PathReport, r, nil)
				if err == nil || isRefusal(err) {
					n.note(err)
					break
				}
				select {
				case <-ctx.Done():
					return nil
				case <-time.After(pause):
				}
			}
		}
	}
}

// said asks for a status to be sent soon.
func (n *Node) said() {
	select {
	case n.news <- struct{}{}:
	default:
	}
}

func (n *Node) statusLoop(ctx context.Context) error {
	tick := time.NewTicker(heartbeatEvery)
	defer tick.Stop()
	for {
		n.note(n.uplink.call(ctx, wire.PathStatus, wire.Status{Node: n.conf.Name, At: n.now().UTC(), Instances: n.statuses(), Spares: n.guests.spare()}, nil))
		select {
		case <-ctx.Done():
			return nil
		case <-n.news:
			time.Sleep(2 * time.Millisecond) // several changes come together
		case <-tick.C:
		}
	}
}

func (n *Node) statuses() []wire.InstanceStatus {
	n.mu.Lock()
	actors := make([]*actor, 0, len(n.actors))
	for _, a := range n.actors {
		actors = append(actors, a)
	}
	n.mu.Unlock()
	all := make([]wire.InstanceStatus, 0, len(actors))
	for _, a := range actors {
		all = append(all, a.status())
	}
	slices.SortFunc(all, func(x, y wire.InstanceStatus) int { return strings.Compare(x.ID, y.ID) })
	return all
}

// find returns the actor of an instance.
func (n *Node) find(id string) (*actor, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	a, ok := n.actors[id]
	return a, ok
}

func (n *Node) currentEpoch() plan.Epoch {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.epoch
}

// ticketKeys are the keys that tickets are signed with, as last told.
func (n *Node) ticketKeys() []evidence.Key {
	n.mu.Lock()
	defer n.mu.Unlock()
	var keys []evidence.Key
	for _, pem := range n.order.TicketKeys {
		k, err := evidence.ParseKey([]byte(pem), "tickets")
		if err != nil {
			n.slog.Warn(fmt.Sprintf("read ticket key: %v", err))
			continue // fewer keys can only refuse more
		}
		keys = append(keys, k)
	}
	return keys
}

// ticket is the newest ticket of an instance; the one it was launched with may
// have been signed again.
func (n *Node) ticket(id string) (json.RawMessage, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, i := range n.order.Instances {
		if i.ID == id {
			return i.Ticket, true
		}
	}
	return nil, false
}

// roots are what identities chain to.
func (n *Node) roots() []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.order.Roots == "" {
		return n.keys.roots()
	}
	return []byte(n.order.Roots)
}

// shutdown ends all instances, or leaves them for the next process.
func (n *Node) shutdown(keep bool) {
	n.mu.Lock()
	n.closed = true
	for _, a := range n.actors {
		if !keep {
			a.end()
		}
	}
	n.mu.Unlock()
	if keep {
		close(n.keep)
	}
	n.wg.Wait()
}

func (n *Node) now() time.Time { return time.Now() }

func (n *Node) note(err error) {
	if err != nil && !errors.Is(err, context.Canceled) {
		n.slog.Warn(err.Error())
	}
}
