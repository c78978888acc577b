package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/internal/tinyelf"
	"hauberk.dev/vm"
)

const (
	// probeDeadline is how long hardware that works may take. A kernel boots
	// in a fraction of it; broken virtualisation often just never returns.
	probeDeadline = 2500 * time.Millisecond
	probeWord     = "hauberk: a guest ran to user mode"
	probeName     = "accelerator.json"
)

// ProbeConfig is what a probe needs.
type ProbeConfig struct {
	Kernel vm.Blob
	// Run is a directory for the guest's run directory.
	Run string
	// UID and GID of the probing QEMU.
	UID, GID uint32
	// Cache is a directory to remember the outcome in; empty remembers
	// nothing. It holds for one boot of the host, one QEMU and one kernel.
	Cache string
}

// Probed is the outcome of a probe.
type Probed struct {
	Accelerator Accelerator `json:"accelerator"`
	// Notice, if not empty, says to a person why sandboxes are slow.
	Notice string `json:"notice,omitempty"`
	// For what it holds.
	Version string `json:"version"`
	BootID  string `json:"bootID"`
	Kernel  string `json:"kernel"`
}

// Probe finds the accelerator by booting a guest to user mode with it: that
// /dev/kvm opens says nothing. It takes at most about three seconds.
func Probe(ctx context.Context, c ProbeConfig) (Probed, error) {
	version, err := Version(ctx)
	if err != nil {
		return Probed{}, fmt.Errorf("probe accelerator: %w", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Probed{}, fmt.Errorf("probe accelerator: %w", err)
	}
	p := Probed{Accelerator: KVM, Version: version, BootID: strings.TrimSpace(string(boot)), Kernel: c.Kernel.Digest}
	if known, ok := remembered(c.Cache, p); ok {
		return known, nil
	}
	if err := c.try(ctx, KVM, probeDeadline); err != nil {
		if ctx.Err() != nil {
			return Probed{}, fmt.Errorf("probe accelerator: %w", context.Cause(ctx))
		}
		p.Accelerator = TCG
		p.Notice = fmt.Sprintf("no hardware virtualisation (%v): sandboxes run translated code, about ten times slower", err)
	}
	if c.Cache == "" {
		return p, nil
	}
	raw, err := json.Marshal(p)
	if err != nil {
		return p, fmt.Errorf("probe accelerator: %w", err)
	}
	return p, errors.Join(os.MkdirAll(c.Cache, 0o755), atomicfile.Write(filepath.Join(c.Cache, probeName), raw, 0o644))
}

// remembered reads what an earlier probe found under the same circumstances.
func remembered(cache string, now Probed) (Probed, bool) {
	if cache == "" {
		return Probed{}, false
	}
	raw, err := os.ReadFile(filepath.Join(cache, probeName))
	var p Probed
	if err != nil || len(raw) > 1<<16 || json.Unmarshal(raw, &p) != nil {
		return Probed{}, false
	}
	known := p.Version == now.Version && p.BootID == now.BootID && p.Kernel == now.Kernel
	return p, known && (p.Accelerator == KVM || p.Accelerator == TCG)
}

// try boots a guest that says one word, and waits for the word.
func (c ProbeConfig) try(ctx context.Context, a Accelerator, patience time.Duration) (err error) {
	for _, name := range a.devices() {
		if _, err := os.Stat("/dev/" + name); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("there is no /dev/%s", name)
		}
	}
	initrd, err := probeInitrd()
	if err != nil {
		return err
	}
	defer initrd.Close()
	path := fmt.Sprintf("/proc/self/fd/%d", initrd.Fd())
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(raw)
	d, err := Open(ctx, Config{Run: c.Run, UID: c.UID, GID: c.GID, Accelerator: a, scratch: true})
	if err != nil {
		return err
	}
	defer d.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("no guest ran within %v", patience))
	defer cancel()
	m, err := d.Boot(ctx, vm.Spec{ID: "probe-" + string(a), UID: c.UID, GID: c.GID, Template: vm.TemplateSpec{
		Kernel: c.Kernel, Initrd: vm.Blob{Path: path, Digest: hex.EncodeToString(sum[:])},
		MemoryMiB: vm.MinMemoryMiB, CPUs: 1, TrustDomain: "probe",
	}})
	if err != nil {
		return err
	}
	err = await(ctx, func() (bool, error) { return strings.Contains(m.Console(), probeWord), m.Err() })
	return errors.Join(err, m.Kill(context.WithoutCancel(ctx)))
}

// probeInitrd is an initramfs with the smallest program as /init.
func probeInitrd() (*os.File, error) {
	raw, err := kernel.Archive(kernel.File{Name: "init", Mode: 0o755, Data: probeProgram()})
	if err != nil {
		return nil, err
	}
	f, err := memfd("probe", 0)
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(raw); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// probeProgram writes one line and sleeps: write(1, word, length), then pause()
// without end.
func probeProgram() []byte {
	word := probeWord + "\n"
	return tinyelf.Program([]byte{
		0xb8, 1, 0, 0, 0, // mov eax, 1
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x8d, 0x35, 16, 0, 0, 0, // lea rsi, [rip+16]: the word
		0xba, byte(len(word)), 0, 0, 0, // mov edx, length
		0x0f, 0x05, // syscall
		0xb8, 34, 0, 0, 0, // mov eax, 34
		0x0f, 0x05, // syscall
		0xeb, 0xf7, // jmp back to mov eax, 34
	}, word)
}
