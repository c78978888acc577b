package shim

import (
	"context"
	"errors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/runtime/task/v2"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/shim/oci"
	"hauberk.dev/shim/volume"
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
		c.leave()
		c.close()
		s.mu.Lock()
		delete(s.containers, r.ID) // another try is a new one
		s.mu.Unlock()
	}
	close(c.made)
	if c.err != nil {
		return nil, c.err
	}
	return &task.CreateTaskResponse{Pid: c.pid()}, nil
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
	return &task.CreateTaskResponse{Pid: c.pid()}, nil
}

// invalid is the answer to a request that cannot be done by anybody.
func invalid(err error) error { return status.Error(codes.InvalidArgument, err.Error()) }

func (s *service) create(ctx context.Context, c *container, r *task.CreateTaskRequest) error {
	if r.ParentCheckpoint != "" {
		return status.Error(codes.Unimplemented, "create container: a sandbox has no checkpoint that is half of another")
	}
	b, err := readBundle(r.Bundle, r.ID)
	if err == nil && b.pod != s.args.id {
		err = status.Errorf(codes.FailedPrecondition, "create container %q: it is of pod %q, and this is %q", r.ID, b.pod, s.args.id)
	}
	if err != nil {
		return err
	}
	conf, err := oci.Parse(b.raw)
	if err != nil {
		return invalid(err)
	}
	var options oci.Options
	if b.role != roleMember { // whose pod has its size, whatever containerd hands on
		if options, err = parseOptions(r.Options); err != nil {
			return invalid(err)
		}
	}
	w, err := wishOf(conf, b, options)
	if err != nil {
		return invalid(err)
	}
	w.id, w.bundle, c.role = c.id, c.bundle, b.role
	if r.Checkpoint != "" {
		return s.createSaved(ctx, c, conf, r, w)
	}
	if c.role == roleSandbox {
		err = s.createPause(ctx, c, w)
	} else {
		err = s.createProcess(ctx, c, conf, r, w)
	}
	if err == nil {
		s.events.publish(c.created(r.Rootfs))
	}
	return err
}

// wishOf is the pod that a configuration asks for.
func wishOf(conf *oci.Config, b bundle, o oci.Options) (w wish, err error) {
	if w.policy, err = compilePolicy(b.annotations); err != nil {
		return wish{}, err
	}
	w.settled = b.annotations[policyAnnotation] != ""
	if !w.settled && b.role == roleAlone && conf.Privileged() {
		w.settled = true // it is known from the start, and is so again when it goes on from a snapshot
		if w.policy, err = privilegedPolicy(); err != nil {
			return wish{}, err
		}
	}
	if w.unfenced, err = unfenced(b.annotations); err != nil {
		return wish{}, err
	}
	if w.size, err = sizeOf(conf, o); err != nil {
		return wish{}, err
	}
	if b.role == roleSandbox { // its members are never asked
		create, _, err := conf.Create(oci.Facts{Network: conf.Network()})
		if err != nil {
			return wish{}, err
		}
		w.sysctls = create.Sysctls
	}
	pod, err := conf.Pod()
	if err != nil {
		return wish{}, err
	}
	w.uid, w.netns, w.several = pod.UID, conf.Network(), b.role == roleSandbox
	if w.shared, err = willShare(b.annotations, w.uid); err != nil {
		return wish{}, err
	}
	w.hostname = conf.Hostname()
	if w.hostname == "" {
		w.hostname = b.pod[:min(len(b.pod), 63)]
	}
	return w, nil
}

// createPause makes a pod for the CRI: a machine, and nothing in it.
func (s *service) createPause(ctx context.Context, c *container, w wish) (err error) {
	c.first = newRunning(c.id, "", guestproto.Program{}, c.names)
	if c.pod, err = s.openPod(ctx, w); err != nil {
		return err
	}
	go c.watchPause()
	return nil
}

// createProcess makes a container with a process in it.
func (s *service) createProcess(ctx context.Context, c *container, conf *oci.Config, r *task.CreateTaskRequest, w wish) error {
	dir, _ := conf.Root(r.Bundle)
	root, err := rootOf(r.Rootfs, dir)
	if err != nil {
		return invalid(err)
	}
	if c.role == roleAlone && !w.shared { // a pod cannot know so early
		_, volumes, err := conf.Create(oci.Facts{Network: w.netns})
		if err != nil {
			return invalid(err)
		}
		if w.shared, err = volume.NeedShare(w.uid, volumes); err != nil {
			return invalid(err)
		}
	}
	c.conf = conf
	c.first = newRunning(r.ID, "", guestproto.Program{}, c.names)
	if err := c.first.io.open(ctx); err != nil {
		return invalid(err)
	}
	if w.first, err = root.pack(ctx, s.conf.images()); err != nil {
		return err
	}
	if err := s.joinPod(ctx, c, w); err != nil {
		return err
	}
	if err := c.make(ctx, w.first, s.facts(c)); err != nil {
		return errors.Join(err, s.leavePod(c))
	}
	guest := c.first.process()
	c.first.io.run(guest)
	go c.watch(c.first, guest)
	return nil
}

// facts are what a container's configuration does not say of its pod.
func (s *service) facts(c *container) oci.Facts {
	f := oci.Facts{Network: c.pod.netns, PIDs: map[uint32]uint32{c.pod.pid(): 0}}
	for _, other := range s.ready() {
		if other.stand == nil {
			continue
		}
		if g := other.first.process(); g != nil {
			f.PIDs[other.stand.pid] = g.ID()
		}
	}
	return f
}

// ready lists the containers that are made.
func (s *service) ready() (all []*container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.containers {
		select {
		case <-c.made:
			if c.err == nil {
				all = append(all, c)
			}
		default:
		}
	}
	return all
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
	if c.stand, err = openStandIn(c.pod.netns); err != nil {
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
		journal: journal{ID: w.id, Pod: w.id, Machine: machineID(s.args), Run: s.conf.machines(), Socket: s.socket, Network: w.netns},
	}
	s.pod = p
	s.mu.Unlock()
	var err error
	if s.claim != nil {
		err = s.claim.join(w.netns)
	}
	if err == nil {
		p.boots, err = s.guests(ctx)
	}
	if err == nil {
		err = p.open(ctx)
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
		return nil, status.Errorf(codes.FailedPrecondition, "pod %q has ended: %v", s.args.id, p.box.Load().machine.Err())
	default:
		return p, nil
	}
}

// oom tells that a container had too little memory.
func (s *service) oom(process, kills uint32) {
	for _, c := range s.ready() {
		if g := c.first.process(); g != nil && g.ID() == process {
			c.oomKills.Store(kills)
			s.events.publish(&events.TaskOOM{ContainerID: c.id})
		}
	}
}
