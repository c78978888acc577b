package unixsock

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if i, err := os.Stat(path); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: want 0600", i, err)
	}
	if second, err := Listen(path); err == nil {
		second.Close()
		t.Error("a socket that somebody listens on was taken over")
	}
	ln.SetUnlinkOnClose(false) // as a killed program leaves it
	ln.Close()
	ln, err = Listen(path)
	if err != nil {
		t.Fatalf("a socket that nobody listens on was not replaced: %v", err)
	}
	defer ln.Close()

	near, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	conn, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := OnlyRoot(conn); (err == nil) != (os.Getuid() == 0) {
		t.Errorf("user %d asks: %v", os.Getuid(), err)
	}
}

// TestListenKeepsFiles: a path that is given by mistake costs nobody a file.
func TestListenKeepsFiles(t *testing.T) {
	for name, listen := range map[string]func(string) (*net.UnixListener, error){"packets": Listen, "stream": ListenStream} {
		dir := t.TempDir()
		file, link, old := filepath.Join(dir, "key.pem"), filepath.Join(dir, "link"), filepath.Join(dir, "old")
		if err := os.WriteFile(file, []byte("kept"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(file, link); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{file, link} {
			if ln, err := listen(path); err == nil || !strings.Contains(err.Error(), "no socket: remove it") {
				t.Errorf("%s at %s: %v, %v", name, path, ln, err)
			}
			if _, err := os.Lstat(path); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if text, err := os.ReadFile(file); err != nil || string(text) != "kept" {
			t.Errorf("%s: %q, %v", name, text, err)
		}
		for range 2 { // the second time one is there that nobody listens on
			ln, err := listen(old)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if i, err := os.Lstat(old); err != nil || i.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v: want 0600", name, i, err)
			}
			ln.SetUnlinkOnClose(false)
			ln.Close()
		}
	}
}
