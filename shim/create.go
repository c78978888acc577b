package shim

import (
	"context"
	"errors"
	"path/filepath"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/runtime/task/v2"

	"hauberk.dev/api/guestproto"
)

// Create makes a container, and its pod if there is none. Asked again for the
// same, it answers as before.
func (s *service) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	names := streamsOf(r.Stdin, r.Stdout, r.Stderr, r.Terminal)
	c, mine := s.enter(r, names)
	if !mine {
		return again(ctx, c, r, names)
	}
	c.err = s.create(ctx, c, r)
	if c.err != nil {
		c.close()
		s.mu.Lock()
		delete(s.containers, r.ID) // another try is a new one
		s.mu.Unlock()
	}
	close(c.made)
	if c.err != nil {
		return nil, c.err
	}
	return &task.CreateTaskResponse{Pid: c.pod.pid()}, nil
}

// enter makes a container known, unless one of its name is.
func (s *service) enter(r *task.CreateTaskRequest, names streams) (c *container, mine bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[r.ID]; c != nil {
		return c, false
	}
	c = &container{
		id: r.ID, bundle: r.Bundle, names: names, log: s.log, exited: s.exited, root: -1,
		made: make(chan struct{}), ended: make(chan struct{}), execs: map[string]*running{},
	}
	s.containers[r.ID] = c
	return c, true
}

// again answers a second call to create.
func again(ctx context.Context, c *container, r *task.CreateTaskRequest, names streams) (*task.CreateTaskResponse, error) {
	if c.bundle != r.Bundle || c.names != names {
		return nil, status.Errorf(codes.AlreadyExists, "create container %q: it is there, with other streams or another bundle", r.ID)
	}
	select {
	case <-c.made:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if c.err != nil {
		return nil, c.err
	}
	return &task.CreateTaskResponse{Pid: c.pod.pid()}, nil
}

// invalid is the answer to a request that cannot be done by anybody.
func invalid(err error) error { return status.Error(codes.InvalidArgument, err.Error()) }

func (s *service) create(ctx context.Context, c *container, r *task.CreateTaskRequest) error {
	if r.Checkpoint != "" || r.ParentCheckpoint != "" {
		return status.Error(codes.Unimplemented, "create container: a sandbox cannot be restored from a checkpoint")
	}
	pod, role, err := readGroup(r.Bundle, r.ID)
	if err == nil && pod != s.args.id {
		err = status.Errorf(codes.FailedPrecondition, "create container %q: it is of pod %q, and this is %q", r.ID, pod, s.args.id)
	}
	if err != nil {
		return err
	}
	raw, err := readFile(filepath.Join(r.Bundle, "config.json"), maxConfig)
	if err != nil {
		return err
	}
	o, err := parseOptions(r.Options)
	if err != nil {
		return invalid(err)
	}
	c.role = role
	if role == roleSandbox {
		err = s.createPause(ctx, c, raw, o)
	} else {
		err = s.createProcess(ctx, c, r, raw, o)
	}
	if err == nil {
		s.events.publish(c.created(r.Rootfs))
	}
	return err
}

// createPause makes a pod for the CRI: a machine, and nothing in it.
func (s *service) createPause(ctx context.Context, c *container, raw []byte, o options) error {
	w, err := parsePodConfiguration(raw, o)
	if err != nil {
		return invalid(err)
	}
	w.id, w.bundle = c.id, c.bundle
	c.first = newRunning(c.id, "", guestproto.Program{}, c.names)
	if c.pod, err = s.openPod(ctx, w); err != nil {
		return err
	}
	go c.watchPause()
	return nil
}

// createProcess makes a container with a process in it.
func (s *service) createProcess(ctx context.Context, c *container, r *task.CreateTaskRequest, raw []byte, o options) error {
	conf, err := parseConfiguration(raw)
	if err != nil {
		return invalid(err)
	}
	root, err := rootOf(r.Rootfs, conf.rootDirectory(r.Bundle))
	if err != nil {
		return invalid(err)
	}
	if conf.Hostname == "" {
		conf.Hostname = s.args.id[:min(len(s.args.id), 63)]
	}
	conf.Process.Terminal = r.Terminal
	size := sizeOf(o, conf.Linux)
	policy, err := compilePolicy(conf.Annotations)
	if err != nil {
		return invalid(err)
	}
	c.limits = limits{memory: size.limit, pids: size.pids}
	c.first = newRunning(r.ID, "", conf.Process.program(), c.names)
	if err := c.first.io.open(ctx); err != nil {
		return invalid(err)
	}
	img, err := root.pack(ctx, s.conf.images())
	if err != nil {
		return err
	}
	w := wish{id: c.id, bundle: c.bundle, hostname: conf.Hostname, size: size, policy: policy, first: img}
	if err := s.joinPod(ctx, c, w); err != nil {
		return err
	}
	create := guestproto.Create{
		Hostname: conf.Hostname, Program: c.first.program,
		Resources: guestproto.Resources{MemoryMax: size.limit, PidsMax: size.pids},
	}
	if err := c.make(ctx, img, create, s.upper(c)); err != nil {
		return errors.Join(err, s.leavePod(c))
	}
	guest := c.first.process()
	c.first.io.run(guest)
	go c.watch(c.first, guest)
	return nil
}

// upper is how much a container may write to its root.
func (s *service) upper(c *container) uint64 {
	return uint64(c.pod.size.memoryMiB) << 20 / upperShare
}

// joinPod gives a container its pod: a new one, or the one it belongs to.
func (s *service) joinPod(ctx context.Context, c *container, w wish) (err error) {
	if c.role == roleAlone {
		c.pod, err = s.openPod(ctx, w)
		return err
	}
	if c.pod, err = s.livingPod(); err != nil {
		return err
	}
	j := c.pod.journal
	j.ID = c.id
	return j.write(c.bundle)
}

// leavePod undoes joinPod.
func (s *service) leavePod(c *container) error {
	err := removeJournal(c.bundle)
	if c.role == roleAlone {
		err = errors.Join(c.pod.end(), err)
		s.dropPod(c.pod)
	}
	return err
}

// openPod makes the pod of this shim. Asked again, it gives the one it made.
func (s *service) openPod(ctx context.Context, w wish) (*pod, error) {
	s.mu.Lock()
	if p := s.pod; p != nil {
		s.mu.Unlock()
		select {
		case <-p.made:
			return p, p.err
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	p := &pod{
		wish: w, log: s.log, oom: s.oom, made: make(chan struct{}), done: make(chan struct{}),
		journal: journal{ID: w.id, Pod: w.id, Machine: machineID(s.args), Run: s.conf.machines(), Socket: s.socket},
	}
	s.pod = p
	s.mu.Unlock()
	g, err := s.guests(ctx)
	if err == nil {
		err = p.open(ctx, g)
	}
	if p.err = err; err != nil {
		s.dropPod(p)
	}
	close(p.made)
	return p, err
}

// dropPod forgets a pod whose machine is gone.
func (s *service) dropPod(p *pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pod == p {
		s.pod = nil
	}
}

// livingPod is the pod of this shim, if it is made and its machine runs.
func (s *service) livingPod() (*pod, error) {
	s.mu.Lock()
	p := s.pod
	s.mu.Unlock()
	if p == nil {
		return nil, status.Errorf(codes.NotFound, "pod %q is not here", s.args.id)
	}
	select {
	case <-p.made:
	default:
		return nil, status.Errorf(codes.FailedPrecondition, "pod %q is being made", s.args.id)
	}
	if p.err != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "pod %q could not be made", s.args.id)
	}
	select {
	case <-p.done:
		return nil, status.Errorf(codes.FailedPrecondition, "pod %q has ended: %v", s.args.id, p.machine.Err())
	default:
		return p, nil
	}
}

// oom tells that a container had too little memory.
func (s *service) oom(process uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.containers {
		select {
		case <-c.made:
		default:
			continue
		}
		if c.err != nil || c.pause() {
			continue
		}
		if g := c.first.process(); g != nil && g.ID() == process {
			s.events.publish(&events.TaskOOM{ContainerID: c.id})
		}
	}
}
