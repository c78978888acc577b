package guard

import (
	"context"
	"os"
	"strings"
	"syscall"
	"testing"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/vm"
)

// devices: a container uses the devices that it was given, none beside them, and
// no other container uses those. The policy in force allows all that one can.
func (s *sandbox) devices(t *testing.T, ctx context.Context) {
	t.Helper()
	const all = 1<<41 - 1
	rights := guestproto.Program{
		Rights: guestproto.Rights{Given: true, Bounding: all, Effective: all, Permitted: all}, Seccomp: guestproto.Seccomp{Mode: guestproto.SeccompNone},
	}
	start := func(devices ...guestproto.Device) *vm.Process {
		t.Helper()
		serve := rights
		serve.Args = []string{"/attack", "serve"}
		p, err := s.c.Create(ctx, guestproto.Create{Devices: devices, Program: serve})
		if err == nil {
			err = p.Start(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	disk := guestproto.Device{Path: "/dev/data", Kind: 'b', Serial: "w0", Mode: 0o640}
	given := start(disk, guestproto.Device{Path: "/dev/fuse", Kind: 'c', Major: 10, Minor: 229, Mode: 0o666})
	other := start()
	// The disks are those of the machine in order, 16 numbers apart.
	check := func(where string, in *vm.Process, want map[string]int) {
		t.Helper()
		for run, code := range want {
			if got := s.runAs(t, ctx, in, rights, run); got != code {
				t.Errorf("%s: %s: exit %d, want %d", where, run, got, code)
			}
		}
	}
	check("given", given, map[string]int{
		"overwrite /dev/data": 0, "beside /dev/data 0": 0, "beside /dev/data 16": 10, "beside=2 /dev/data -16": 10, "opennode b 254 32": 10,
		"opennode c 10 229": 0, "opennode c 10 200": 10, "opennode c 10 228": 10, "opennode b 10 229": 10, "opennode c 254 16": 10, "opennode c 1 1": 10,
	})
	check("not given", other, map[string]int{"opennode b 254 16": 10, "opennode b 254 32": 10, "opennode c 10 229": 10, "opennode c 1 3": 0})
	raw, err := os.ReadFile(s.disks[0])
	if err != nil || !strings.HasPrefix(string(raw), "x") {
		t.Errorf("the disk begins with %q, %v", raw[:min(len(raw), 8)], err)
	}
	// Whoever has a disk may mount it, and nobody else.
	check("given", given, map[string]int{"mountnew /dev/data ext4": 0})
	check("not given", other, map[string]int{"mountnew /dev/24576-65040 ext4": 10})
	s.told(t, OpDevice, Denied)
	for _, p := range []*vm.Process{given, other} {
		p.Discard()
		if err := p.Signal(ctx, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if _, err := p.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		if err := p.Forget(ctx); err != nil {
			t.Fatal(err)
		}
	}
	// What a container was given is nobody's after it.
	third := start()
	check("after it", third, map[string]int{"opennode b 254 16": 10})
	third.Discard()
	_ = third.Signal(ctx, syscall.SIGKILL)
	if _, err := third.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if err := third.Forget(ctx); err != nil {
		t.Fatal(err)
	}
}
