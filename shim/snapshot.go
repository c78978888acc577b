package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/runtime/task/v2"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/api/hand"
	"hauberk.dev/internal/strictjson"
	"hauberk.dev/shim/oci"
	"hauberk.dev/vm"
)

// Snapshot saves a container with its machine. Its processes stand still from
// before the state is taken: those of a copy then draw no random number, and
// read no clock, before the copy is one of its own.
func (s *service) Snapshot(ctx context.Context, q *hand.SnapshotRequest) (*hand.SnapshotReply, error) {
	if !filepath.IsAbs(q.Dir) {
		return nil, invalid(fmt.Errorf("save %q: directory %.256q: want an absolute path", q.Container, q.Dir))
	}
	c, p, err := s.process(q.Container, "")
	if err != nil {
		return nil, err
	}
	if ph, _, _ := p.state(); ph != phaseRunning || p.process() == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "save %q: it does not run", q.Container)
	}
	if c.role != roleAlone || c.box.shared {
		return nil, status.Errorf(codes.FailedPrecondition, "save %q: it is one of several of a pod, or has directories of this host: a snapshot holds neither", q.Container)
	}
	r, err := c.save(ctx, q)
	if err != nil {
		return nil, fmt.Errorf("save %q: %w", q.Container, err)
	}
	return r, nil
}

// save saves the container, and lets it go on or ends it.
func (c *container) save(ctx context.Context, q *hand.SnapshotRequest) (_ *hand.SnapshotReply, err error) {
	if who := c.box.disksBeside(c.root); who != "" {
		return nil, status.Errorf(codes.FailedPrecondition, "it has a disk of %s, which a snapshot does not hold", who)
	}
	c.pausing.Lock()
	defer c.pausing.Unlock()
	paused, guest := c.isPaused(), c.first.process()
	note, err := json.Marshal(hand.Saved{
		Version: hand.SavedVersion, Process: guest.ID(), Terminal: c.names.Terminal, Paused: paused, Root: c.box.first.ErofsSHA256,
		MemoryMiB: c.pod.size.MemoryMiB, Processors: c.pod.size.Processors, Caller: q.Note,
	})
	if err != nil {
		return nil, err
	}
	began := time.Now()
	var saved vm.Snapshot
	if !paused {
		err = guest.Freeze(ctx)
	}
	if err == nil {
		saved, err = c.box.machine.Snapshot(ctx, q.Dir, note)
	}
	// Whatever failed, and whoever gave up: what stands still goes on.
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	if err == nil && q.End {
		err = c.kill(after, c.first, syscall.SIGKILL, true)
	} else {
		// Its clock stood still with it.
		err = errors.Join(err, c.box.channel.Reseed(after, vm.Refresh(c.box.seed)))
		if !paused {
			err = errors.Join(err, guest.Thaw(after))
		}
	}
	if err != nil {
		return nil, err
	}
	return &hand.SnapshotReply{Bytes: saved.Bytes, StoodMicros: time.Since(began).Microseconds()}, nil
}

// disksBeside says whose disk is in another slot than a root's.
func (b *box) disksBeside(root int) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, who := range b.slots.reading {
		if who != "" && i != root {
			return who
		}
	}
	for _, who := range b.slots.writing {
		if who != "" {
			return who
		}
	}
	return ""
}

// saved is what a container goes on from.
type saved struct {
	machine vm.Snapshot
	note    hand.Saved
	state   *os.File
}

// openSaved opens a snapshot that a shim wrote.
func openSaved(dir string) (*saved, error) {
	if !filepath.IsAbs(dir) {
		return nil, invalid(fmt.Errorf("open snapshot %.256q: want an absolute path", dir))
	}
	out := &saved{}
	var err error
	if out.machine, out.state, err = vm.OpenSnapshot(dir); err != nil {
		if errors.Is(err, vm.ErrDamaged) {
			err = status.Error(codes.DataLoss, err.Error())
		}
		return nil, err
	}
	if out.note, err = parseSaved(out.machine.Note); err != nil {
		return nil, errors.Join(status.Errorf(codes.DataLoss, "open snapshot %s: %v", dir, err), out.state.Close())
	}
	return out, nil
}

func parseSaved(note []byte) (s hand.Saved, err error) {
	if err := strictjson.Decode(note, maxHand+maxJournal, &s); err != nil {
		return hand.Saved{}, fmt.Errorf("read note: %w", err)
	}
	switch {
	case s.Version != hand.SavedVersion:
		return hand.Saved{}, fmt.Errorf("read note: version %d: want %d", s.Version, hand.SavedVersion)
	case s.Process == 0 || s.Root == "" || s.MemoryMiB <= 0 || s.Processors <= 0:
		return hand.Saved{}, errors.New("read note: it is of no container")
	}
	return s, nil
}

// fits says what of a container to be is not as it was when it was saved. What
// the machine is of, the driver compares.
func (s *saved) fits(w wish, terminal bool) error {
	for _, v := range []struct {
		what    string
		was, is any
	}{
		{"image of the root", s.note.Root, w.first.ErofsSHA256},
		{"memory of the machine in MiB", s.note.MemoryMiB, w.size.MemoryMiB},
		{"processors of the machine", s.note.Processors, w.size.Processors},
		{"terminal", s.note.Terminal, terminal},
	} {
		if v.was != v.is {
			return status.Errorf(codes.FailedPrecondition, "the snapshot is of something else: %s was %v and is %v", v.what, v.was, v.is)
		}
	}
	return nil
}

// createSaved makes a container that goes on from where it was saved. It runs
// when it is made.
func (s *service) createSaved(ctx context.Context, c *container, conf *oci.Config, r *task.CreateTaskRequest, w wish) (err error) {
	if c.role != roleAlone || w.shared {
		return status.Error(codes.Unimplemented, "create container: only one that is alone in its machine, without directories of this host, can go on from a snapshot")
	}
	if w.from, err = openSaved(r.Checkpoint); err != nil {
		return err
	}
	defer w.from.state.Close()
	dir, _ := conf.Root(r.Bundle)
	root, err := rootOf(r.Rootfs, dir)
	if err != nil {
		return invalid(err)
	}
	c.conf = conf
	c.first = newRunning(r.ID, "", guestproto.Program{}, c.names)
	if err := c.first.io.open(ctx); err != nil {
		return invalid(err)
	}
	if w.first, err = root.pack(ctx, s.conf.images()); err != nil {
		return err
	}
	if err := w.from.fits(w, r.Terminal); err != nil {
		return err
	}
	if err := s.joinPod(ctx, c, w); err != nil {
		if errors.Is(err, vm.ErrWrongTemplate) {
			err = status.Error(codes.FailedPrecondition, err.Error())
		}
		return err
	}
	if err := s.adopt(ctx, c, r, w.from.note); err != nil {
		return errors.Join(err, s.leavePod(c))
	}
	return nil
}

// adopt takes over what runs in a restored guest, and lets it go on.
func (s *service) adopt(ctx context.Context, c *container, r *task.CreateTaskRequest, from hand.Saved) (err error) {
	create, _, err := c.conf.Create(s.facts(c))
	if err != nil {
		return invalid(err)
	}
	c.limits.note(create.Resources)
	if c.box, err = c.pod.enter(ctx, nil); err != nil {
		return err
	}
	if c.root, err = c.box.attach(ctx, c.id, c.pod.first); err != nil {
		return err
	}
	if err := c.pod.pins.set(c.id, c.conf.CPUs(), c.box.machine.PID()); err != nil {
		return err
	}
	guest, err := c.box.takeOver(ctx, from.Process)
	if err != nil {
		return err
	}
	c.first.setProcess(guest)
	c.first.announcing.Lock() // its end is told after this
	defer c.first.announcing.Unlock()
	c.first.io.goOn(guest)
	go c.watch(c.first, guest)
	c.paused = from.Paused
	if !from.Paused {
		if err := guest.Thaw(ctx); err != nil {
			return err
		}
	}
	c.first.started()
	s.events.publish(c.created(r.Rootfs))
	s.events.publish(&events.TaskStart{ContainerID: c.id, Pid: c.pid()})
	return nil
}

// takeOver finds a container's first process in a guest. Others that ran in it
// belong to nobody now: what they write is dropped, and they read an end.
func (b *box) takeOver(ctx context.Context, first uint32) (*vm.Process, error) {
	list, err := b.channel.Processes(ctx)
	if err != nil {
		return nil, err
	}
	var found *vm.Process
	for _, info := range list {
		p, err := b.channel.Attach(ctx, info)
		switch {
		case err != nil:
			return nil, err
		case info.Process == first:
			found = p
			continue
		}
		p.Discard()
		_ = p.CloseStdin(ctx) // it may have ended
	}
	if found == nil {
		return nil, status.Errorf(codes.DataLoss, "take over container: process %d is not in the guest", first)
	}
	return found, nil
}
