package shim

import (
	"bytes"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/internal/outlog"
)

// attachTo connects to a hub and waits until nothing is missed.
func attachTo(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if kind, payload, err := admin.ReadFrame(c); err != nil || kind != admin.FrameStdout || len(payload) != 0 {
		t.Fatalf("greeted with %d %q, %v", kind, payload, err)
	}
	return c
}

// heard collects what a client is told until the end.
func heard(t *testing.T, c net.Conn) (out, err string) {
	t.Helper()
	var b [3]bytes.Buffer
	for {
		kind, payload, err := admin.ReadFrame(c)
		if errors.Is(err, io.EOF) {
			return b[admin.FrameStdout].String(), b[admin.FrameStderr].String()
		}
		if err != nil || kind > admin.FrameStderr {
			t.Fatalf("frame %d, %v", kind, err)
		}
		b[kind].Write(payload)
	}
}

func TestAttach(t *testing.T) {
	dir := t.TempDir()
	path, log := filepath.Join(dir, "s"), filepath.Join(dir, "log")
	name := "attach://" + path + "?size=1048576&log=" + log
	s := &stdio{names: streams{Stdin: name, Stdout: name, Stderr: name}}
	defer s.close()
	if err := s.open(t.Context()); err != nil {
		t.Fatal(err)
	}
	first, second := attachTo(t, path), attachTo(t, path)
	io.WriteString(s.output[0].file, "to both\n")
	second.Close() // a client that leaves ends nothing
	big := strings.Repeat("much ", 100000)
	go func() {
		io.WriteString(s.output[0].file, big)
		io.WriteString(s.output[1].file, "wrong\n")
	}()
	if err := admin.WriteFrame(first, admin.FrameStdin, []byte("typed")); err != nil {
		t.Fatal(err)
	}
	in := make([]byte, 5)
	if _, err := io.ReadFull(s.hub.in, in); err != nil || string(in) != "typed" {
		t.Errorf("the process reads %q, %v", in, err)
	}
	if err := admin.WriteFrame(first, admin.FrameStdin, nil); err != nil {
		t.Fatal(err)
	}
	if n, err := s.hub.in.Read(in); n != 0 || err != io.EOF {
		t.Errorf("after the end the process reads %q, %v", in[:n], err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for len(s.output) > 0 { // once all has been written
			if n := logged(t, log); n == len("to both\n")+len(big)+len("wrong\n") {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		s.output[0].close()
		s.output[1].close()
	}()
	out, wrong := heard(t, first)
	<-done
	if out != "to both\n"+big || wrong != "wrong\n" {
		t.Errorf("the client got %d bytes and %q", len(out), wrong)
	}
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("one can attach to what has ended")
	}
}

func logged(t *testing.T, path string) (n int) {
	err := outlog.Read(t.Context(), path, outlog.Options{Tail: -1}, func(l outlog.Line) error { n += len(l.Text); return nil })
	if err != nil {
		t.Error(err)
	}
	return n
}

// TestAttachStrangers has clients that speak nonsense, are too many, or never
// read: none of them keeps the process from ending.
func TestAttachStrangers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	name := "attach://" + path
	s := &stdio{names: streams{Stdout: name, Terminal: true}}
	if err := s.open(t.Context()); err != nil {
		t.Fatal(err)
	}
	rude := attachTo(t, path)
	io.WriteString(rude, "GET / HTTP/1.1\r\n\r\n")
	if _, _, err := admin.ReadFrame(rude); err == nil {
		t.Error("who speaks something else is kept")
	}
	for range maxAttached {
		attachTo(t, path) // never reads on
	}
	extra, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	if _, _, err := admin.ReadFrame(extra); err == nil {
		t.Error("one client too many is kept")
	}
	stuck := make(chan struct{})
	go func() {
		defer close(stuck)
		s.output[0].file.Write(make([]byte, 8<<20))
	}()
	time.Sleep(20 * time.Millisecond)
	s.close()
	select {
	case <-stuck:
	case <-time.After(soon):
		t.Error("the process is held up by who does not read")
	}
}

func TestAttachRefused(t *testing.T) {
	dir := t.TempDir()
	good := "attach://" + filepath.Join(dir, "s")
	for _, n := range []streams{
		{Stdout: "attach:relative"}, {Stdout: "attach://host/x"}, {Stdout: good + "?log=/x&size=many"}, {Stdout: good + "?log=/no/such"},
		{Stdout: good, Stderr: "/other"}, {Stdout: good, Stdin: "/other"}, {Stdout: "attach://" + strings.Repeat("/long", 40)},
	} {
		s := &stdio{names: n}
		if err := s.open(t.Context()); err == nil {
			t.Errorf("%+v was opened", n)
		}
		s.close()
	}
}
