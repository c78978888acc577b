package shim

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/runtime/task/v2"
	types "github.com/containerd/containerd/api/types/task"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/version"
)

// service answers containerd. Its lock is held for looking things up, never
// for a call into a guest: a signal waits for nobody.
type service struct {
	args    arguments
	conf    config
	log     *slog.Logger
	events  *publisher
	guests  func(context.Context) (*guests, error) // waits until they are ready
	stop    func()                                 // ends the process
	release func()                                 // removes the socket
	stopped sync.Once

	mu      sync.Mutex
	sandbox *sandbox
}

// get finds a sandbox that is made.
func (s *service) get(id string) (*sandbox, error) {
	s.mu.Lock()
	b := s.sandbox
	s.mu.Unlock()
	if b == nil || b.id != id {
		return nil, status.Errorf(codes.NotFound, "container %q is not here", id)
	}
	select {
	case <-b.made:
	default:
		return nil, status.Errorf(codes.FailedPrecondition, "container %q is being made", id)
	}
	if b.err != nil {
		return nil, status.Errorf(codes.NotFound, "container %q could not be made", id)
	}
	return b, nil
}

func (s *service) process(id, exec string) (*sandbox, *running, error) {
	b, err := s.get(id)
	if err != nil {
		return nil, nil, err
	}
	r, ok := b.find(exec)
	if !ok {
		return nil, nil, status.Errorf(codes.NotFound, "process %q of container %q is not here", exec, id)
	}
	return b, r, nil
}

func streamsOf(in, out, err string, terminal bool) streams {
	return streams{Stdin: in, Stdout: out, Stderr: err, Terminal: terminal}
}

// Create makes a sandbox. Asked again for the same, it answers as before.
func (s *service) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	names := streamsOf(r.Stdin, r.Stdout, r.Stderr, r.Terminal)
	s.mu.Lock()
	if b := s.sandbox; b != nil {
		s.mu.Unlock()
		return again(ctx, b, r, names)
	}
	b := &sandbox{
		id: r.ID, bundle: r.Bundle, names: names, log: s.log, exited: s.exited,
		oom:  func() { s.events.publish(&events.TaskOOM{ContainerID: r.ID}) },
		made: make(chan struct{}), ended: make(chan struct{}), execs: map[string]*running{},
	}
	s.sandbox = b
	s.mu.Unlock()
	b.err = s.create(ctx, b, r)
	if b.err != nil {
		s.mu.Lock()
		s.sandbox = nil // another try is a new one
		s.mu.Unlock()
	}
	close(b.made)
	if b.err != nil {
		return nil, b.err
	}
	return &task.CreateTaskResponse{Pid: b.pid()}, nil
}

// again answers a second call to create.
func again(ctx context.Context, b *sandbox, r *task.CreateTaskRequest, names streams) (*task.CreateTaskResponse, error) {
	if b.id != r.ID {
		return nil, status.Errorf(codes.FailedPrecondition, "create container %q: this sandbox has %q; a pod of more than one container is not supported", r.ID, b.id)
	}
	if b.bundle != r.Bundle || b.names != names {
		return nil, status.Errorf(codes.AlreadyExists, "create container %q: it is there, with other streams or another bundle", r.ID)
	}
	select {
	case <-b.made:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if b.err != nil {
		return nil, b.err
	}
	return &task.CreateTaskResponse{Pid: b.pid()}, nil
}

func (s *service) create(ctx context.Context, b *sandbox, r *task.CreateTaskRequest) error {
	invalid := func(err error) error { return status.Error(codes.InvalidArgument, err.Error()) }
	if r.Checkpoint != "" || r.ParentCheckpoint != "" {
		return status.Error(codes.Unimplemented, "create container: a sandbox cannot be restored from a checkpoint")
	}
	raw, err := readFile(filepath.Join(r.Bundle, "config.json"), maxConfig)
	if err != nil {
		return err
	}
	c, err := parseConfiguration(raw)
	if err != nil {
		return invalid(err)
	}
	o, err := parseOptions(r.Options)
	if err != nil {
		return invalid(err)
	}
	root, err := rootOf(r.Rootfs, c.rootDirectory(r.Bundle))
	if err != nil {
		return invalid(err)
	}
	if c.Hostname == "" {
		c.Hostname = r.ID[:min(len(r.ID), 63)]
	}
	c.Process.Terminal = r.Terminal
	b.size = sizeOf(o, c.Linux)
	if b.policy, err = compilePolicy(c.Annotations); err != nil {
		return invalid(err)
	}
	b.first = &running{container: r.ID, program: c.Process.program(), io: &stdio{names: b.names}, done: make(chan struct{})}
	if err := b.first.io.open(ctx); err != nil {
		b.first.io.close()
		return invalid(err)
	}
	g, err := s.guests(ctx)
	if err == nil {
		err = b.make(ctx, g, c, root, machineID(s.args))
	}
	if err != nil {
		b.first.io.close()
		return err
	}
	b.first.io.run(b.first.guest)
	s.events.publish(b.created(r.Rootfs))
	go b.watch(b.first, b.first.guest)
	return nil
}

// exited tells of the end of a process.
func (s *service) exited(b *sandbox, r *running, e exit) {
	id := r.id
	if id == "" {
		id = r.container
	}
	s.events.publish(&events.TaskExit{
		ContainerID: r.container, ID: id, Pid: b.pid(), ExitStatus: uint32(e.status), ExitedAt: timestamppb.New(e.at),
	})
}

// Start starts the first process, or an exec.
func (s *service) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	b, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	err = b.start(ctx, p, func() {
		if r.ExecID == "" {
			s.events.publish(&events.TaskStart{ContainerID: r.ID, Pid: b.pid()})
			return
		}
		s.events.publish(&events.TaskExecStarted{ContainerID: r.ID, ExecID: r.ExecID, Pid: b.pid()})
	})
	if errors.Is(err, errNotCreated) || errors.Is(err, errPaused) {
		return nil, status.Errorf(codes.FailedPrecondition, "start %q %q: %v", r.ID, r.ExecID, err)
	}
	if err != nil {
		return nil, err
	}
	return &task.StartResponse{Pid: b.pid()}, nil
}

// Exec notes a process that is to be started in a container.
func (s *service) Exec(_ context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	b, err := s.get(r.ID)
	if err != nil {
		return nil, err
	}
	if r.ExecID == "" || len(r.ExecID) > maxIdentifier || !identifier.MatchString(r.ExecID) {
		return nil, status.Errorf(codes.InvalidArgument, "exec in %q: exec id %.128q", r.ID, r.ExecID)
	}
	p, err := parseProcess(r.Spec.GetValue())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	p.Terminal = r.Terminal
	names := streamsOf(r.Stdin, r.Stdout, r.Stderr, r.Terminal)
	run := &running{container: r.ID, id: r.ExecID, program: p.program(), io: &stdio{names: names}, done: make(chan struct{})}
	if err := b.add(run); err != nil {
		return nil, err
	}
	s.events.publish(&events.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
	return &emptypb.Empty{}, nil
}

// maxExecs leaves room in the guest's table of processes.
const maxExecs = guestproto.MaxProcesses - 1

func (b *sandbox) add(r *running) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.execs[r.id]; ok {
		return status.Errorf(codes.AlreadyExists, "exec %q in %q is there", r.id, b.id)
	}
	if len(b.execs) >= maxExecs {
		return status.Errorf(codes.ResourceExhausted, "exec in %q: %d are there", b.id, len(b.execs))
	}
	b.execs[r.id] = r
	return nil
}

// Delete forgets what has ended.
func (s *service) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	b, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	ph, code, at := p.state()
	if ph == phaseRunning || ph == phaseCreated && r.ExecID == "" {
		return nil, status.Errorf(codes.FailedPrecondition, "delete %q %q: it has not ended", r.ID, r.ExecID)
	}
	out := &task.DeleteResponse{Pid: b.pid(), ExitStatus: uint32(code)}
	if !at.IsZero() {
		out.ExitedAt = timestamppb.New(at)
	}
	if r.ExecID != "" {
		p.io.close()
		b.mu.Lock()
		delete(b.execs, r.ExecID)
		b.mu.Unlock()
		return out, nil
	}
	if err := s.forget(ctx, b); err != nil {
		return nil, err
	}
	s.events.publish(&events.TaskDelete{ContainerID: r.ID, Pid: out.Pid, ExitStatus: out.ExitStatus, ExitedAt: out.ExitedAt})
	return out, nil
}

// forget waits for the machine's end and removes what is left of a container.
func (s *service) forget(ctx context.Context, b *sandbox) error {
	select {
	case <-b.ended:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := b.end(); err != nil { // again, if it failed before
		return err
	}
	b.first.io.close()
	b.mu.Lock()
	for _, r := range b.execs {
		r.io.close()
	}
	b.mu.Unlock()
	if err := removeJournal(b.bundle); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	s.mu.Lock()
	s.sandbox = nil
	s.mu.Unlock()
	return nil
}

// State says how a process is.
func (s *service) State(_ context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	b, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	ph, code, at := p.state()
	n := p.io.names
	out := &task.StateResponse{
		ID: b.id, Bundle: b.bundle, Pid: b.pid(), ExecID: r.ExecID, ExitStatus: uint32(code),
		Stdin: n.Stdin, Stdout: n.Stdout, Stderr: n.Stderr, Terminal: n.Terminal,
	}
	switch {
	case ph == phaseStopped:
		out.Status, out.ExitedAt = types.Status_STOPPED, timestamppb.New(at)
	case ph == phaseCreated:
		out.Status = types.Status_CREATED
	case b.isPaused():
		out.Status = types.Status_PAUSED
	default:
		out.Status = types.Status_RUNNING
	}
	return out, nil
}

// Wait waits for the end of a process.
func (s *service) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	_, code, at := p.state()
	return &task.WaitResponse{ExitStatus: uint32(code), ExitedAt: timestamppb.New(at)}, nil
}

// Kill signals a process, or all of a container.
func (s *service) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	b, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Signal > 64 {
		return nil, status.Errorf(codes.InvalidArgument, "kill %q: there is no signal %d", r.ID, r.Signal)
	}
	if ph, _, _ := p.state(); ph == phaseStopped {
		return nil, status.Errorf(codes.NotFound, "kill %q %q: it has ended", r.ID, r.ExecID)
	}
	if err := b.kill(ctx, p, syscall.Signal(r.Signal), r.All); err != nil {
		if errors.Is(err, syscall.ESRCH) {
			return nil, status.Errorf(codes.NotFound, "kill %q %q: it has ended", r.ID, r.ExecID)
		}
		return nil, status.Errorf(codes.FailedPrecondition, "kill %q %q: %v", r.ID, r.ExecID, err)
	}
	return &emptypb.Empty{}, nil
}

// Pause freezes the whole sandbox; Resume lets it go on.
func (s *service) Pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	if err := s.pause(ctx, r.ID, true); err != nil {
		return nil, err
	}
	s.events.publish(&events.TaskPaused{ContainerID: r.ID})
	return &emptypb.Empty{}, nil
}

// Resume is Pause's way back.
func (s *service) Resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	if err := s.pause(ctx, r.ID, false); err != nil {
		return nil, err
	}
	s.events.publish(&events.TaskResumed{ContainerID: r.ID})
	return &emptypb.Empty{}, nil
}

func (s *service) pause(ctx context.Context, id string, paused bool) error {
	b, p, err := s.process(id, "")
	if err != nil {
		return err
	}
	if ph, _, _ := p.state(); ph != phaseRunning {
		return status.Errorf(codes.FailedPrecondition, "pause or resume %q: it is not running", id)
	}
	return b.pause(ctx, paused)
}

// ResizePty sets the size of a terminal.
func (s *service) ResizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Height > 1<<16-1 || r.Width > 1<<16-1 {
		return nil, status.Errorf(codes.InvalidArgument, "resize terminal of %q to %d by %d", r.ID, r.Width, r.Height)
	}
	guest := p.process()
	if guest == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "resize terminal of %q %q: it was not started", r.ID, r.ExecID)
	}
	if err := guest.Resize(ctx, uint16(r.Height), uint16(r.Width)); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// CloseIO ends the input of a process after what is on its way.
func (s *service) CloseIO(_ context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Stdin {
		p.io.endInput()
	}
	return &emptypb.Empty{}, nil
}

// Pids lists what the host knows of a container: its machine.
func (s *service) Pids(_ context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	b, err := s.get(r.ID)
	if err != nil {
		return nil, err
	}
	return &task.PidsResponse{Processes: []*types.ProcessInfo{{Pid: b.pid()}}}, nil
}

// Stats gives what a container uses, by its guest's word.
func (s *service) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	b, p, err := s.process(r.ID, "")
	if err != nil {
		return nil, err
	}
	if ph, _, _ := p.state(); ph == phaseStopped {
		return nil, status.Errorf(codes.FailedPrecondition, "read statistics of %q: it has ended", r.ID)
	}
	if b.isPaused() {
		return nil, status.Errorf(codes.FailedPrecondition, "read statistics of %q: it is paused", r.ID)
	}
	st, err := b.channel.Stats(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range st.Containers {
		if c.Process == p.process().ID() {
			return &task.StatsResponse{Stats: metrics(c, b.size)}, nil
		}
	}
	return nil, status.Errorf(codes.Unavailable, "read statistics of %q: the guest gives none", r.ID)
}

// Update is refused: a machine's size is what it booted with.
func (s *service) Update(_ context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	return nil, status.Errorf(codes.Unimplemented, "update %q: the resources of a running sandbox cannot change", r.ID)
}

// Checkpoint is refused.
func (s *service) Checkpoint(_ context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, status.Errorf(codes.Unimplemented, "checkpoint %q: not possible", r.ID)
}

// Connect says which processes stand for shim and container.
func (s *service) Connect(_ context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	out := &task.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: version.String()}
	if b, err := s.get(r.ID); err == nil {
		out.TaskPid = b.pid()
	}
	return out, nil
}

// Shutdown ends the shim, unless it still has a container.
func (s *service) Shutdown(_ context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	busy := s.sandbox != nil
	s.mu.Unlock()
	if !busy || r.Now {
		s.stopped.Do(s.stop)
	}
	return &emptypb.Empty{}, nil
}

// close ends a sandbox that is still there when the shim must go.
func (s *service) close() error {
	s.mu.Lock()
	b := s.sandbox
	s.mu.Unlock()
	if b == nil {
		return nil
	}
	select {
	case <-b.made:
	case <-time.After(cleanup):
		return errors.New("end sandbox: it is being made without end")
	}
	if b.err != nil {
		return nil
	}
	err := b.end()
	b.first.io.close()
	return errors.Join(err, removeJournal(b.bundle))
}
