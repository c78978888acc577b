// Package vm makes the machine that a sandbox is: from a template by copy on
// write or cold, with its disks and network, and the channel to the agent in
// it. It is where a machine is started, paused, found again and ended.
//
// What is here holds for every machine monitor; a driver per monitor lives
// below (vm/qemu). The package knows no workload and no policy, and takes both
// the guest and the monitor to be hostile once a guest runs: a monitor sees
// open files and nothing else, and what it says is bounded.
//
// Machines outlive the process that made them. Each has a run directory, owned
// by root, with a journal that names its process by number and start time;
// Adopt takes a machine up again, Orphans lists what is there.
package vm

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"sync"

	"hauberk.dev/internal/snapshot"
)

// Driver starts machines with one kind of monitor.
type Driver interface {
	// Template boots a guest up to its agent and freezes it, or returns the
	// template of the same key made before. It says how it goes to progress,
	// which may be nil.
	Template(ctx context.Context, spec TemplateSpec, progress func(string)) (*Template, error)
	// Clone starts a machine from a template. The guest runs when it returns;
	// its entropy, clock and names are still the template's.
	Clone(ctx context.Context, t *Template, spec Spec) (*Machine, error)
	// Boot starts a machine from its kernel.
	Boot(ctx context.Context, spec Spec) (*Machine, error)
	// Restore starts a machine from a state that Save wrote, which it reads from
	// the file. The guest runs when it returns; its entropy, clock and names are
	// those of the machine saved.
	Restore(ctx context.Context, s Snapshot, state *os.File, spec Spec) (*Machine, error)
	// Adopt takes up the machine of a run directory whose process lives on.
	Adopt(ctx context.Context, dir string) (*Machine, error)
}

// Errors to branch on.
var (
	// ErrTemplateClosed says that a template was given up; ask for it again.
	ErrTemplateClosed = errors.New("template is closed")
	// ErrWrongTemplate says that a template was made for another guest, size
	// or trust domain than the machine asks for.
	ErrWrongTemplate = errors.New("template was made for something else")
	// ErrGone says that the process of a run directory is no more.
	ErrGone = errors.New("machine has ended")
	// ErrUnfinished says that whoever started the machine never finished.
	ErrUnfinished = errors.New("machine was never finished")
	// ErrNotShared says that no file server can reach a machine's memory.
	ErrNotShared = errors.New("machine was not started for shares")
	// ErrSlotTaken says that a slot has a disk already.
	ErrSlotTaken = errors.New("slot is taken")
	// ErrDamaged says that a snapshot is not what was written.
	ErrDamaged = snapshot.ErrDamaged
	// ErrKilled is why a machine ended that Kill ended.
	ErrKilled = errors.New("machine was killed")
)

// Blob is a file a machine boots from and what it must hold.
type Blob struct {
	Path   string
	Digest string // SHA-256, lower-case hexadecimal
}

// TemplateSpec is everything that makes two machines start alike.
type TemplateSpec struct {
	Kernel Blob // uncompressed ELF
	Initrd Blob // with agent, modules and Guard
	// MemoryMiB and CPUs of the guest.
	MemoryMiB int
	CPUs      int
	// TrustDomain keeps templates apart: clones of one share pages and the
	// layout of their kernel, so those who do not trust each other must not.
	TrustDomain string
}

// Bounds on a machine. In less memory than the least a kernel has no room for its
// modules, the agent and the verifier of the Guard's programs.
const (
	MinMemoryMiB = 96
	MaxMemoryMiB = 1 << 20
	MaxCPUs      = 64
	MaxNetworks  = 4
)

// Check says what of a template's description is out of range.
func (s TemplateSpec) Check() error {
	switch {
	case s.MemoryMiB < MinMemoryMiB || s.MemoryMiB > MaxMemoryMiB:
		return fmt.Errorf("memory of %d MiB is not from %d to %d", s.MemoryMiB, MinMemoryMiB, MaxMemoryMiB)
	case s.CPUs < 1 || s.CPUs > MaxCPUs:
		return fmt.Errorf("%d CPUs are not from 1 to %d", s.CPUs, MaxCPUs)
	case s.TrustDomain == "":
		return errors.New("no trust domain is named")
	}
	for what, b := range map[string]Blob{"kernel": s.Kernel, "initrd": s.Initrd} {
		if raw, err := hex.DecodeString(b.Digest); err != nil || len(raw) != 32 {
			return fmt.Errorf("%s digest %q is not a SHA-256 in hexadecimal", what, b.Digest)
		}
		if b.Path == "" {
			return fmt.Errorf("%s has no path", what)
		}
	}
	return nil
}

// Spec is one machine.
type Spec struct {
	// ID names the run directory: letters, digits and hyphens, at most 63.
	ID string
	// Template is what Boot boots, and what the template given to Clone must
	// have been made of.
	Template TemplateSpec
	// UID and GID are the monitor's, and no other machine's.
	UID, GID uint32
	Disks    []Disk
	// Networks are the guest's devices, in order. Without any the guest still
	// has the first, on a tap that leads nowhere.
	Networks []Network
	// Spare machines are nobody's until they become somebody's.
	Spare bool
	// Journaled, if not nil, is called when the machine's journal stands: from
	// then on all can see that its user is taken.
	Journaled func()
	// Shared lets file servers reach the guest's memory. A clone then has a copy
	// of its template's instead of what it changes alone.
	Shared bool
	// DiskLimit is how large, in bytes, a writable disk may be that is attached
	// later. One that is there at the start may be as large as it is.
	DiskLimit int64
}

// Slot is a place for a disk. Every machine has all of them, empty or not; the
// guest finds a slot's disk by its serial, which is the slot's name. Of an
// empty slot the guest reads zeros.
//
// A guest takes every disk to be as large as an empty slot, for it keeps what
// its template saw. What lies on a disk must know its own size.
type Slot string

// How many slots there are: r0 to r7 can only be read, w0 and w1 be written too.
const (
	ReadOnlySlots = 8
	WritableSlots = 2
	MaxDisks      = ReadOnlySlots + WritableSlots
)

// Slots lists all slots.
func Slots() (all []Slot) {
	for i := range ReadOnlySlots {
		all = append(all, ReadOnlySlot(i))
	}
	for i := range WritableSlots {
		all = append(all, WritableSlot(i))
	}
	return all
}

// ReadOnlySlot is the i-th slot for a disk that is only read.
func ReadOnlySlot(i int) Slot { return Slot("r" + strconv.Itoa(i)) }

// WritableSlot is the i-th slot for a disk that can be written.
func WritableSlot(i int) Slot { return Slot("w" + strconv.Itoa(i)) }

// Writable says whether the guest may write to the slot's disk.
func (s Slot) Writable() bool { return s[0] == 'w' }

// Check says whether there is such a slot.
func (s Slot) Check() error {
	if !slices.Contains(Slots(), s) {
		return fmt.Errorf("no slot is called %q", string(s))
	}
	return nil
}

// Disk is what is in a slot. The file stays the caller's.
type Disk struct {
	File *os.File
	Slot Slot
}

// Network is a network device of the guest on a tap device, opened with
// IFF_NO_PI and IFF_VNET_HDR. The file stays the caller's. The device's hardware
// address is guestproto.DeviceMAC of its place until the guest changes it. The
// guest of a clone has the first one when it runs, and finds others by a rescan.
type Network struct {
	Tap *os.File
}

var idPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Check says what of a machine's description is out of range.
func (s Spec) Check() error {
	switch {
	case !idPattern.MatchString(s.ID):
		return fmt.Errorf("id %q is not letters, digits and hyphens, at most 63", s.ID)
	case s.UID == 0 || s.GID == 0:
		return errors.New("the monitor must not run as root")
	case len(s.Networks) > MaxNetworks:
		return fmt.Errorf("%d networks are more than %d", len(s.Networks), MaxNetworks)
	}
	taken := map[Slot]bool{}
	for i, d := range s.Disks {
		if err := d.Slot.Check(); err != nil || d.File == nil || taken[d.Slot] {
			return fmt.Errorf("disk %d needs a file and a slot of its own, not %q", i, string(d.Slot))
		}
		taken[d.Slot] = true
	}
	for i, n := range s.Networks {
		if n.Tap == nil {
			return fmt.Errorf("network %d needs a tap", i)
		}
	}
	return s.Template.Check()
}

// Template is a frozen guest in sealed memory. It lives in the files of this
// process and ends with it: nothing on a disk could be altered, and a process
// that starts anew makes its templates anew, in about two seconds.
type Template struct {
	// Key is a digest of everything the frozen state depends on.
	Key string
	// CommandLine the guest booted with.
	CommandLine string

	mu            sync.RWMutex
	memory, state *os.File
}

// NewTemplate makes a template of a guest's memory and its devices' state,
// which are the template's from then on. Both must be sealed against writing.
func NewTemplate(key, commandLine string, memory, state *os.File) *Template {
	return &Template{Key: key, CommandLine: commandLine, memory: memory, state: state}
}

// Use gives f the template's files, which stay open until f returns.
func (t *Template) Use(f func(memory, state *os.File) error) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.memory == nil {
		return ErrTemplateClosed
	}
	return f(t.memory, t.state)
}

// Close frees the template. Machines cloned from it run on.
func (t *Template) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.memory == nil {
		return nil
	}
	err := errors.Join(t.memory.Close(), t.state.Close())
	t.memory, t.state = nil, nil
	return err
}
