package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
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
	"hauberk.dev/image"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/internal/netns"
	"hauberk.dev/vm"
	"hauberk.dev/vm/qemu"
)

// templateUser runs the machines that templates are made of.
const templateUser = uidBase - 1

// standard is the size of sandbox whose template is made first.
var standard = spec.Sandbox{Class: "vm", MemoryMiB: 160, CPUs: 1}

// guests makes and finds the machines of a node: what they boot from, what
// their images are, where their namespaces lie.
type guests struct {
	n           *Node
	driver      *qemu.Driver
	kernel      *kernel.Artefacts
	initrd      kernel.Initrd
	measurement wire.Measurement
	accelerator string

	machines, namespaces, consoles, images string
}

// openGuests prepares kernel, agent and Guard, and finds out what really boots
// a guest.
func openGuests(ctx context.Context, n *Node) (*guests, error) {
	g := &guests{
		n: n, machines: filepath.Join(n.conf.Run, "vm"), namespaces: filepath.Join(n.conf.Run, "netns"),
		consoles: filepath.Join(n.conf.State, "consoles"), images: filepath.Join(n.conf.State, "images"),
	}
	for _, dir := range []string{g.machines, g.namespaces, g.consoles, g.images} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open guests: %w", err)
		}
	}
	if err := g.prepare(); err != nil {
		return nil, err
	}
	found, err := qemu.Probe(ctx, qemu.ProbeConfig{
		Kernel: vm.Blob{Path: g.kernel.Kernel, Digest: g.kernel.KernelDigest}, Cache: filepath.Join(n.conf.State, "accelerator.json"), Run: g.machines, UID: templateUser, GID: templateUser,
	})
	if err != nil {
		return nil, err
	}
	if found.Notice != "" {
		n.slog.Warn(found.Notice)
	}
	g.accelerator = string(found.Accelerator)
	g.driver, err = qemu.Open(ctx, qemu.Config{Run: g.machines, UID: templateUser, GID: templateUser, Accelerator: found.Accelerator})
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(g.driver.CommandLine()))
	g.measurement.CommandLine = hex.EncodeToString(sum[:])
	return g, nil
}

// prepare unpacks the kernel, links the Guard to it and builds the initramfs.
func (g *guests) prepare() error {
	installed, err := g.installed()
	if err != nil {
		return err
	}
	if g.kernel, err = kernel.Prepare(filepath.Join(g.n.conf.State, "kernel"), installed, kernel.SandboxModules()...); err != nil {
		return err
	}
	var bundle []byte
	if !g.n.conf.WithoutGuard {
		if bundle, err = linkGuard(g.kernel, installed); err != nil {
			return err
		}
	}
	agent := g.n.conf.GuestAgent
	if agent == "" {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find the guest agent: %w", err)
		}
		agent = filepath.Join(filepath.Dir(self), "hauberk-guest")
	}
	if g.initrd, err = g.kernel.Initrd(agent, bundle); err != nil {
		return err
	}
	sum := sha256.Sum256(bundle)
	g.measurement = wire.Measurement{Kernel: g.kernel.KernelDigest, Initrd: g.initrd.Digest, Agent: g.initrd.AgentDigest,
		Guard: hex.EncodeToString(sum[:]), GuardOff: g.n.conf.WithoutGuard}
	return nil
}

func (g *guests) installed() (kernel.Installed, error) {
	if g.n.conf.Kernel == "" {
		return kernel.Find("/", kernel.Flavour)
	}
	release, ok := bytes.CutPrefix([]byte(filepath.Base(g.n.conf.Kernel)), []byte("vmlinuz-"))
	if !ok {
		return kernel.Installed{}, fmt.Errorf("read --kernel %q: want the path of an installed kernel, such as /boot/vmlinuz-6.1.0-1-cloud-amd64", g.n.conf.Kernel)
	}
	return kernel.Installed{Release: string(release), Image: g.n.conf.Kernel, Modules: filepath.Join("/lib/modules", string(release))}, nil
}

// linkGuard fits the Guard's programs to the guest's kernel.
func linkGuard(k *kernel.Artefacts, installed kernel.Installed) ([]byte, error) {
	types, err := os.ReadFile(k.Types)
	if err != nil {
		return nil, fmt.Errorf("link guard: %w", err)
	}
	module, err := os.ReadFile(filepath.Join(installed.Modules, "kernel/fs/overlayfs/overlay.ko"))
	if err != nil {
		return nil, fmt.Errorf("link guard: %w", err)
	}
	overlay, err := kernel.Types(module)
	if err != nil {
		return nil, fmt.Errorf("link guard: overlay module: %w", err)
	}
	return guard.Link(bytes.NewReader(types), bytes.NewReader(overlay), k.BuildID)
}

func (g *guests) templateSpec(s spec.Sandbox) vm.TemplateSpec {
	return vm.TemplateSpec{
		Kernel:    vm.Blob{Path: g.kernel.Kernel, Digest: g.kernel.KernelDigest},
		Initrd:    vm.Blob{Path: g.initrd.Path, Digest: g.initrd.Digest},
		MemoryMiB: int(s.MemoryMiB), CPUs: int(s.CPUs), TrustDomain: g.n.keys.trustDomain(),
	}
}

// template returns the template for a size, made if it is the first.
func (g *guests) template(ctx context.Context, s spec.Sandbox) (*vm.Template, error) {
	return g.driver.Template(ctx, g.templateSpec(s), func(line string) { g.n.slog.Info("template: " + line) })
}

// clone starts a machine for an instance.
func (g *guests) clone(ctx context.Context, i wire.Instance, img image.Image, tap *os.File, user uint32, mac []byte) (*vm.Machine, error) {
	if err := image.Verify(img.Path, img.ErofsSHA256); err != nil {
		return nil, err
	}
	root, err := os.Open(img.Path)
	if err != nil {
		return nil, fmt.Errorf("clone %s: %w", i.ID, err)
	}
	defer root.Close()
	for try := 0; ; try++ {
		t, err := g.template(ctx, i.Spec.Sandbox)
		if err != nil {
			return nil, err
		}
		m, err := g.driver.Clone(ctx, t, vm.Spec{
			ID: i.ID, Template: g.templateSpec(i.Spec.Sandbox), UID: user, GID: user,
			Disks:    []vm.Disk{{File: root, Serial: rootSerial}},
			Networks: []vm.Network{{Tap: tap, MAC: mac}},
		})
		if errors.Is(err, vm.ErrTemplateClosed) && try == 0 {
			continue // another size pushed it out meanwhile
		}
		return m, err
	}
}

func (g *guests) adopt(ctx context.Context, id string) (*vm.Machine, error) {
	return g.driver.Adopt(ctx, filepath.Join(g.machines, id))
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
	if g.driver == nil {
		return nil
	}
	return g.driver.Close()
}
