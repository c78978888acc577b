package client

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/containerd/ttrpc"
)

func TestSaid(t *testing.T) {
	for _, c := range []struct {
		err, want error
		text      string
	}{
		{status.Error(codes.NotFound, "container is not here"), ErrNotFound, "container is not here"},
		{status.Error(codes.FailedPrecondition, "it is paused"), ErrNotNow, "it is paused"},
		{status.Error(codes.InvalidArgument, "linux.x"), ErrInvalid, "linux.x"},
		{status.Error(codes.DeadlineExceeded, "late"), context.DeadlineExceeded, "late"},
		{ttrpc.ErrClosed, ErrGone, ErrGone.Error()},
	} {
		if got := said(c.err); !errors.Is(got, c.want) || got.Error() != c.text {
			t.Errorf("%v became %v", c.err, got)
		}
	}
	if err := said(status.Error(codes.Unknown, "odd")); err == nil || err.Error() != "odd" || errors.Unwrap(err) != nil {
		t.Errorf("an unknown one became %v", err)
	}
	if said(nil) != nil {
		t.Error("nothing became something")
	}
}

// TestDialNobody finds no shim where there is none, or a dead one.
func TestDialNobody(t *testing.T) {
	dir := t.TempDir()
	if _, err := Dial(t.Context(), dir); !errors.Is(err, ErrGone) {
		t.Errorf("an empty bundle: %v", err)
	}
	socket := filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	for _, address := range []string{"unix://" + socket, "unix:///no/such"} {
		if err := os.WriteFile(filepath.Join(dir, addressFile), []byte(address), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Dial(t.Context(), dir); !errors.Is(err, ErrGone) {
			t.Errorf("%s: %v", address, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, addressFile), []byte("tcp://1.2.3.4:5"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(t.Context(), dir); err == nil || errors.Is(err, ErrGone) {
		t.Errorf("a foreign address: %v", err)
	}
}

// TestStart speaks to programs that are not a shim.
func TestStart(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "shim")
	for script, want := range map[string]string{
		"echo 'shim: it does not work' >&2; exit 1": "start shim: it does not work",
		"exit 3":                   "start shim: exit status 3",
		"printf nonsense":          "start shim: read answer",
		"head -c 100000 /dev/zero": "answered 100000 bytes",
	} {
		if err := os.WriteFile(program, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		_, err := Start(t.Context(), Program{Path: program, Namespace: "n", ID: "i", Owner: "o", Bundle: dir, Sockets: dir})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", script, err, want)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := os.WriteFile(program, []byte("#!/bin/sh\nexec sleep 100\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Delete(ctx, Program{Path: program, Bundle: dir}); err == nil {
		t.Error("a program that does not end passed")
	}
}

func TestParseStats(t *testing.T) {
	number := func(b []byte, n protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
	}
	group := func(b []byte, n protowire.Number, inner []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), inner)
	}
	raw := group(nil, 1, number(number(nil, 1, 3), 2, 100))
	raw = group(raw, 2, number(number(nil, 1, 12345), 9, 1)) // more than is read
	raw = group(raw, 4, number(number(nil, 32, 1<<20), 33, 1<<28))
	raw = group(raw, 8, number(nil, 5, 2))
	raw = number(raw, 77, 1)
	want := Stats{CPUMicros: 12345, Memory: 1 << 20, MemoryLimit: 1 << 28, Pids: 3, PidsLimit: 100, OOMKills: 2}
	if got, err := parseStats(raw); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzStats(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0x0a, 2, 8, 3})
	f.Add([]byte{0x0a, 0xff})
	f.Fuzz(func(t *testing.T, raw []byte) {
		if s, err := parseStats(raw); err != nil && s != (Stats{}) {
			t.Errorf("%+v with %v", s, err)
		}
	})
}
