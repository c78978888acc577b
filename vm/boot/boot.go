// Package boot prepares what guests boot from: the kernel, the agent and the
// Guard in an initramfs, kept in a cache; the accelerator that really boots
// them; and the driver that starts them.
//
// It starts nothing but the probe, and knows no sandbox. Several processes may
// share its directories.
package boot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"hauberk.dev/api/node"
	"hauberk.dev/internal/flock"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/vm"
	"hauberk.dev/vm/qemu"
)

// Link fits the Guard's programs to a guest's kernel, by the type information
// of the kernel and of its overlay module, nil where that is built in. buildID
// names the kernel.
type Link func(kernel, overlay io.ReaderAt, buildID string) (bundle []byte, err error)

// Config says what to boot.
type Config struct {
	// State keeps what is prepared, Run holds the run directories of machines.
	// Both are made if they are missing.
	State, Run string
	// User runs the machines that make templates and probe.
	User uint32
	// Kernel is an installed kernel's image or a series such as 6.12, Agent the
	// agent's program. Empty means the newest of kernel.Flavour, and the one
	// beside this program.
	Kernel, Agent string
	// Link makes the Guard's bundle. nil boots guests without the Guard.
	Link Link
	// Driver is how the driver is set up, but for what is said above.
	Driver qemu.Config
}

func (c Config) cache() string { return filepath.Join(c.State, "kernel") }

// Guest is what guests boot from, and the driver that boots them.
type Guest struct {
	Driver *qemu.Driver
	Kernel *kernel.Artefacts
	Initrd kernel.Initrd
	// Accelerator runs the guests; Notice, if not empty, says to a person why
	// they are slow.
	Accelerator qemu.Accelerator
	Notice      string

	bundle []byte
}

// Open prepares a guest, or finds it prepared, and opens the driver.
func Open(ctx context.Context, c Config) (_ *Guest, err error) {
	for _, dir := range []string{c.State, c.Run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("prepare guest: %w", err)
		}
	}
	release, err := flock.Take(ctx, filepath.Join(c.State, ".lock")) // others would make the same
	if err != nil {
		return nil, fmt.Errorf("prepare guest: %w", err)
	}
	defer release()
	g := &Guest{}
	if err := g.prepare(c); err != nil {
		return nil, fmt.Errorf("prepare guest: %w", err)
	}
	found, err := qemu.Probe(ctx, qemu.ProbeConfig{Kernel: g.kernelBlob(), Cache: c.cache(), Run: c.Run, UID: c.User, GID: c.User})
	if err != nil {
		return nil, err
	}
	g.Accelerator, g.Notice = found.Accelerator, found.Notice
	d := c.Driver
	d.Run, d.UID, d.GID, d.Accelerator = c.Run, c.User, c.User, found.Accelerator
	if g.Driver, err = qemu.Open(ctx, d); err != nil {
		return nil, err
	}
	if !g.Driver.Bounded() {
		g.Notice = strings.TrimPrefix(g.Notice+"; no cgroup bounds the memory of machines, only what their guests are given", "; ")
	}
	return g, nil
}

// Close frees the driver and its templates. Machines run on. It may be called
// again.
func (g *Guest) Close() error {
	if g.Driver == nil {
		return nil
	}
	d := g.Driver
	g.Driver = nil
	return d.Close()
}

func (g *Guest) kernelBlob() vm.Blob {
	return vm.Blob{Path: g.Kernel.Kernel, Digest: g.Kernel.KernelDigest}
}

// Template describes guests of a size that trust each other.
func (g *Guest) Template(memoryMiB, cpus int, trustDomain string) vm.TemplateSpec {
	return vm.TemplateSpec{
		Kernel: g.kernelBlob(), Initrd: vm.Blob{Path: g.Initrd.Path, Digest: g.Initrd.Digest},
		MemoryMiB: memoryMiB, CPUs: cpus, TrustDomain: trustDomain,
	}
}

// Clone starts a machine from the template of its kind, which is made if it is
// not there. It says how that goes to progress, which may be nil.
func (g *Guest) Clone(ctx context.Context, spec vm.Spec, progress func(string)) (*vm.Machine, error) {
	for again := false; ; again = true {
		t, err := g.Driver.Template(ctx, spec.Template, progress)
		if err != nil {
			return nil, err
		}
		m, err := g.Driver.Clone(ctx, t, spec)
		if errors.Is(err, vm.ErrTemplateClosed) && !again {
			continue // another size pushed it out meanwhile
		}
		return m, err
	}
}

// Measurement is the digests of everything that decides what a guest is.
func (g *Guest) Measurement() node.Measurement {
	return node.Measurement{
		Kernel: g.Kernel.KernelDigest, Initrd: g.Initrd.Digest, Agent: g.Initrd.AgentDigest,
		CommandLine: digest([]byte(g.Driver.CommandLine())), Guard: digest(g.bundle), GuardOff: g.bundle == nil,
	}
}

// Bundle is the Guard's bundle; empty if guests boot without it.
func (g *Guest) Bundle() []byte { return g.bundle }

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// prepare unpacks the kernel, links the Guard to it and builds the initramfs.
func (g *Guest) prepare(c Config) error {
	installed, err := Find(c.Kernel)
	if err != nil {
		return err
	}
	if g.Kernel, err = kernel.Prepare(c.cache(), installed, kernel.SandboxModules()...); err != nil {
		return err
	}
	if c.Link != nil {
		if g.bundle, err = link(c.Link, g.Kernel); err != nil {
			return err
		}
	}
	agent := c.Agent
	if agent == "" {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find the guest agent: %w", err)
		}
		agent = filepath.Join(filepath.Dir(self), "hauberk-guest")
	}
	g.Initrd, err = g.Kernel.Initrd(agent, g.bundle)
	return err
}

// Find gives the installed kernel that a configuration names.
func Find(want string) (kernel.Installed, error) {
	switch {
	case want == "":
		return kernel.Find("/", kernel.Flavour)
	case strings.Contains(want, "/"):
		return kernel.At(filepath.Dir(filepath.Dir(want)), want) // its modules lie beside boot
	}
	return kernel.Find("/", kernel.Series(want, kernel.Flavour))
}

// link reads the type information and links the Guard.
func link(f Link, k *kernel.Artefacts) ([]byte, error) {
	types, err := os.ReadFile(k.Types)
	if err != nil {
		return nil, fmt.Errorf("link guard: %w", err)
	}
	var module io.ReaderAt
	switch overlay, err := k.Module("overlay"); {
	case err == nil:
		module = bytes.NewReader(overlay)
	case !errors.Is(err, kernel.ErrBuiltIn):
		return nil, fmt.Errorf("link guard: %w", err)
	}
	bundle, err := f(bytes.NewReader(types), module, k.BuildID)
	if err == nil && len(bundle) == 0 {
		err = errors.New("link guard: the bundle is empty")
	}
	return bundle, err
}
