package qemu

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/vm"
)

const hostname = "/proc/sys/kernel/hostname"

// TestSnapshot saves a running clone, restores it twice, and forks it. Each goes
// on from where the state was taken, and draws other random numbers than the
// others.
func TestSnapshot(t *testing.T) {
	spec := needMachine(t)
	run, ctx := filepath.Join(t.TempDir(), "run"), deadline(t)
	d := driver(t, run)
	template, err := d.Template(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	disk := vm.Disk{File: image(t, "the-root"), Slot: "r3"}
	first := machine(0, spec)
	first.Networks = []vm.Network{{Tap: tap(t)}, {Tap: tap(t)}}
	m, err := d.Clone(ctx, template, first)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Attach(ctx, disk); err != nil {
		t.Fatal(err)
	}
	a := converse(t, ctx, m)
	say(t, a, "rescan")
	say(t, a, "write "+hostname+" early")
	a.conn.Close() // a saved guest shall see that its host left
	dir := filepath.Join(t.TempDir(), "saved")
	began := time.Now()
	if _, err := m.Snapshot(ctx, dir, []byte(`{"a":"<b>"}`)); err != nil {
		t.Fatal(err)
	}
	t.Logf("saved in %v", time.Since(began).Round(time.Millisecond))
	a = converse(t, ctx, m)
	say(t, a, "write "+hostname+" late")
	if _, err := m.Snapshot(ctx, dir, nil); !errors.Is(err, os.ErrExist) {
		t.Errorf("a snapshot over another: %v", err)
	}

	seen := map[string]bool{}
	is := func(m *vm.Machine, name string, n byte) {
		t.Helper()
		a := converse(t, ctx, m)
		if got := say(t, a, "read "+hostname); got != name {
			t.Errorf("machine %s is %q, want %q", m.ID(), got, name)
		}
		if got := say(t, a, "read "+device(t, a, "r3")); got != "the-root" {
			t.Errorf("machine %s reads %q", m.ID(), got)
		}
		say(t, a, "reseed "+hex.EncodeToString(append(make([]byte, 31), n)))
		random := say(t, a, "random")
		if seen[random] || len(random) != 32 {
			t.Errorf("machine %s draws %q again", m.ID(), random)
		}
		seen[random] = true
		confined(t, m)
		if err := m.Kill(ctx); err != nil {
			t.Error(err)
		}
	}
	spare := func(i int) vm.Spec {
		s := machine(i, spec)
		s.Disks, s.Networks = []vm.Disk{disk}, []vm.Network{{Tap: tap(t)}, {Tap: tap(t)}}
		return s
	}
	for i := range 2 {
		s, state, err := vm.OpenSnapshot(dir)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		again, err := d.Restore(ctx, s, state, spare(1+i))
		state.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("restored %d MiB in %v", s.Bytes>>20, time.Since(began).Round(time.Millisecond))
		is(again, "early", byte(i))
	}
	if _, err := m.Save(ctx, full{}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("save to a full disk: %v", err)
	}
	if got := say(t, a, "ping"); got != "pong" {
		t.Errorf("after that the guest says %q", got)
	}
	a.conn.Close()
	forked, err := d.Fork(ctx, m, spare(3))
	if err != nil {
		t.Fatal(err)
	}
	is(forked, "late", 8)
	is(m, "late", 9)
	refusesSnapshots(t, ctx, d, dir, spare(4))
	if left, err := vm.Orphans(run); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// full is a disk without room.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, unix.ENOSPC }

// refusesSnapshots damages a snapshot and asks for machines it does not fit.
func refusesSnapshots(t *testing.T, ctx context.Context, d *Driver, dir string, good vm.Spec) {
	t.Helper()
	s, state, err := vm.OpenSnapshot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer state.Close()
	for name, edit := range map[string]func(*vm.Spec){
		"memory":  func(s *vm.Spec) { s.Template.MemoryMiB *= 2 },
		"disk":    func(s *vm.Spec) { s.Disks = nil },
		"slot":    func(s *vm.Spec) { s.Disks[0].Slot = "r4" },
		"network": func(s *vm.Spec) { s.Networks = nil },
	} {
		other := good
		other.Disks = append([]vm.Disk{}, good.Disks...)
		edit(&other)
		if _, err := d.Restore(ctx, s, state, other); !errors.Is(err, vm.ErrWrongTemplate) {
			t.Errorf("another %s: %v, want %v", name, err, vm.ErrWrongTemplate)
		}
	}
	path := filepath.Join(dir, "state")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	altered := append([]byte{}, whole...)
	altered[len(altered)/2] ^= 1
	for name, content := range map[string][]byte{"truncated": whole[:len(whole)-1], "altered": altered, "empty": nil} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := vm.OpenSnapshot(dir); !errors.Is(err, vm.ErrDamaged) {
			t.Errorf("%s state: %v, want %v", name, err, vm.ErrDamaged)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "snapshot.json"), []byte(`{"version":2}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := vm.OpenSnapshot(dir); !errors.Is(err, vm.ErrDamaged) {
		t.Errorf("a manifest of nothing: %v", err)
	}
}
