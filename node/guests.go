package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/guard"
	"hauberk.dev/guard/bpf"
	"hauberk.dev/image"
	"hauberk.dev/internal/netns"
	"hauberk.dev/vm"
	"hauberk.dev/vm/boot"
	"hauberk.dev/vm/pool"
)

// templateUser runs the machines that templates are made of.
const templateUser = uidBase - 1

// standard is the size of sandbox whose template is made first.
var standard = spec.Sandbox{Class: "vm", MemoryMiB: 160, CPUs: 1}

// guests makes and finds the machines of a node: what they boot from, what
// their images are, where their namespaces lie.
type guests struct {
	n           *Node
	guest       *boot.Guest
	manifest    guard.Manifest // of the Guard's bundle; empty without it
	measurement wire.Measurement
	spares      *pool.Pool

	machines, namespaces, consoles, histories, images, rehearsals string
}

// openGuests prepares kernel, agent and Guard, and finds out what really boots
// a guest.
func openGuests(ctx context.Context, n *Node) (*guests, error) {
	g := &guests{
		n: n, machines: filepath.Join(n.conf.Run, "vm"), namespaces: filepath.Join(n.conf.Run, "netns"),
		consoles: filepath.Join(n.conf.State, "consoles"), histories: filepath.Join(n.conf.State, "events"), images: filepath.Join(n.conf.State, "images"),
		rehearsals: filepath.Join(n.conf.State, "rehearsals"),
	}
	for _, dir := range []string{g.namespaces, g.consoles, g.histories, g.images, g.rehearsals} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open guests: %w", err)
		}
	}
	c := boot.Config{
		State: n.conf.State, Run: g.machines, User: templateUser,
		Kernel: n.conf.Kernel, Agent: n.conf.GuestAgent, Link: bpf.Link,
	}
	if n.conf.WithoutGuard {
		c.Link = nil
	}
	var err error
	if g.guest, err = boot.Open(ctx, c); err != nil {
		return nil, err
	}
	if g.guest.Notice != "" {
		n.slog.Warn(g.guest.Notice)
	}
	g.measurement = g.guest.Measurement()
	if bundle := g.guest.Bundle(); bundle != nil {
		if g.manifest, err = guard.ReadManifest(bundle); err != nil {
			return nil, errors.Join(err, g.guest.Close())
		}
	}
	g.spares = pool.New(pool.Config{Make: g.makeSpare, PerSize: n.conf.Spares, Sizes: spareSizes, Failed: n.note})
	return g, nil
}

// facts are what a policy can be held by here.
func (g *guests) facts() wire.GuestFacts {
	f := wire.GuestFacts{Kernel: g.guest.Kernel.Release}
	for _, p := range g.manifest.Programs {
		f.Programs = append(f.Programs, p.Name)
	}
	return f
}

func (g *guests) accelerator() string { return string(g.guest.Accelerator) }

func (g *guests) templateSpec(s spec.Sandbox) vm.TemplateSpec {
	return g.guest.Template(int(s.MemoryMiB), int(s.CPUs), g.n.keys.trustDomain())
}

// openRoot opens an image that is as it was packed.
func openRoot(img image.Image) (*os.File, error) {
	if err := image.Verify(img.Path, img.ErofsSHA256); err != nil {
		return nil, err
	}
	return os.Open(img.Path)
}

// clone starts a machine for an instance.
func (g *guests) clone(ctx context.Context, i wire.Instance, img image.Image, tap *os.File, user uint32) (*vm.Machine, error) {
	root, err := openRoot(img)
	if err != nil {
		return nil, fmt.Errorf("clone %s: %w", i.ID, err)
	}
	defer root.Close()
	return g.guest.Clone(ctx, vm.Spec{
		ID: i.ID, Template: g.templateSpec(i.Spec.Sandbox), UID: user, GID: user,
		Disks:    []vm.Disk{{File: root, Slot: rootSlot}},
		Networks: []vm.Network{{Tap: tap}},
	}, g.progress)
}

// warm makes the template of the standard size, if it is not there.
func (g *guests) warm(ctx context.Context) error {
	_, err := g.guest.Driver.Template(ctx, g.templateSpec(standard), g.progress)
	return err
}

func (g *guests) progress(line string) { g.n.slog.Info("template: " + line) }

func (g *guests) adopt(ctx context.Context, id string) (*vm.Machine, error) {
	return g.guest.Driver.Adopt(ctx, filepath.Join(g.machines, id))
}

// pull fetches the image by digest from the control plane's registry.
func (g *guests) pull(ctx context.Context, i wire.Instance) (image.Image, error) {
	from := image.Registry{Client: g.n.uplink.http, URL: g.n.uplink.base, Repository: i.Repository}
	return image.Pull(ctx, from, i.Digest, g.images)
}

func (g *guests) newBody(id string) body {
	return &sandbox{g: g, id: id, exited: make(chan int, 1), died: make(chan struct{})}
}

// sweep ends machines and removes namespaces that no journal entry owns.
func (g *guests) sweep(owned []entry) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	mine := func(id string) bool {
		return slices.ContainsFunc(owned, func(e entry) bool { return e.Instance.ID == id })
	}
	orphans, err := vm.Orphans(g.machines)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var errs []error
	for _, o := range orphans {
		if !mine(o.ID) {
			errs = append(errs, o.End(ctx))
		}
	}
	left, err := netns.List(g.namespaces)
	errs = append(errs, err)
	for _, name := range left {
		if !mine(name) {
			errs = append(errs, netns.Remove(g.namespaces, name))
		}
	}
	return errors.Join(errs...)
}

// Close forgets templates. Machines that run go on.
func (g *guests) Close() error {
	return g.guest.Close()
}
