package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/guard"
	"hauberk.dev/image"
	"hauberk.dev/vm"
)

// machine is what a pod asks of the machine it is.
type machine interface {
	ID() string
	PID() int
	Done() <-chan struct{}
	Err() error
	Console() string
	Channel(ctx context.Context, onRecord func([]byte)) (*vm.Channel, guestproto.Hello, error)
	Attach(context.Context, vm.Disk) error
	Detach(context.Context, vm.Slot) error
	Pause(context.Context) error
	Resume(context.Context) error
	Kill(context.Context) error
}

// wish is what a pod is to be.
type wish struct {
	id       string
	bundle   string // holds its journal
	hostname string
	size     size
	policy   guard.Compiled
	// netns is the path of the network namespace that somebody made for it;
	// none is a pod with a loopback interface alone.
	netns string
	// first is a disk the machine boots with, in slot 0, if its path is given.
	first image.Image
}

// pod is a machine and the containers in it: that of containerd's client, or
// those of a pod of the CRI.
type pod struct {
	wish
	log     *slog.Logger
	journal journal
	oom     func(process uint32) // must not block

	made chan struct{} // closed when open has ended
	err  error         // of open; read after made

	machine machine
	channel *vm.Channel
	created time.Time
	done    chan struct{} // closed when the machine is gone
	gone    time.Time     // read after done

	stopping atomic.Bool
	ending   sync.Mutex // held while the machine is ended

	mu    sync.Mutex
	slots [guestproto.MaxRoots]string // the container whose root is in it
}

// open makes the machine, and the guest in it this pod's own. What it made
// before it failed is gone when it returns.
func (p *pod) open(ctx context.Context, g *guests) (err error) {
	if err := p.journal.write(p.bundle); err != nil {
		return err
	}
	m, err := g.machine(ctx, p.journal.Machine, p.wish)
	if err != nil {
		return errors.Join(err, removeJournal(p.bundle))
	}
	p.machine, p.created = m, time.Now()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%w; the guest printed: %s", err, m.Console()), p.end(), removeJournal(p.bundle))
		}
	}()
	if err := p.connect(ctx); err != nil {
		return err
	}
	if err := p.enforce(ctx); err != nil {
		return err
	}
	go p.watch()
	return nil
}

// watch notes the end of the machine, whatever ended it. A machine that cannot
// be spoken to any more is ended.
func (p *pod) watch() {
	select {
	case <-p.machine.Done():
	case <-p.channel.Done():
		if !p.stopping.Load() {
			p.log.Error("guest is lost", "pod", p.id, "err", p.channel.Err())
		}
	}
	if err := p.end(); err != nil { // its directory, the channel
		p.log.Error("end machine", "pod", p.id, "err", err)
	}
	p.gone = time.Now()
	close(p.done)
}

// connect opens the channel to the agent, and makes the guest its own. A guest
// whose Guard is not attached runs nothing.
func (p *pod) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	c, hello, err := p.machine.Channel(ctx, p.record)
	if err != nil {
		return err
	}
	p.channel = c
	c.OutOfMemory(func(process, kills uint32) {
		p.log.Warn("out of memory", "pod", p.id, "process", process, "kills", kills)
		p.oom(process)
	})
	if hello.Guard != guestproto.GuardAttached {
		return fmt.Errorf("boot %s: the Guard is not attached: %q", p.id, hello.GuardText)
	}
	return c.Reseed(ctx, vm.NewSeed(p.hostname))
}

// enforce puts the policy in force.
func (p *pod) enforce(ctx context.Context) error {
	reply, err := p.channel.GuardPolicy(ctx, p.policy.Generation, p.policy.Blob)
	if err == nil {
		_, err = guard.DecodeApplied(reply)
	}
	if err != nil {
		return fmt.Errorf("put the Guard's policy in force: %w", err)
	}
	return nil
}

// record logs what the Guard refused.
func (p *pod) record(raw []byte) {
	e, err := guard.DecodeEvents(raw)
	if err != nil {
		p.log.Error("event of the Guard", "err", err)
		return
	}
	if e.Verdict == guard.Allowed {
		return
	}
	text := fmt.Sprintf("rule %d", e.Rule)
	if r, ok := p.policy.Rule(e.Rule); ok {
		text = r.String()
	}
	p.log.Warn("guard", "event", e.String(), "rule", text, "sequence", e.Sequence, "lost", e.Lost)
}

// end kills the machine and lets go of what it had. It may be called again.
func (p *pod) end() error {
	p.stopping.Store(true)
	p.ending.Lock()
	defer p.ending.Unlock()
	if p.machine == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanup)
	defer cancel()
	err := p.machine.Kill(ctx)
	if p.channel != nil {
		err = errors.Join(err, p.channel.Close())
	}
	return err
}

// pid stands for every process of the pod: the host knows no other.
func (p *pod) pid() uint32 {
	if p.machine == nil {
		return 0
	}
	return uint32(p.machine.PID())
}

// attach gives the guest the disk of a container's root, and says where.
func (p *pod) attach(ctx context.Context, container string, img image.Image) (n int, err error) {
	if p.first.Path != "" && p.first.Path == img.Path && p.take(0, container) {
		return 0, nil // it booted with it
	}
	for n = 0; n < len(p.slots) && !p.take(n, container); n++ {
	}
	if n == len(p.slots) {
		return 0, status.Errorf(codes.ResourceExhausted, "create container %q: a pod has at most %d containers at a time", container, len(p.slots))
	}
	defer func() {
		if err != nil {
			p.free(n)
		}
	}()
	if err := image.Verify(img.Path, img.ErofsSHA256); err != nil {
		return 0, err
	}
	disk, err := os.Open(img.Path)
	if err != nil {
		return 0, fmt.Errorf("attach root of %s: %w", container, err)
	}
	defer disk.Close()
	return n, p.machine.Attach(ctx, vm.Disk{File: disk, Slot: vm.ReadOnlySlot(n)})
}

// take reserves a slot.
func (p *pod) take(n int, container string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.slots[n] != "" {
		return false
	}
	p.slots[n] = container
	return true
}

func (p *pod) free(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.slots[n] = ""
}

// detach takes a container's disk away again.
func (p *pod) detach(ctx context.Context, n int) error {
	if err := p.machine.Detach(ctx, vm.ReadOnlySlot(n)); err != nil {
		return err
	}
	p.free(n)
	return nil
}
