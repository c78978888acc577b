package shim

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// TestRemoveDeadSocket takes away the socket of a shim that was killed before
// its bundle named it, and leaves one that is served.
func TestRemoveDeadSocket(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("the directory of sockets is root's")
	}
	// The address makes the names this test's own.
	a := arguments{address: t.TempDir(), namespace: "test", id: "member"}
	pod := a
	pod.id = "pod"
	socket, err := socketPath(pod, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(socket), 0o711); err != nil {
		t.Fatal(err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(socket)
	ln.SetUnlinkOnClose(false)
	if err := removeDeadSocket(a, "pod"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(socket); err != nil {
		t.Errorf("a socket that is served: %v", err)
	}
	ln.Close()
	for range 2 { // it can be asked again
		if err := removeDeadSocket(a, "pod"); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a socket that nobody serves: %v", err)
		}
	}
}
