package shim

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/guard"
	"hauberk.dev/shim/volume"
	"hauberk.dev/vm"
)

// machine is what a pod asks of the machine it is.
type machine interface {
	PID() int
	Done() <-chan struct{}
	Err() error
	Console() string
	Channel(ctx context.Context, onRecord func([]byte)) (*vm.Channel, guestproto.Hello, error)
	Attach(context.Context, vm.Disk) error
	Detach(context.Context, vm.Slot) error
	Snapshot(ctx context.Context, dir string, note []byte) (vm.Snapshot, error)
	Kill(context.Context) error
}

// booter starts machines.
type booter interface {
	machine(ctx context.Context, id string, w wish) (machine, error)
}

// box is a machine of a pod, with its guest and what the pod has in it.
type box struct {
	*pod
	machine  machine
	channel  *vm.Channel
	volumes  *volume.Pod
	seed     guestproto.Reseed
	shared   bool        // a file server can reach its memory
	stopping atomic.Bool // it is being ended

	mu    sync.Mutex
	slots slots
}

// openBox makes a machine and the guest in it this pod's own. What it made
// before it failed is gone when it returns.
func openBox(ctx context.Context, p *pod, g booter) (b *box, err error) {
	b = &box{pod: p, shared: p.shared}
	if b.machine, err = g.machine(ctx, p.journal.Machine, p.wish); err != nil {
		return nil, err
	}
	for _, step := range []func(context.Context) error{b.connect, b.network, b.judge} {
		if err := step(ctx); err != nil {
			return nil, errors.Join(fmt.Errorf("%w; the guest printed: %s", err, b.machine.Console()), b.end())
		}
	}
	b.volumes = volume.New(volume.Config{
		Guest: volumeGuest{b.channel}, Machine: volumeMachine{b}, Log: p.log, UID: p.uid, MemoryMiB: p.size.MemoryMiB,
		Failed: func(err error) {
			p.log.Error("volumes are lost", "pod", p.id, "err", err)
			go p.giveUp()
		},
	})
	return b, nil
}

// connect opens the channel to the agent, and makes the guest its own. A guest
// whose Guard is not attached runs nothing.
func (b *box) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	c, hello, err := b.machine.Channel(ctx, b.record)
	if err != nil {
		return err
	}
	b.channel = c
	c.OutOfMemory(func(process, kills uint32) {
		b.log.Warn("out of memory", "pod", b.id, "process", process, "kills", kills)
		b.oom(process, kills)
	})
	if hello.Guard != guestproto.GuardAttached {
		return fmt.Errorf("boot %s: the Guard is not attached: %q", b.id, hello.GuardText)
	}
	b.seed = vm.NewSeed(b.hostname)
	return c.Reseed(ctx, b.seed)
}

// judge puts the pod's policy in force.
func (b *box) judge(ctx context.Context) error { return b.enforce(ctx, b.inForce()) }

// enforce puts a policy in force.
func (b *box) enforce(ctx context.Context, c *guard.Compiled) error {
	reply, err := b.channel.GuardPolicy(ctx, c.Generation, c.Blob)
	if err == nil {
		_, err = c.Applied(reply)
	}
	if err != nil {
		return fmt.Errorf("put the Guard's policy in force: %w", err)
	}
	return nil
}

// lost returns when the machine has ended, or cannot be spoken to any more.
func (b *box) lost() {
	select {
	case <-b.machine.Done():
	case <-b.channel.Done():
		if !b.stopping.Load() {
			b.log.Error("guest is lost", "pod", b.id, "err", b.channel.Err())
		}
	}
}

// end kills the machine and lets go of what it had. It may be called again.
func (b *box) end() error {
	b.stopping.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), cleanup)
	defer cancel()
	err := b.machine.Kill(ctx)
	if b.channel != nil {
		err = errors.Join(err, b.channel.Close())
	}
	if b.volumes != nil {
		err = errors.Join(err, b.volumes.Close())
	}
	return err
}

// usage is what the containers in it use together.
func (b *box) usage(ctx context.Context) (used guestproto.ContainerStats, err error) {
	st, err := b.channel.Stats(ctx)
	for _, u := range st.Containers {
		used = together(used, u)
	}
	return used, err
}
