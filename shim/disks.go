package shim

import (
	"context"
	"errors"
	"fmt"
	"os"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"hauberk.dev/image"
	"hauberk.dev/shim/volume"
	"hauberk.dev/vm"
)

// slots are the places for disks of a machine, and who has them. Roots take
// those for reading from the front, volumes from the back.
type slots struct {
	reading [vm.ReadOnlySlots]string
	writing [vm.WritableSlots]string
}

// take reserves the first free place of a list, or the last.
func take(list []string, who string, last bool) (n int, ok bool) {
	for i := range list {
		if last {
			i = len(list) - 1 - i
		}
		if list[i] == "" {
			list[i] = who
			return i, true
		}
	}
	return 0, false
}

// attach gives the guest the disk of a container's root, and says where.
func (b *box) attach(ctx context.Context, container string, img image.Image) (n int, err error) {
	b.mu.Lock()
	n, ok := take(b.slots.reading[:], container, false)
	b.mu.Unlock()
	if !ok {
		return 0, status.Errorf(codes.ResourceExhausted, "create container %q: a pod has places for %d containers and disks at a time", container, vm.ReadOnlySlots)
	}
	if n == 0 && b.first.Path != "" && b.first.Path == img.Path {
		return 0, nil // it started with it
	}
	defer func() {
		if err != nil {
			b.free(vm.ReadOnlySlot(n))
		}
	}()
	if err := image.Verify(img.Path, img.ErofsSHA256); err != nil {
		return 0, err
	}
	disk, err := os.Open(img.Path)
	if err != nil {
		return 0, fmt.Errorf("attach root of %s: %w", container, err)
	}
	defer disk.Close()
	return n, b.machine.Attach(ctx, vm.Disk{File: disk, Slot: vm.ReadOnlySlot(n)})
}

// free gives a place back.
func (b *box) free(s vm.Slot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := b.slots.reading[:]
	if s.Writable() {
		list = b.slots.writing[:]
	}
	list[s[1]-'0'] = ""
}

// detach takes a disk away again.
func (b *box) detach(ctx context.Context, s vm.Slot) error {
	if err := b.machine.Detach(ctx, s); err != nil {
		return err
	}
	b.free(s)
	return nil
}

// volumeMachine is what a pod's volumes ask of its machine.
type volumeMachine struct{ *box }

// Attach puts a volume's disk into a free place.
func (m volumeMachine) Attach(ctx context.Context, disk *os.File, writable bool) (serial string, err error) {
	m.mu.Lock()
	list, slot := m.slots.reading[:], vm.ReadOnlySlot
	if writable {
		list, slot = m.slots.writing[:], vm.WritableSlot
	}
	n, ok := take(list, "volume", true)
	m.mu.Unlock()
	if !ok {
		return "", fmt.Errorf("attach volume: all %d places of a machine are taken", len(list))
	}
	s := slot(n)
	if err := m.machine.Attach(ctx, vm.Disk{File: disk, Slot: s}); err != nil {
		m.free(s)
		return "", err
	}
	return string(s), nil
}

// Detach takes it away.
func (m volumeMachine) Detach(ctx context.Context, serial string) error {
	s := vm.Slot(serial)
	if err := s.Check(); err != nil {
		return err
	}
	return m.detach(ctx, s)
}

// Share lets the guest reach a file server.
func (m volumeMachine) Share(ctx context.Context, tag string, server *os.File) error {
	v, ok := m.machine.(*vm.Machine)
	if !ok || !m.shared {
		return errors.Join(volume.ErrNoShare, server.Close())
	}
	return v.Share(ctx, tag, server)
}

// volumeGuest is what they ask of its guest.
type volumeGuest struct{ *vm.Channel }

// Pull reads a file of one of the guest's directories.
func (g volumeGuest) Pull(ctx context.Context, dir, path string) ([]byte, error) {
	type puller interface {
		Pull(ctx context.Context, dir, path string) ([]byte, error)
	}
	c, ok := any(g.Channel).(puller)
	if !ok {
		return nil, errors.New("this agent gives no files back")
	}
	return c.Pull(ctx, dir, path)
}
