package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/guard"
	"hauberk.dev/image"
	"hauberk.dev/internal/netns"
	"hauberk.dev/shim/oci"
	"hauberk.dev/shim/volume"
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

// booter starts machines.
type booter interface {
	machine(ctx context.Context, id string, w wish) (machine, error)
}

// wish is what a pod is to be.
type wish struct {
	id       string
	bundle   string // holds its journal
	hostname string
	uid      string // by which kubelet knows it, may be empty
	size     oci.Size
	policy   guard.Compiled
	// sysctls are the pod's, and so every container's.
	sysctls []guestproto.Setting
	// files are the pod's, for containers that bring none of their own.
	files []guestproto.File
	// netns is the path of the network namespace that somebody made for it;
	// none is a pod with a loopback interface alone.
	netns string
	// unfenced lets the guest speak there for other addresses than its own.
	unfenced bool
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
	volumes *volume.Pod
	created time.Time
	done    chan struct{} // closed when the machine is gone
	gone    time.Time     // read after done

	stopping atomic.Bool
	ending   sync.Mutex // held while the machine is ended

	mu    sync.Mutex
	slots slots
}

// open makes the machine, and the guest in it this pod's own. What it made
// before it failed is gone when it returns.
func (p *pod) open(ctx context.Context, g booter) (err error) {
	if err := p.journal.write(p.bundle); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.end(), removeJournal(p.bundle))
		}
	}()
	m, err := g.machine(ctx, p.journal.Machine, p.wish)
	if err != nil {
		return err
	}
	p.machine, p.created = m, time.Now()
	for _, step := range []func(context.Context) error{p.connect, p.network, p.enforce} {
		if err := step(ctx); err != nil {
			return fmt.Errorf("%w; the guest printed: %s", err, m.Console())
		}
	}
	p.volumes = volume.New(volume.Config{
		Guest: volumeGuest{p.channel}, Machine: volumeMachine{p}, Log: p.log, UID: p.uid, MemoryMiB: p.size.MemoryMiB,
		Failed: func(err error) {
			p.log.Error("volumes are lost", "pod", p.id, "err", err)
			go p.giveUp()
		},
	})
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
func (p *pod) end() (err error) {
	p.stopping.Store(true)
	p.ending.Lock()
	defer p.ending.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), cleanup)
	defer cancel()
	if p.machine != nil {
		err = p.machine.Kill(ctx)
	}
	if p.channel != nil {
		err = errors.Join(err, p.channel.Close())
	}
	if p.volumes != nil {
		err = errors.Join(err, p.volumes.Close())
	}
	if p.netns != "" {
		err = errors.Join(err, netns.Leave(p.netns))
	}
	return err
}

// giveUp ends a pod that cannot go on.
func (p *pod) giveUp() {
	if err := p.end(); err != nil {
		p.log.Error("end machine", "pod", p.id, "err", err)
	}
}

// pid stands for every process of the pod: the host knows no other.
func (p *pod) pid() uint32 {
	if p.machine == nil {
		return 0
	}
	return uint32(p.machine.PID())
}
