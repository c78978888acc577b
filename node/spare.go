package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	wire "hauberk.dev/api/node"
	"hauberk.dev/guard"
	"hauberk.dev/image"
	"hauberk.dev/internal/netns"
	"hauberk.dev/vm"
	"hauberk.dev/vm/pool"
)

const (
	// MaxSpares bounds the machines kept ahead of each size.
	MaxSpares = 16
	// spareSizes is how many sizes of machines are kept ahead.
	spareSizes = 2
	// The users of spare machines, which they keep when they are given away:
	// none is made of a guest's address.
	firstSpareUser uint32 = 0x48440000
	spareUsers     uint32 = 1 << 12
)

// makeSpare makes a machine for nobody: the template's guest, greeted, rehearsed
// and paused. It has no disk, no address and no name, and its tap leads nowhere.
// A node that dies leaves it to the next one's sweep, which ends it.
func (g *guests) makeSpare(ctx context.Context, spec vm.TemplateSpec) (*vm.Machine, error) {
	// The pool makes one at a time, and nobody else takes of these users.
	user, err := vm.FreeUser(firstSpareUser, spareUsers, g.machines)
	if err != nil {
		return nil, fmt.Errorf("make spare machine: %w", err)
	}
	m, err := g.guest.Clone(ctx, vm.Spec{
		ID: "spare-" + strings.ToLower(rand.Text()[:12]), Spare: true, UID: user, GID: user, Template: spec,
	}, g.progress)
	if err != nil {
		return nil, fmt.Errorf("make spare machine: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	if err := pool.Ready(ctx, m, g.rehearse); err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), agentTime)
		defer cancel()
		return nil, errors.Join(fmt.Errorf("make spare machine: %w", err), m.Kill(end))
	}
	g.n.said()
	return m, nil
}

// rehearse has the guest do once what it will have to do at once: a container of
// a program of ours, which is gone then.
func (g *guests) rehearse(ctx context.Context, m *vm.Machine, c *vm.Channel) error {
	archive, err := pool.Archive()
	if err != nil {
		return err
	}
	img, err := image.Pack(ctx, bytes.NewReader(archive), g.rehearsals) // once
	if err != nil {
		return err
	}
	disk, err := openRoot(img)
	if err != nil {
		return err
	}
	defer disk.Close()
	r := pool.Rehearsal{Disk: disk}
	if !g.n.conf.WithoutGuard {
		r.Policy = rehearsalPolicy
	}
	return r.Prepare(ctx, m, c)
}

// rehearsalPolicy lets the program of a rehearsal run: what every sandbox begins
// with, and less than what is in force before an instance's first process.
func rehearsalPolicy(ctx context.Context, c *vm.Channel) error {
	p, err := guard.Compile(wire.Guard{Generation: wire.FirstGeneration - 1}, guard.CompileFacts{Gateway: netns.Gateway})
	if err == nil {
		_, err = c.GuardPolicy(ctx, p.Generation, p.Blob)
	}
	return err
}

// takeSpare gives a machine that waits, if there is one of the instance's size.
// An instance whose policy is as old as that of a rehearsal gets none.
func (g *guests) takeSpare(i wire.Instance) *vm.Machine {
	if i.Guard.Generation < wire.FirstGeneration {
		return nil
	}
	return g.spares.Take(g.templateSpec(i.Spec.Sandbox))
}

// give makes a spare machine the instance's: its name, its journal, its disk. Its
// tap is in the instance's namespace already. Then the guest runs; what it is
// told is what a clone is told.
func (g *guests) give(ctx context.Context, m *vm.Machine, i wire.Instance, img image.Image) error {
	root, err := openRoot(img)
	if err != nil {
		return fmt.Errorf("give machine to %s: %w", i.ID, err)
	}
	defer root.Close()
	g.n.said()
	if err := m.Become(g.machines, i.ID); err != nil {
		return err
	}
	if err := m.Attach(ctx, vm.Disk{File: root, Slot: rootSlot}); err != nil {
		return err
	}
	g.n.slog.Info("launch from a spare machine", "instance", i.ID, "machine", m.PID())
	return m.Resume(ctx)
}

// spare is what the node keeps ahead of demand now.
func (g *guests) spare() wire.Spares {
	n, private := g.spares.Waiting()
	return wire.Spares{Machines: n, MiB: int(private >> 20)}
}
