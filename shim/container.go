package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/image"
	"hauberk.dev/shim/oci"
	"hauberk.dev/vm"
)

const (
	// lastWords bounds how long a container's end waits for its output to be
	// read and for the ends of what else ran in it.
	lastWords = 5 * time.Second
	// mercy is how long a guest may take to kill what it was told to; then
	// the machine goes.
	mercy = 10 * time.Second
	// maxExecs leaves room in the guest's table of processes.
	maxExecs = guestproto.MaxProcesses - 1
)

// container is one of a pod.
type container struct {
	id     string
	bundle string
	names  streams
	role   role
	log    *slog.Logger
	exited func(*container, *running, exit)
	made   chan struct{} // closed when create has ended
	err    error         // of create; read after made

	pod   *pod
	box   *box        // nil of a pause
	conf  *oci.Config // nil of a pause
	first *running
	stand *standIn      // of one of several; nil if the pod's machine stands for it
	root  int           // its slot, -1 if it has none
	ended chan struct{} // closed when nothing of it runs any more

	oomKills atomic.Uint32 // by the guest's kernel, so far

	pausing sync.Mutex // held while it is paused or resumed

	mu     sync.Mutex
	execs  map[string]*running
	paused bool
	limits limits
}

// limits are what a container may use, as its statistics say.
type limits struct {
	memory uint64 // bytes; 0: none
	pids   uint32 // 0: none
}

// note takes over what of a change of limits statistics show.
func (l *limits) note(r guestproto.Resources) {
	switch {
	case r.MemoryMax == guestproto.Unlimited:
		l.memory = 0
	case r.MemoryMax != 0:
		l.memory = r.MemoryMax
	}
	switch {
	case r.PidsMax == guestproto.UnlimitedPids:
		l.pids = 0
	case r.PidsMax != 0:
		l.pids = r.PidsMax
	}
}

// allowed gives the limits as they are now.
func (c *container) allowed() limits {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.limits
}

// pause says whether it is the CRI's pause container: it holds the pod, and
// nothing of it is in the guest.
func (c *container) pause() bool { return c.role == roleSandbox }

// upperShare of the guest's memory may be written to a root.
const upperShare = 4

// pid stands for the container and all its processes: the host knows no other.
func (c *container) pid() uint32 {
	if c.stand != nil {
		return c.stand.pid
	}
	return c.pod.pid()
}

// make makes the container in its pod up to its first exec.
func (c *container) make(ctx context.Context, img image.Image, f oci.Facts) (err error) {
	p := c.pod
	create, volumes, err := c.conf.Create(f)
	if err != nil {
		return invalid(err)
	}
	if c.box, err = p.enter(ctx, volumes); err != nil {
		return err
	}
	if c.root, err = c.box.attach(ctx, c.id, img); err != nil {
		c.root = -1
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.remove(context.WithoutCancel(ctx)))
		}
	}()
	if c.conf.Privileged() {
		if err := p.relax(ctx, c.box); err != nil {
			return err
		}
	}
	if err := p.pins.set(c.id, c.conf.CPUs(), c.box.machine.PID()); err != nil {
		return err
	}
	create.Root = uint8(c.root)
	if err := c.box.volumes.Add(ctx, c.id, &create, volumes); err != nil {
		return err
	}
	create.Program.TTY = c.names.Terminal
	create.Sysctls = slices.Concat(p.sysctls, create.Sysctls)
	for _, f := range p.files {
		if !slices.ContainsFunc(create.Mounts, func(m guestproto.Mount) bool { return m.Target == f.Path }) {
			create.Files = append(create.Files, f)
		}
	}
	if create.Hostname == "" {
		create.Hostname = p.hostname
	}
	c.limits.note(create.Resources)
	mount := guestproto.MountRoot{
		Root: create.Root, Serial: string(vm.ReadOnlySlot(c.root)), UpperBytes: uint64(p.size.MemoryMiB) << 20 / upperShare,
	}
	if _, err := c.box.channel.MountRoot(ctx, mount); err != nil {
		return err
	}
	guest, err := c.box.channel.Create(ctx, create)
	if err != nil {
		return err
	}
	c.first.setProcess(guest)
	return nil
}

// remove takes the container out of a pod that goes on. It can be called
// again.
func (c *container) remove(ctx context.Context) error {
	if c.root < 0 {
		return nil
	}
	c.unpin()
	select {
	case <-c.box.machine.Done():
		c.root = -1 // all is gone
		return nil
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, cleanup)
	defer cancel()
	if g := c.first.process(); g != nil {
		if err := g.Forget(ctx); err != nil {
			return fmt.Errorf("remove container %q: %w", c.id, err)
		}
		c.first.setProcess(nil)
	}
	if err := c.unmount(ctx); err != nil {
		return fmt.Errorf("remove container %q: %w", c.id, err)
	}
	err := c.box.volumes.Remove(ctx, c.id)
	if err = errors.Join(err, c.box.detach(ctx, vm.ReadOnlySlot(c.root))); err != nil {
		return fmt.Errorf("remove container %q: %w", c.id, err)
	}
	c.root = -1
	return nil
}

// unmountRest is how long the guest's kernel is given between two tries.
const unmountRest = 20 * time.Millisecond

// unmount gives the root up, once the kernel does: what a container ran may
// take a moment to be gone.
func (c *container) unmount(ctx context.Context) error {
	for {
		err := c.box.channel.UnmountRoot(ctx, uint8(c.root))
		if errors.Is(err, syscall.ENOENT) { // it was not mounted
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(unmountRest):
		}
	}
}

// update changes the container's limits. Those of a pause are nobody's.
func (c *container) update(ctx context.Context, want guestproto.Resources) error {
	g := c.first.process()
	if g == nil {
		return nil
	}
	if err := g.Update(ctx, want); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limits.note(want)
	return nil
}

// watch waits for the end of a process and tells of it.
func (c *container) watch(r *running, p *vm.Process) {
	status := lostStatus
	if st, err := p.Wait(context.Background()); err == nil {
		status = st.Code
	} else {
		c.log.Debug("machine is gone", "container", c.id, "exec", r.id, "err", err, "machine", c.box.machine.Err())
	}
	c.finish(r, status)
}

// watchPause waits for the end of the machine, which is a pause's own if
// nobody kills it before.
func (c *container) watchPause() {
	select {
	case <-c.pod.done:
		c.finish(c.first, lostStatus)
	case <-c.first.done:
	}
}

// finish notes and tells the end of a process; if it is the first, after those
// of the container's other processes and after its output: whoever hears of the
// end may stop reading. With what holds the pod, the pod ends.
func (c *container) finish(r *running, status int) {
	if r == c.first {
		c.lastExecs()
		c.collect()
		r.io.drain(lastWords)
	}
	r.announcing.Lock()
	first := r.finish(status)
	if first {
		_, status, at := r.state()
		c.exited(c, r, exit{status, at})
	}
	r.announcing.Unlock()
	if !first || r != c.first {
		return
	}
	if c.role != roleMember {
		if err := c.pod.end(); err != nil {
			c.log.Error("end machine", "err", err)
		}
	}
	c.unpin()
	c.leave()
	close(c.ended)
}

// unpin lets the machine off what only this container wanted of processors.
func (c *container) unpin() {
	if c.pause() {
		return
	}
	if err := c.pod.pins.drop(c.id, c.box.machine.PID()); err != nil {
		c.log.Debug("let machine off processors", "container", c.id, "err", err) // it is about to end
	}
}

// leave gives up what stands for the container on this host.
func (c *container) leave() {
	if c.stand != nil {
		c.stand.stop()
	}
}

// collect brings back what the container wrote for the host. It comes before
// the container's end is told, for that is when it is read.
func (c *container) collect() {
	if c.pause() || c.box.stopping.Load() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), lastWords)
	defer cancel()
	if err := c.box.volumes.Collect(ctx, c.id); err != nil {
		c.log.Warn("collect files", "container", c.id, "err", err)
	}
}

// lastExecs waits for what else ran in the container: its end comes first.
func (c *container) lastExecs() {
	late := time.After(lastWords)
	c.mu.Lock()
	var open []*running
	for _, r := range c.execs {
		if p, _, _ := r.state(); p == phaseRunning {
			open = append(open, r)
		}
	}
	c.mu.Unlock()
	for _, r := range open {
		select {
		case <-r.done:
		case <-late:
			return
		}
	}
}

var (
	errNotCreated = errors.New("it was started before")
	errPaused     = errors.New("the container is paused")
	errNoExec     = errors.New("nothing can run in a pod's pause container: it is not in the guest")
)

// start starts a process and tells of it by told.
func (c *container) start(ctx context.Context, r *running, told func()) error {
	r.announcing.Lock()
	defer r.announcing.Unlock()
	if p, _, _ := r.state(); p != phaseCreated {
		return errNotCreated
	}
	if c.isPaused() {
		return errPaused
	}
	switch {
	case r == c.first && c.pause():
	case r == c.first:
		if err := r.process().Start(ctx); err != nil {
			return err // its end was heard of
		}
	default:
		if err := c.exec(ctx, r); err != nil {
			r.io.close()
			r.finish(notRun(err))
			return err
		}
	}
	r.started()
	told()
	return nil
}

// exec starts one more process in the container.
func (c *container) exec(ctx context.Context, r *running) error {
	if err := r.io.open(ctx); err != nil {
		return err
	}
	p, err := c.box.channel.Exec(ctx, c.first.process(), r.program)
	if err != nil {
		return err
	}
	r.setProcess(p)
	r.io.run(p)
	go c.watch(r, p)
	return nil
}

// add notes an exec that is to be started.
func (c *container) add(r *running) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.execs[r.id]; ok {
		return status.Errorf(codes.AlreadyExists, "exec %q in %q is there", r.id, c.id)
	}
	if len(c.execs) >= maxExecs {
		return status.Errorf(codes.ResourceExhausted, "exec in %q: %d are there", c.id, len(c.execs))
	}
	c.execs[r.id] = r
	return nil
}

// drop forgets an exec.
func (c *container) drop(exec string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, exec)
}

// kill signals a process, or all of the container. What a guest does not do in
// time is done to its machine.
func (c *container) kill(ctx context.Context, r *running, s syscall.Signal, all bool) error {
	if c.pause() {
		c.killPause(s)
		return nil
	}
	fatal := s == syscall.SIGKILL && (r == c.first || all)
	p := r.process()
	if p == nil {
		return errors.New("it was not started")
	}
	signal := p.Signal
	if all {
		signal = p.SignalAll
	}
	if !fatal {
		return signal(ctx, s)
	}
	bounded, cancel := context.WithTimeout(ctx, mercy)
	defer cancel()
	if err := signal(bounded, s); err != nil {
		c.log.Warn("guest does not kill", "container", c.id, "err", err)
		return c.box.machine.Kill(ctx)
	}
	go c.insist()
	return nil
}

// killPause does what the pause program does with a signal.
func (c *container) killPause(s syscall.Signal) {
	switch s {
	case syscall.SIGKILL:
		go c.finish(c.first, lostStatus)
	case syscall.SIGINT, syscall.SIGTERM:
		if ph, _, _ := c.first.state(); ph == phaseRunning {
			go c.finish(c.first, 0)
		}
	}
}

// insist kills the machine if the guest does not end the container.
func (c *container) insist() {
	select {
	case <-c.first.done:
	case <-time.After(mercy):
		c.log.Error("guest does not kill in time", "container", c.id)
		if err := c.pod.end(); err != nil {
			c.log.Error("end machine", "err", err)
		}
	}
}

// freeze stops the container's processes, or lets them go on.
func (c *container) freeze(ctx context.Context, frozen bool) error {
	c.pausing.Lock()
	defer c.pausing.Unlock()
	if g := c.first.process(); g != nil { // a pause has none, and nothing to stop
		act := g.Thaw
		if frozen {
			act = g.Freeze
		}
		if err := act(ctx); err != nil {
			return err
		}
	}
	c.mu.Lock()
	c.paused = frozen
	c.mu.Unlock()
	return nil
}

func (c *container) isPaused() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.paused
}

// find gives the container's first process, or an exec.
func (c *container) find(exec string) (*running, bool) {
	if exec == "" {
		return c.first, true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.execs[exec]
	return r, ok
}

// close ends all copying of the container's streams.
func (c *container) close() {
	if c.first != nil {
		c.first.io.close()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.execs {
		r.io.close()
	}
}

// created is the event of a container that is made.
func (c *container) created(rootfs []*types.Mount) *events.TaskCreate {
	return &events.TaskCreate{
		ContainerID: c.id, Bundle: c.bundle, Pid: c.pid(), Rootfs: rootfs,
		IO: &events.TaskIO{Stdin: c.names.Stdin, Stdout: c.names.Stdout, Stderr: c.names.Stderr, Terminal: c.names.Terminal},
	}
}
