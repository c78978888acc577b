package shim

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"hauberk.dev/guard/bpf"
	"hauberk.dev/image"
	"hauberk.dev/shim/keep"
	"hauberk.dev/vm"
	"hauberk.dev/vm/boot"
	"hauberk.dev/vm/qemu"
)

const (
	// agentTime bounds the first answer of a guest's agent after a cold boot:
	// sixteen at once on two emulated processors take more than a minute. Kubelet
	// waits four for a pod.
	agentTime = 3 * time.Minute
	// trustDomain of all that containerd starts: it is one.
	trustDomain = "containerd"
)

// guests makes machines. Several shims share its directories.
type guests struct {
	conf config
	log  *slog.Logger

	mu    sync.Mutex
	guest *boot.Guest // nil until a machine is booted here
}

// directories of a shim.
func (c config) place() keep.Place { return keep.Place{State: c.state, Run: c.run} }
func (c config) machines() string  { return c.place().Machines() }
func (c config) images() string    { return filepath.Join(c.state, "images") }

// machineID names the machine of a container on this host.
func machineID(a arguments) string {
	sum := sha256.Sum256([]byte(a.address + "\x00" + a.namespace + "\x00" + a.id))
	return "c-" + hex.EncodeToString(sum[:12])
}

func openGuests(c config, log *slog.Logger) (*guests, error) {
	for _, dir := range []string{c.machines(), c.images()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open guests: %w", err)
		}
	}
	return &guests{conf: c, log: log}, nil
}

// machine gives a machine whose guest runs: the keeper's, or, if that cannot be
// had, one that is booted here.
func (g *guests) machine(ctx context.Context, id string, w wish) (machine, error) {
	m, err := g.withRoot(ctx, id, w)
	if err != nil {
		return nil, err // not a machine that is nil
	}
	return m, nil
}

// withRoot gives it with the disk of its first root in place, if that is known.
func (g *guests) withRoot(ctx context.Context, id string, w wish) (*vm.Machine, error) {
	if img := w.first; img.Path != "" {
		if err := image.Verify(img.Path, img.ErofsSHA256); err != nil {
			return nil, err
		}
		disk, err := os.Open(img.Path)
		if err != nil {
			return nil, fmt.Errorf("make machine %s: %w", id, err)
		}
		defer disk.Close()
		return g.withDisks(ctx, id, w, vm.Disk{File: disk, Slot: vm.ReadOnlySlot(0)})
	}
	return g.withDisks(ctx, id, w)
}

func (g *guests) withDisks(ctx context.Context, id string, w wish, disks ...vm.Disk) (*vm.Machine, error) {
	if w.from != nil {
		return g.restore(ctx, id, w, disks)
	}
	if g.conf.cold {
		return g.boot(ctx, id, w, disks)
	}
	m, err := g.kept(ctx, id, w)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		g.log.Warn("boot a machine cold, for the keeper gave none", "machine", id, "err", err, "step", "boot a machine cold")
		return g.boot(ctx, id, w, disks)
	}
	for _, d := range disks {
		if err := m.Attach(ctx, d); err != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
			defer cancel()
			return nil, errors.Join(err, m.Kill(ctx))
		}
	}
	return m, nil
}

// kept asks the keeper for a machine.
func (g *guests) kept(ctx context.Context, id string, w wish) (*vm.Machine, error) {
	began := time.Now()
	c := keep.Client{Place: g.conf.place(), Start: []string{keepAction, "-state", g.conf.state, "-run", g.conf.run, "-pool", strconv.Itoa(g.conf.pool)}}
	given, err := c.Machine(ctx, keep.Request{
		ID: id, MemoryMiB: w.size.MemoryMiB, CPUs: w.size.Processors, TrustDomain: trustDomain, Shared: w.shared,
	}, func(line string) { g.log.Info("keeper", "step", line) }) // package sandbox tells people of steps
	if err != nil {
		return nil, err
	}
	g.log.Debug("machine", "id", id, "from", given.How, "took", time.Since(began))
	return given.Machine, nil
}

// boot starts a machine from its kernel.
func (g *guests) boot(ctx context.Context, id string, w wish, disks []vm.Disk) (*vm.Machine, error) {
	return g.own(ctx, id, w, disks, func(d *qemu.Driver, s vm.Spec) (*vm.Machine, error) { return d.Boot(ctx, s) })
}

// restore starts a machine from a state that was saved.
func (g *guests) restore(ctx context.Context, id string, w wish, disks []vm.Disk) (*vm.Machine, error) {
	return g.own(ctx, id, w, disks, func(d *qemu.Driver, s vm.Spec) (*vm.Machine, error) {
		return d.Restore(ctx, w.from.machine, w.from.state, s)
	})
}

// own starts a machine that is not the keeper's. The lock lasts until the
// machine's journal names its user, so no two machines have the same.
func (g *guests) own(ctx context.Context, id string, w wish, disks []vm.Disk, start func(*qemu.Driver, vm.Spec) (*vm.Machine, error)) (*vm.Machine, error) {
	guest, err := g.prepare(ctx)
	if err != nil {
		return nil, err
	}
	user, release, err := g.conf.place().User(ctx)
	if err != nil {
		return nil, fmt.Errorf("start machine %s: %w", id, err)
	}
	defer release()
	return start(guest.Driver, vm.Spec{
		ID: id, UID: user, GID: user, Disks: disks, Journaled: release, Shared: w.shared,
		Template: guest.Template(w.size.MemoryMiB, w.size.Processors, trustDomain),
	})
}

// prepare prepares kernel, agent and Guard, and finds out what boots, once.
func (g *guests) prepare(ctx context.Context) (*boot.Guest, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.guest != nil {
		return g.guest, nil
	}
	guest, err := boot.Open(ctx, boot.Config{State: g.conf.state, Run: g.conf.machines(), User: keep.FirstUser, Link: bpf.Link})
	if err != nil {
		return nil, err
	}
	if guest.Notice != "" {
		g.log.Debug(guest.Notice) // true of every container: not worth a line each
	}
	g.guest = guest
	return guest, nil
}

// Close frees what boots machines. They run on.
func (g *guests) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.guest == nil {
		return nil
	}
	return g.guest.Close()
}
