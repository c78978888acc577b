package unixsock

import (
	"net"
	"os"
	"path/filepath"
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
