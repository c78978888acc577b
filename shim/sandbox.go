package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/guard"
	"hauberk.dev/vm"
)

const (
	// lastWords bounds how long a container's end waits for its output and
	// for the ends of what else ran in it.
	lastWords = 5 * time.Second
	// mercy is how long a guest may take to kill what it was told to; then
	// the machine goes.
	mercy = 10 * time.Second
	// lostStatus is the exit status of a process whose machine ended.
	lostStatus = 128 + int(syscall.SIGKILL)
	// notRun is that of an exec whose program could not be run.
	notRun = 127
)

// phase of a process' life.
type phase int

const (
	phaseCreated phase = iota
	phaseRunning
	phaseStopped
)

// running is a process in a sandbox, or one that will be or was.
type running struct {
	container string
	id        string // of an exec; none is the container's first
	program   guestproto.Program
	io        *stdio
	done      chan struct{} // closed when it has ended

	// announcing is held while a process starts, so that its end is told
	// after its start.
	announcing sync.Mutex

	mu     sync.Mutex
	phase  phase
	guest  *vm.Process
	status int
	at     time.Time
}

func (r *running) state() (p phase, status int, at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.phase, r.status, r.at
}

func (r *running) process() *vm.Process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.guest
}

// finish notes the end of a process, once.
func (r *running) finish(status int) (first bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase == phaseStopped {
		return false
	}
	r.phase, r.status, r.at = phaseStopped, status, time.Now()
	close(r.done)
	return true
}

// sandbox is a container and its machine.
type sandbox struct {
	id     string
	bundle string
	names  streams
	size   size
	log    *slog.Logger
	exited func(*sandbox, *running, exit)
	oom    func()        // the guest's kernel killed for want of memory; must not block
	made   chan struct{} // closed when create has ended
	err    error         // of create; read after made

	first   *running
	machine *vm.Machine
	channel *vm.Channel
	policy  guard.Compiled
	ended   chan struct{} // closed when the machine is gone after the end of the first process

	pausing sync.Mutex // held while the machine is paused or resumed

	mu     sync.Mutex
	execs  map[string]*running
	paused bool
}

// exit is how a process ended.
type exit struct {
	status int
	at     time.Time
}

// make makes the machine and, in it, the container up to its first exec.
func (b *sandbox) make(ctx context.Context, g *guests, c configuration, r root, machine string) (err error) {
	img, err := r.pack(ctx, g.conf.images())
	if err != nil {
		return err
	}
	journal := journal{ID: b.id, Machine: machine, Run: g.conf.machines()}
	if err := journal.write(b.bundle); err != nil {
		return err
	}
	if b.machine, err = g.boot(ctx, machine, b.size, img); err != nil {
		return errors.Join(err, removeJournal(b.bundle))
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%w; the guest printed: %s", err, b.machine.Console()), b.end(), removeJournal(b.bundle))
		}
	}()
	if err := b.connect(ctx); err != nil {
		return err
	}
	upper := uint64(b.size.memoryMiB) << 20 / upperShare
	if _, err := b.channel.MountRoot(ctx, guestproto.MountRoot{Serial: string(rootSlot), UpperBytes: upper}); err != nil {
		return err
	}
	if err := b.enforce(ctx); err != nil {
		return err
	}
	p, err := b.channel.Create(ctx, guestproto.Create{
		Hostname: c.Hostname, Resources: guestproto.Resources{MemoryMax: b.size.limit, PidsMax: b.size.pids}, Program: b.first.program,
	})
	if err != nil {
		return err
	}
	b.first.guest = p
	return nil
}

func removeJournal(bundle string) error { return os.Remove(filepath.Join(bundle, journalName)) }

// connect opens the channel to the agent, and makes the guest its own. A guest
// whose Guard is not attached runs nothing.
func (b *sandbox) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	c, hello, err := b.machine.Channel(ctx, b.record)
	if err != nil {
		return err
	}
	b.channel = c
	c.OutOfMemory(func(_, kills uint32) {
		b.log.Warn("out of memory", "container", b.id, "kills", kills)
		b.oom()
	})
	if hello.Guard != guestproto.GuardAttached {
		return fmt.Errorf("boot %s: the Guard is not attached: %q", b.id, hello.GuardText)
	}
	return c.Reseed(ctx, vm.NewSeed(b.machine.ID()))
}

// enforce puts the policy in force.
func (b *sandbox) enforce(ctx context.Context) error {
	reply, err := b.channel.GuardPolicy(ctx, b.policy.Generation, b.policy.Blob)
	if err == nil {
		_, err = guard.DecodeApplied(reply)
	}
	if err != nil {
		return fmt.Errorf("put the Guard's policy in force: %w", err)
	}
	return nil
}

// record logs what the Guard refused.
func (b *sandbox) record(raw []byte) {
	e, err := guard.DecodeEvents(raw)
	if err != nil {
		b.log.Error("event of the Guard", "err", err)
		return
	}
	if e.Verdict == guard.Allowed {
		return
	}
	text := fmt.Sprintf("rule %d", e.Rule)
	if r, ok := b.policy.Rule(e.Rule); ok {
		text = r.String()
	}
	b.log.Warn("guard", "event", e.String(), "rule", text, "sequence", e.Sequence, "lost", e.Lost)
}

// end kills the machine and lets go of the channel.
func (b *sandbox) end() error {
	if b.machine == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanup)
	defer cancel()
	err := b.machine.Kill(ctx)
	if b.channel != nil {
		err = errors.Join(err, b.channel.Close())
	}
	return err
}

// watch waits for the end of a process and tells of it. With the first process
// everything ends.
func (b *sandbox) watch(r *running, p *vm.Process) {
	status := lostStatus
	if st, err := p.Wait(context.Background()); err == nil {
		status = st.Code
	} else {
		b.log.Error("machine is lost", "container", b.id, "exec", r.id, "err", err, "machine", b.machine.Err())
	}
	if r == b.first {
		b.lastExecs()
	}
	r.announcing.Lock()
	if r.finish(status) {
		_, status, at := r.state()
		b.exited(b, r, exit{status, at})
	}
	r.announcing.Unlock()
	if r == b.first {
		ctx, cancel := context.WithTimeout(context.Background(), lastWords)
		r.io.drain(ctx)
		cancel()
		if err := b.end(); err != nil {
			b.log.Error("end machine", "err", err)
		}
		close(b.ended)
	}
}

// lastExecs waits for what else ran in the container: its end comes first.
func (b *sandbox) lastExecs() {
	late := time.After(lastWords)
	b.mu.Lock()
	var open []*running
	for _, r := range b.execs {
		if p, _, _ := r.state(); p == phaseRunning {
			open = append(open, r)
		}
	}
	b.mu.Unlock()
	for _, r := range open {
		select {
		case <-r.done:
		case <-late:
			return
		}
	}
}

// pid stands for every process of the sandbox: the host knows no other.
func (b *sandbox) pid() uint32 { return uint32(b.machine.PID()) }

// start starts a process and tells of it by told.
func (b *sandbox) start(ctx context.Context, r *running, told func()) error {
	r.announcing.Lock()
	defer r.announcing.Unlock()
	if p, _, _ := r.state(); p != phaseCreated {
		return errNotCreated
	}
	if b.isPaused() {
		return errPaused
	}
	if r == b.first {
		if err := r.process().Start(ctx); err != nil {
			return err // its end was heard of
		}
	} else if err := b.exec(ctx, r); err != nil {
		r.io.close()
		r.finish(notRun)
		return err
	}
	r.mu.Lock()
	if r.phase == phaseCreated {
		r.phase = phaseRunning
	}
	r.mu.Unlock()
	told()
	return nil
}

// exec starts one more process in the container.
func (b *sandbox) exec(ctx context.Context, r *running) error {
	if err := r.io.open(ctx); err != nil {
		return err
	}
	p, err := b.channel.Exec(ctx, b.first.process(), r.program)
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.guest = p
	r.mu.Unlock()
	r.io.run(p)
	go b.watch(r, p)
	return nil
}

var (
	errNotCreated = errors.New("it was started before")
	errPaused     = errors.New("the sandbox is paused")
)

// kill signals a process, or all of the container. What a guest does not do in
// time is done to its machine.
func (b *sandbox) kill(ctx context.Context, r *running, s syscall.Signal, all bool) error {
	fatal := s == syscall.SIGKILL && (r == b.first || all)
	if b.isPaused() {
		if fatal {
			return b.machine.Kill(ctx)
		}
		return errPaused
	}
	p := r.process()
	if p == nil {
		return errors.New("it was not started")
	}
	signal := p.Signal
	if all {
		signal = p.SignalAll
	}
	if fatal {
		bounded, cancel := context.WithTimeout(ctx, mercy)
		defer cancel()
		if err := signal(bounded, s); err != nil {
			b.log.Warn("guest does not kill", "err", err)
			return b.machine.Kill(ctx)
		}
		go b.insist()
		return nil
	}
	return signal(ctx, s)
}

// insist kills the machine if the guest does not end.
func (b *sandbox) insist() {
	select {
	case <-b.first.done:
	case <-time.After(mercy):
		ctx, cancel := context.WithTimeout(context.Background(), cleanup)
		defer cancel()
		if err := b.machine.Kill(ctx); err != nil {
			b.log.Error("kill machine", "err", err)
		}
	}
}

// pause freezes the machine, or lets it go on.
func (b *sandbox) pause(ctx context.Context, paused bool) error {
	b.pausing.Lock()
	defer b.pausing.Unlock()
	act := b.machine.Resume
	if paused {
		act = b.machine.Pause
	}
	if err := act(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	b.paused = paused
	b.mu.Unlock()
	return nil
}

func (b *sandbox) isPaused() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.paused
}

// find gives the container's first process, or an exec.
func (b *sandbox) find(exec string) (*running, bool) {
	if exec == "" {
		return b.first, true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	r, ok := b.execs[exec]
	return r, ok
}

// created is the event of a container that is made.
func (b *sandbox) created(rootfs []*types.Mount) *events.TaskCreate {
	return &events.TaskCreate{
		ContainerID: b.id, Bundle: b.bundle, Pid: b.pid(), Rootfs: rootfs,
		IO: &events.TaskIO{Stdin: b.names.Stdin, Stdout: b.names.Stdout, Stderr: b.names.Stderr, Terminal: b.names.Terminal},
	}
}
