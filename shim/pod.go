package shim

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/guard"
	"hauberk.dev/image"
	"hauberk.dev/internal/netns"
	"hauberk.dev/shim/oci"
	"hauberk.dev/shim/volume"
)

// wish is what a pod is to be.
type wish struct {
	id       string
	bundle   string // holds its journal
	hostname string
	uid      string // by which kubelet knows it, may be empty
	size     oci.Size
	policy   guard.Compiled
	// settled says that the policy stays: somebody chose it, or it is that of
	// a privileged container from the start.
	settled bool
	// shared lets a file server reach the machine's memory.
	shared bool
	// sysctls are the pod's, and so every container's.
	sysctls []guestproto.Setting
	// files are the pod's, for containers that bring none of their own.
	files []guestproto.File
	// netns is the path of the network namespace that somebody made for it;
	// none is a pod with a loopback interface alone.
	netns string
	// unfenced lets the guest speak there for other addresses than its own.
	unfenced bool
	// several says that it is more than one container by itself.
	several bool
	// first is a disk the machine starts with, in slot 0, if its path is given.
	first image.Image
	// from is what it goes on from, if it was saved once.
	from *saved
}

// pod is a machine and the containers in it: that of containerd's client, or
// those of a pod of the CRI.
type pod struct {
	wish
	log     *slog.Logger
	journal journal
	boots   booter
	oom     func(process, kills uint32) // must not block

	made chan struct{} // closed when open has ended
	err  error         // of open; read after made

	box     atomic.Pointer[box] // once it is made
	stand   *standIn            // of several
	created time.Time
	done    chan struct{} // closed when its last machine is gone
	gone    time.Time     // read after done

	changing sync.Mutex // held while the machine is replaced or ended
	ended    bool

	entering sync.Mutex // held while it is settled what machine a container gets
	used     bool       // it has, or had, a container

	pins pins // which processors its machine runs on

	// relaxed is the policy in force once there was a privileged container.
	relaxed atomic.Pointer[guard.Compiled]

	told tellings
}

// inForce is the policy that the guest has, or is to have.
func (p *pod) inForce() *guard.Compiled {
	if c := p.relaxed.Load(); c != nil {
		return c
	}
	return &p.policy
}

// open makes the pod. What it made before it failed is gone when it returns.
func (p *pod) open(ctx context.Context) (err error) {
	if err := p.journal.write(p.bundle); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.end(), removeJournal(p.bundle))
		}
	}()
	if p.several {
		if p.stand, err = openStandIn(p.netns); err != nil {
			return err
		}
	}
	b, err := openBox(ctx, p, p.boots)
	if err != nil {
		return err
	}
	p.created = time.Now()
	p.box.Store(b)
	go p.watch(b)
	go p.heed(b)
	return nil
}

// watch ends the pod when its machine ends, whatever ended that, unless it was
// replaced.
func (p *pod) watch(b *box) {
	b.lost()
	p.changing.Lock()
	replaced := p.box.Load() != b
	p.changing.Unlock()
	if !replaced {
		p.giveUp()
		p.gone = time.Now()
		close(p.done)
	}
}

// enter gives the machine to a container to come, which wants these volumes. A
// machine whose memory no file server can reach is replaced if one is needed:
// that is possible as long as nothing ran in it.
func (p *pod) enter(ctx context.Context, volumes []oci.Volume) (*box, error) {
	p.entering.Lock()
	defer p.entering.Unlock()
	share, err := volume.NeedShare(p.uid, volumes)
	if err != nil {
		return nil, err
	}
	if b := p.box.Load(); b.shared || !share {
		p.used = true
		return b, nil
	}
	if p.used {
		return nil, status.Errorf(codes.FailedPrecondition, "the pod runs without file sharing, and a container of it wants a directory of the host: "+
			"annotate the pod with %s: \"true\"", shareAnnotation)
	}
	b, err := p.replace(ctx)
	p.used = err == nil
	return b, err
}

// relax lets a privileged container mount, in a pod for which nobody chose a
// policy. The machine is one that the container entered.
func (p *pod) relax(ctx context.Context, b *box) error {
	p.entering.Lock()
	defer p.entering.Unlock()
	if p.settled || p.relaxed.Load() != nil {
		return nil
	}
	c, err := privilegedPolicy()
	if err != nil {
		return err
	}
	if err := b.enforce(ctx, &c); err != nil {
		return err
	}
	p.relaxed.Store(&c)
	p.log.Info("the pod has a privileged container: mounting in its guest is allowed", "pod", p.id)
	return nil
}

// replace makes another machine, one that a file server can reach.
func (p *pod) replace(ctx context.Context) (*box, error) {
	p.changing.Lock()
	defer p.changing.Unlock()
	if p.ended {
		return nil, status.Errorf(codes.FailedPrecondition, "pod %q has ended", p.id)
	}
	p.log.Info("the pod needs file sharing: another machine takes its place", "pod", p.id)
	old := p.box.Load()
	if err := old.end(); err != nil {
		return nil, err // watch ends the pod
	}
	p.shared, p.first = true, image.Image{}
	b, err := openBox(ctx, p, p.boots)
	if err != nil {
		return nil, err
	}
	p.box.Store(b)
	go p.watch(b)
	go p.heed(b)
	return b, nil
}

// end kills the machine and lets go of what the pod had. It may be called
// again.
func (p *pod) end() (err error) {
	p.changing.Lock()
	defer p.changing.Unlock()
	p.ended = true
	if b := p.box.Load(); b != nil {
		err = b.end()
	}
	if p.stand != nil {
		p.stand.stop()
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

// pid stands for the pod: a thread for one of several containers, else the
// machine.
func (p *pod) pid() uint32 {
	if p.stand != nil {
		return p.stand.pid
	}
	if b := p.box.Load(); b != nil {
		return uint32(b.machine.PID())
	}
	return 0
}
