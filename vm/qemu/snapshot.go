package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"hauberk.dev/vm"
)

// bandwidth does not hold back the writing of a state.
const bandwidth = 1 << 40

// Save writes the guest's state with its memory.
func (m *monitor) Save(ctx context.Context, state *os.File) (saved vm.Saved, err error) {
	m.plugging.Lock()
	defer m.plugging.Unlock()
	if saved, err = m.inventory(ctx); err != nil {
		return saved, err
	}
	if err := ignoreShared(ctx, m, false); err != nil {
		return saved, err
	}
	if err := m.execute(ctx, "migrate-set-parameters", map[string]int64{"max-bandwidth": bandwidth}, nil); err != nil {
		return saved, err
	}
	was, err := m.status(ctx)
	if err != nil {
		return saved, err
	}
	if err := m.Pause(ctx); err != nil {
		return saved, err
	}
	err = migrate(ctx, m, state)
	after := context.WithoutCancel(ctx) // a guest must not stand still for ever
	if err != nil {
		_ = m.execute(after, "migrate_cancel", nil, nil) // it may have failed by itself
	}
	if was == "running" {
		err = errors.Join(err, m.goOn(after))
	}
	return saved, err
}

// goOn lets a guest run again once the monitor is done with its state.
func (m *monitor) goOn(ctx context.Context) error {
	err := await(ctx, func() (bool, error) {
		s, err := m.status(ctx)
		return s != "finish-migrate", err
	})
	if err != nil {
		return err
	}
	return m.Resume(ctx)
}

// inventory is what a guest has that its board has not, or not always.
func (m *monitor) inventory(ctx context.Context) (saved vm.Saved, err error) {
	for _, s := range vm.Slots() {
		node, err := m.drive(ctx, s)
		if err != nil {
			return saved, err
		}
		if node != emptyNode(s) {
			saved.Slots = append(saved.Slots, s)
		}
	}
	var devices []struct {
		Name string `json:"name"`
	}
	if err := m.execute(ctx, "qom-list", map[string]string{"path": strings.TrimSuffix(peripheral, "/")}, &devices); err != nil {
		return saved, err
	}
	for _, d := range devices {
		switch {
		case d.Name == shareID:
			return saved, errors.New("a guest with a share cannot be saved")
		case strings.HasPrefix(d.Name, "nic"):
			saved.Networks++
		}
	}
	return saved, nil
}

// Restore starts a machine from a state that was saved.
func (d *Driver) Restore(ctx context.Context, s vm.Snapshot, state *os.File, spec vm.Spec) (*vm.Machine, error) {
	m, err := d.restore(ctx, s, state, spec)
	if err != nil {
		return nil, fmt.Errorf("restore machine %q: %w", spec.ID, err)
	}
	return m, nil
}

func (d *Driver) restore(ctx context.Context, s vm.Snapshot, state *os.File, spec vm.Spec) (*vm.Machine, error) {
	if err := errors.Join(spec.Check(), vm.CheckFit(s, spec)); err != nil {
		return nil, err
	}
	if err := vm.CheckOrigin(s, d.key(spec.Template), d.origin(spec.Template)); err != nil {
		return nil, err
	}
	memory, err := memfd("guest", int64(spec.Template.MemoryMiB)<<20)
	if err != nil {
		return nil, err
	}
	defer memory.Close()
	own, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", state.Fd())) // with a position of its own
	if err != nil {
		return nil, err
	}
	defer own.Close()
	m, _, err := d.launch(ctx, launch{
		spec: spec, role: roleClone, memory: memory, saved: true,
		begin: func(ctx context.Context, mon *monitor) error { return restore(ctx, mon, own, false) },
	})
	return m, err
}

// Fork starts a machine that is a copy of another, which stands still for a
// moment. The copy must be made a machine of its own, as a clone must.
func (d *Driver) Fork(ctx context.Context, m *vm.Machine, spec vm.Spec) (*vm.Machine, error) {
	state, err := memfd("fork", 0)
	if err != nil {
		return nil, fmt.Errorf("fork machine %s: %w", m.ID(), err)
	}
	defer state.Close()
	s, err := m.Save(ctx, state)
	if err != nil {
		return nil, err
	}
	return d.Restore(ctx, s, state, spec)
}
