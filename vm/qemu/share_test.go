package qemu

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"hauberk.dev/vm"
)

const fileServer = "/usr/lib/qemu/virtiofsd"

// serveFiles starts a file server for a directory and connects to it.
func serveFiles(t *testing.T, dir string) *os.File {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "fs")
	server := exec.Command(fileServer, "--socket-path="+socket, "-o", "source="+dir, "-o", "sandbox=chroot")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Process.Kill(); server.Wait() })
	for until := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			defer conn.Close()
			f, err := conn.(*net.UnixConn).File()
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
		if time.Now().After(until) {
			t.Fatal(err)
		}
	}
}

// TestShare gives a running clone with memory of its own, and a machine that was
// booted, a file system of the host; a clone that shares its template's memory
// cannot have one.
func TestShare(t *testing.T) {
	spec := needMachine(t)
	if _, err := os.Stat(fileServer); err != nil {
		t.Skipf("no file server: %v", err)
	}
	ctx := deadline(t)
	d := driver(t, filepath.Join(t.TempDir(), "run"))
	template, err := d.Template(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "hello"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	shared := machine(0, spec)
	shared.Shared = true
	began := time.Now()
	m, err := d.Clone(ctx, template, shared)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("copied and cloned in %v", time.Since(began).Round(time.Millisecond))
	if err := m.Release(); err != nil {
		t.Fatal(err)
	}
	if m, err = d.Adopt(ctx, m.Dir()); err != nil { // it knows what it is
		t.Fatal(err)
	}
	if err := m.Share(ctx, "volumes", serveFiles(t, dir)); err != nil {
		t.Fatal(err)
	}
	a := converse(t, ctx, m)
	say(t, a, "rescan")
	eventually(t, a, "mounts volumes virtiofs", "<nil>")
	if got := say(t, a, "read /tmp/hello"); got != "from the host" {
		t.Errorf("the guest reads %q", got)
	}
	confined(t, m)
	if err := m.Kill(ctx); err != nil {
		t.Error(err)
	}
	if m, err = d.Clone(ctx, template, machine(1, spec)); err != nil {
		t.Fatal(err)
	}
	if err := m.Share(ctx, "volumes", serveFiles(t, dir)); !errors.Is(err, vm.ErrNotShared) {
		t.Errorf("share with a copy on write: %v", err)
	}
}
