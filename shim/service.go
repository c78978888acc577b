package shim

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"slices"
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
	"hauberk.dev/shim/oci"
)

// service answers containerd for the containers of one pod. Its lock is held
// for looking things up, never for a call into a guest: a signal waits for
// nobody.
type service struct {
	args    arguments
	conf    config
	log     *slog.Logger
	events  *publisher
	guests  func(context.Context) (booter, error) // waits until they are ready
	stop    func()                                // ends the process
	release func()                                // removes the socket
	socket  string                                // its path
	claim   *claim                                // nil in tests of the calls alone
	legacy  bool                                  // figures are for containerd on a host of cgroups version 1
	stopped sync.Once

	mu         sync.Mutex
	pod        *pod
	containers map[string]*container
}

// get finds a container that is made.
func (s *service) get(id string) (*container, error) {
	s.mu.Lock()
	c := s.containers[id]
	s.mu.Unlock()
	if c == nil {
		return nil, status.Errorf(codes.NotFound, "container %q is not here", id)
	}
	select {
	case <-c.made:
	default:
		return nil, status.Errorf(codes.FailedPrecondition, "container %q is being made", id)
	}
	if c.err != nil {
		return nil, status.Errorf(codes.NotFound, "container %q could not be made", id)
	}
	return c, nil
}

func (s *service) process(id, exec string) (*container, *running, error) {
	c, err := s.get(id)
	if err != nil {
		return nil, nil, err
	}
	r, ok := c.find(exec)
	if !ok {
		return nil, nil, status.Errorf(codes.NotFound, "process %q of container %q is not here", exec, id)
	}
	return c, r, nil
}

func streamsOf(in, out, err string, terminal bool) streams {
	return streams{Stdin: in, Stdout: out, Stderr: err, Terminal: terminal}
}

// exited tells of the end of a process.
func (s *service) exited(c *container, r *running, e exit) {
	id := r.id
	if id == "" {
		id = r.container
	}
	s.events.publish(&events.TaskExit{
		ContainerID: r.container, ID: id, Pid: c.pid(), ExitStatus: uint32(e.status), ExitedAt: timestamppb.New(e.at),
	})
}

// Start starts the first process, or an exec.
func (s *service) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	err = c.start(ctx, p, func() {
		if r.ExecID == "" {
			s.events.publish(&events.TaskStart{ContainerID: r.ID, Pid: c.pid()})
			return
		}
		s.events.publish(&events.TaskExecStarted{ContainerID: r.ID, ExecID: r.ExecID, Pid: c.pid()})
	})
	if errors.Is(err, errNotCreated) || errors.Is(err, errPaused) {
		return nil, status.Errorf(codes.FailedPrecondition, "start %q %q: %v", r.ID, r.ExecID, err)
	}
	if err != nil {
		return nil, err
	}
	return &task.StartResponse{Pid: c.pid()}, nil
}

// Exec notes a process that is to be started in a container.
func (s *service) Exec(_ context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := s.get(r.ID)
	if err != nil {
		return nil, err
	}
	if c.pause() {
		return nil, status.Errorf(codes.FailedPrecondition, "exec in %q: %v", r.ID, errNoExec)
	}
	if r.ExecID == "" || len(r.ExecID) > maxIdentifier || !identifier.MatchString(r.ExecID) {
		return nil, status.Errorf(codes.InvalidArgument, "exec in %q: exec id %.128q", r.ID, r.ExecID)
	}
	p, err := c.conf.Exec(r.Spec.GetValue())
	if err != nil {
		return nil, invalid(err)
	}
	p.TTY = r.Terminal
	names := streamsOf(r.Stdin, r.Stdout, r.Stderr, r.Terminal)
	if err := c.add(newRunning(r.ID, r.ExecID, p, names)); err != nil {
		return nil, err
	}
	s.events.publish(&events.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
	return &emptypb.Empty{}, nil
}

// Delete forgets what has ended.
func (s *service) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	ph, code, at := p.state()
	if ph == phaseRunning || ph == phaseCreated && r.ExecID == "" {
		return nil, status.Errorf(codes.FailedPrecondition, "delete %q %q: it has not ended", r.ID, r.ExecID)
	}
	out := &task.DeleteResponse{Pid: c.pid(), ExitStatus: uint32(code)}
	if !at.IsZero() {
		out.ExitedAt = timestamppb.New(at)
	}
	if r.ExecID != "" {
		p.io.drain(lastOutput)
		p.io.close()
		c.drop(r.ExecID)
		return out, nil
	}
	if err := s.forget(ctx, c); err != nil {
		return nil, err
	}
	s.events.publish(&events.TaskDelete{ContainerID: r.ID, Pid: out.Pid, ExitStatus: out.ExitStatus, ExitedAt: out.ExitedAt})
	return out, nil
}

// forget removes what is left of a container that ended; with the one that
// holds it, a pod.
func (s *service) forget(ctx context.Context, c *container) error {
	select {
	case <-c.ended:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	err := c.remove(ctx)
	if c.role != roleMember {
		err = c.pod.end() // again, if it failed before
	}
	if err != nil {
		return err
	}
	c.close()
	if err := removeJournal(c.bundle); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.containers, c.id)
	s.mu.Unlock()
	if c.role != roleMember {
		s.dropPod(c.pod)
	}
	return nil
}

// State says how a process is.
func (s *service) State(_ context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	ph, code, at := p.state()
	n := p.io.names
	out := &task.StateResponse{
		ID: c.id, Bundle: c.bundle, Pid: c.pid(), ExecID: r.ExecID, ExitStatus: uint32(code),
		Stdin: n.Stdin, Stdout: n.Stdout, Stderr: n.Stderr, Terminal: n.Terminal,
	}
	switch {
	case ph == phaseStopped:
		out.Status, out.ExitedAt = types.Status_STOPPED, timestamppb.New(at)
	case ph == phaseCreated:
		out.Status = types.Status_CREATED
	case c.isPaused():
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
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Signal > 64 {
		return nil, status.Errorf(codes.InvalidArgument, "kill %q: there is no signal %d", r.ID, r.Signal)
	}
	if ph, _, _ := p.state(); ph == phaseStopped {
		return nil, status.Errorf(codes.NotFound, "kill %q %q: it has ended", r.ID, r.ExecID)
	}
	if err := c.kill(ctx, p, syscall.Signal(r.Signal), r.All); err != nil {
		if errors.Is(err, syscall.ESRCH) {
			return nil, status.Errorf(codes.NotFound, "kill %q %q: it has ended", r.ID, r.ExecID)
		}
		return nil, status.Errorf(codes.FailedPrecondition, "kill %q %q: %v", r.ID, r.ExecID, err)
	}
	return &emptypb.Empty{}, nil
}

// Pause freezes a container; Resume lets it go on.
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
	c, p, err := s.process(id, "")
	if err != nil {
		return err
	}
	if ph, _, _ := p.state(); ph != phaseRunning {
		return status.Errorf(codes.FailedPrecondition, "pause or resume %q: it is not running", id)
	}
	return c.freeze(ctx, paused)
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
	c, err := s.get(r.ID)
	if err != nil {
		return nil, err
	}
	return &task.PidsResponse{Processes: []*types.ProcessInfo{{Pid: c.pid()}}}, nil
}

// Stats gives what a container uses, by its guest's word.
func (s *service) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	c, p, err := s.process(r.ID, "")
	if err != nil {
		return nil, err
	}
	if ph, _, _ := p.state(); ph == phaseStopped {
		// containerd asks when a container was killed, whether for want of memory.
		return &task.StatsResponse{Stats: metrics(guestproto.ContainerStats{OOMKills: c.oomKills.Load()}, c.allowed(), s.legacy)}, nil
	}
	if c.pause() {
		used, err := c.pod.box.Load().usage(ctx)
		if err != nil {
			return nil, err
		}
		return &task.StatsResponse{Stats: metrics(used, limits{}, s.legacy)}, nil
	}
	st, err := c.box.channel.Stats(ctx)
	if err != nil {
		return nil, err
	}
	guest := p.process()
	for _, u := range st.Containers {
		if guest != nil && u.Process == guest.ID() {
			return &task.StatsResponse{Stats: metrics(u, c.allowed(), s.legacy)}, nil
		}
	}
	return nil, status.Errorf(codes.Unavailable, "read statistics of %q: the guest gives none", r.ID)
}

// Update changes the limits of a container.
func (s *service) Update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, p, err := s.process(r.ID, "")
	if err != nil {
		return nil, err
	}
	if ph, _, _ := p.state(); ph == phaseStopped {
		return nil, status.Errorf(codes.FailedPrecondition, "update %q: it has ended", r.ID)
	}
	want, cpus, err := oci.ParseResources(r.Resources.GetTypeUrl(), r.Resources.GetValue())
	if err != nil {
		return nil, invalid(err)
	}
	if len(cpus) > 0 && !c.pause() {
		if err := c.pod.pins.set(c.id, cpus, c.box.machine.PID()); err != nil {
			return nil, err
		}
	}
	if err := c.update(ctx, want); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// Checkpoint is refused.
func (s *service) Checkpoint(_ context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, status.Errorf(codes.Unimplemented, "checkpoint %q: not possible", r.ID)
}

// Connect says which processes stand for shim and container.
func (s *service) Connect(_ context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	out := &task.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: version.String()}
	if c, err := s.get(r.ID); err == nil {
		out.TaskPid = c.pid()
	}
	return out, nil
}

// lastAnswer is how long the answer to the call that ends the shim may take to
// its caller.
const lastAnswer = 20 * time.Millisecond

// Shutdown ends the shim, unless it still has a container or a pod.
func (s *service) Shutdown(_ context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	busy := s.pod != nil || len(s.containers) > 0
	s.mu.Unlock()
	if !busy || r.Now {
		time.AfterFunc(lastAnswer, func() { s.stopped.Do(s.stop) })
	}
	return &emptypb.Empty{}, nil
}

// close ends a pod that is still there when the shim must go.
func (s *service) close() error {
	s.mu.Lock()
	p := s.pod
	containers := slices.Collect(maps.Values(s.containers))
	s.mu.Unlock()
	late := time.After(cleanup)
	var errs []error
	if p != nil {
		select {
		case <-p.made:
			if p.err == nil {
				errs = append(errs, p.end(), removeJournal(p.bundle))
			}
		case <-late:
			return errors.New("end pod: it is being made without end")
		}
	}
	for _, c := range containers {
		select {
		case <-c.made:
			c.close()
			errs = append(errs, removeJournal(c.bundle))
		case <-late:
			return errors.New("end container: it is being made without end")
		}
	}
	return errors.Join(errs...)
}
