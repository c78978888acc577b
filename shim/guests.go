package shim

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/guard"
	"hauberk.dev/image"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/vm"
	"hauberk.dev/vm/qemu"
)

const (
	// uidBase is the first of the users that machines run as, far from those
	// of hauberk-node.
	uidBase  = 0x48480000
	uidCount = 1 << 16
	// rootSerial is how the guest finds its root.
	rootSerial = "root"
	// upperShare of the guest's memory may be written to the root.
	upperShare = 4
	// agentTime bounds the first answer of a guest's agent after a cold boot.
	agentTime = 60 * time.Second
)

// guests makes machines. Several shims share its directories.
type guests struct {
	conf   config
	log    *slog.Logger
	driver *qemu.Driver
	kernel *kernel.Artefacts
	initrd kernel.Initrd
	closed bool
}

// directories of a shim.
func (c config) machines() string { return filepath.Join(c.run, "vm") }
func (c config) images() string   { return filepath.Join(c.state, "images") }

// machineID names the machine of a container on this host.
func machineID(a arguments) string {
	sum := sha256.Sum256([]byte(a.address + "\x00" + a.namespace + "\x00" + a.id))
	return "c-" + hex.EncodeToString(sum[:12])
}

// openGuests prepares kernel, agent and Guard, and finds out what boots.
func openGuests(ctx context.Context, c config, log *slog.Logger) (*guests, error) {
	g := &guests{conf: c, log: log}
	for _, dir := range []string{c.state, c.run, c.machines(), c.images()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open guests: %w", err)
		}
	}
	unlock, err := lock(ctx, c.state) // others would make the same
	if err != nil {
		return nil, fmt.Errorf("open guests: %w", err)
	}
	defer unlock()
	if err := g.prepare(); err != nil {
		return nil, err
	}
	found, err := qemu.Probe(ctx, qemu.ProbeConfig{
		Kernel: g.kernelBlob(), Cache: filepath.Join(c.state, "accelerator"), Run: c.machines(), UID: uidBase, GID: uidBase,
	})
	if err != nil {
		return nil, err
	}
	if found.Notice != "" {
		log.Debug(found.Notice) // true of every container: not worth a line each
	}
	g.driver, err = qemu.Open(ctx, qemu.Config{Run: c.machines(), UID: uidBase, GID: uidBase, Accelerator: found.Accelerator})
	return g, err
}

func (g *guests) kernelBlob() vm.Blob {
	return vm.Blob{Path: g.kernel.Kernel, Digest: g.kernel.KernelDigest}
}

// prepare unpacks the kernel, links the Guard to it and builds the initramfs
// around the agent that lies beside this program.
func (g *guests) prepare() error {
	installed, err := kernel.Find("/", kernel.Flavour)
	if err != nil {
		return err
	}
	if g.kernel, err = kernel.Prepare(filepath.Join(g.conf.state, "kernel"), installed, kernel.SandboxModules()...); err != nil {
		return err
	}
	types, err := os.ReadFile(g.kernel.Types)
	if err != nil {
		return fmt.Errorf("link guard: %w", err)
	}
	module, err := os.ReadFile(filepath.Join(installed.Modules, "kernel/fs/overlayfs/overlay.ko"))
	if err != nil {
		return fmt.Errorf("link guard: %w", err)
	}
	bundle, err := guard.Link(bytes.NewReader(types), bytes.NewReader(module), g.kernel.BuildID)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the guest agent: %w", err)
	}
	g.initrd, err = g.kernel.Initrd(filepath.Join(filepath.Dir(self), "hauberk-guest"), bundle)
	return err
}

// boot starts a machine with a root. The lock lasts until the machine's journal
// names its user, so no two machines have the same.
func (g *guests) boot(ctx context.Context, id string, s size, img image.Image) (*vm.Machine, error) {
	if err := image.Verify(img.Path, img.ErofsSHA256); err != nil {
		return nil, err
	}
	disk, err := os.Open(img.Path)
	if err != nil {
		return nil, fmt.Errorf("boot %s: %w", id, err)
	}
	defer disk.Close()
	unlock, err := lock(ctx, g.conf.run)
	if err != nil {
		return nil, fmt.Errorf("boot %s: %w", id, err)
	}
	defer unlock()
	user, err := freeUser(g.conf.machines())
	if err != nil {
		return nil, fmt.Errorf("boot %s: %w", id, err)
	}
	return g.driver.Boot(ctx, vm.Spec{
		ID: id, UID: user, GID: user, Disks: []vm.Disk{{File: disk, Serial: rootSerial}},
		Template: vm.TemplateSpec{
			Kernel: g.kernelBlob(), Initrd: vm.Blob{Path: g.initrd.Path, Digest: g.initrd.Digest},
			MemoryMiB: s.memoryMiB, CPUs: s.processors, TrustDomain: "containerd",
		},
	})
}

// freeUser finds a user that no machine has. Nothing runs before its journal
// stands; one that cannot be read could name anybody.
func freeUser(machines string) (uint32, error) {
	found, err := vm.Orphans(machines)
	if err != nil {
		return 0, err
	}
	var taken []uint32
	for _, o := range found {
		if errors.Is(o.Err, fs.ErrNotExist) {
			continue
		}
		if o.Journal.UID == 0 {
			return 0, fmt.Errorf("find a free user: run directory %s: %w", o.Dir, o.Err)
		}
		taken = append(taken, o.Journal.UID)
	}
	for n := uint32(1); n < uidCount; n++ {
		if !slices.Contains(taken, uidBase+n) {
			return uidBase + n, nil
		}
	}
	return 0, errors.New("find a free user: all are taken")
}

// Close frees the driver. Machines run on.
func (g *guests) Close() error {
	if g.driver == nil || g.closed {
		return nil
	}
	g.closed = true
	return g.driver.Close()
}

// lock lets one process at a time pass. The kernel frees it with the file.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, context.Cause(ctx)), f.Close())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// newSeed is what makes a guest its own: entropy, clock and names.
func newSeed(hostname string) guestproto.Reseed {
	seed := guestproto.Reseed{UnixNanos: time.Now().UnixNano(), Hostname: hostname}
	var ids [32]byte
	rand.Read(seed.Entropy[:]) // never fails
	rand.Read(ids[:])
	seed.MachineID = hex.EncodeToString(ids[:16])
	u := ids[16:]
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80 // RFC 9562, version 4
	seed.BootID = fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
	return seed
}
