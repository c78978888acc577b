package pool

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/tinyelf"
	"hauberk.dev/vm"
)

// What a rehearsal runs: a program of a few bytes that writes one letter and
// ends.
const (
	programPath = "rehearse"
	letter      = "."
)

// rehearsed is the slot and the root that a rehearsal uses and leaves free.
const rehearsed = vm.ReadOnlySlots - 1

// Rehearsal brings a machine to where it waits by letting it do once what it
// will have to do at once later: mount a root, make a container, run a program.
// Translated code and the guest kernel's caches are warm then. It leaves nothing
// in the guest, whose identity it gets when it is taken.
type Rehearsal struct {
	// Disk holds an erofs image of Archive. Without it no container is made.
	Disk *os.File
	// Policy puts in force what lets the program run; nil does nothing.
	Policy func(context.Context, *vm.Channel) error
}

// Prepare rehearses.
func (r Rehearsal) Prepare(ctx context.Context, m *vm.Machine, c *vm.Channel) error {
	slot := vm.ReadOnlySlot(rehearsed)
	err := r.greet(ctx, c)
	if err == nil && r.Disk != nil {
		if err = m.Attach(ctx, vm.Disk{File: r.Disk, Slot: slot}); err == nil {
			err = contain(ctx, c, slot)
		}
		if err == nil {
			err = m.Detach(ctx, slot)
		}
	}
	if err != nil {
		return fmt.Errorf("rehearse: %w", err)
	}
	return nil
}

// greet does what comes before the first container.
func (r Rehearsal) greet(ctx context.Context, c *vm.Channel) error {
	if err := c.Reseed(ctx, vm.NewSeed("")); err != nil {
		return err
	}
	if err := c.Network(ctx, guestproto.Network{Interfaces: []guestproto.Interface{{
		Device: guestproto.DeviceMAC(0), Name: "eth0", MTU: 1500, NoIPv6: true,
	}}}); err != nil {
		return err
	}
	if r.Policy != nil {
		return r.Policy(ctx, c)
	}
	return nil
}

// contain makes a container, lets it run and forgets it.
func contain(ctx context.Context, c *vm.Channel, slot vm.Slot) error {
	if _, err := c.MountRoot(ctx, guestproto.MountRoot{Root: rehearsed, Serial: string(slot), UpperBytes: 1 << 20}); err != nil {
		return err
	}
	p, err := c.Create(ctx, guestproto.Create{
		Root: rehearsed, Hostname: "rehearsal", Files: []guestproto.File{{Path: "/etc/hosts", Mode: 0o644, Data: []byte("\n")}},
		Program: guestproto.Program{Args: []string{"/" + programPath}, Env: []string{"PATH=/"}},
	})
	if err != nil {
		return err
	}
	if err := p.Start(ctx); err != nil {
		return err
	}
	said, err := io.ReadAll(p.Stdout())
	if err != nil {
		return err
	}
	p.Discard()
	if st, err := p.Wait(ctx); err != nil || st.Code != 0 || string(said) != letter {
		return fmt.Errorf("the program said %.32q and ended with %d, %w", said, st.Code, err)
	}
	if err := p.Forget(ctx); err != nil {
		return err
	}
	return c.UnmountRoot(ctx, rehearsed)
}

// Archive is a tar archive of the root that a rehearsal runs its program in.
func Archive() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	var errs []error
	for _, dir := range []string{"./", "./etc/", "./proc/", "./sys/", "./dev/"} {
		errs = append(errs, w.WriteHeader(&tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755}))
	}
	p := program()
	errs = append(errs, w.WriteHeader(&tar.Header{Name: "./" + programPath, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(p))}))
	_, err := w.Write(p)
	err = errors.Join(append(errs, err, w.Close())...)
	return b.Bytes(), err
}

// program writes the letter and ends.
func program() []byte {
	return tinyelf.Program([]byte{
		0xb8, 1, 0, 0, 0, // mov eax, 1: write
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x8d, 0x35, 16, 0, 0, 0, // lea rsi, [rip+16]: the letter
		0xba, 1, 0, 0, 0, // mov edx, 1
		0x0f, 0x05, // syscall
		0xb8, 60, 0, 0, 0, // mov eax, 60: exit
		0x31, 0xff, // xor edi, edi
		0x0f, 0x05, // syscall
	}, letter)
}
