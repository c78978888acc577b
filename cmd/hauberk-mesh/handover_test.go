package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// running is a program that ends with the test.
type running struct {
	*exec.Cmd
	ended chan struct{}
	err   error

	mu  sync.Mutex
	out bytes.Buffer
}

func (r *running) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.out.Write(p)
}

func (r *running) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.out.String()
}

func launch(t *testing.T, args ...string) *running {
	t.Helper()
	r := &running{Cmd: program(args...), ended: make(chan struct{})}
	r.Stdout, r.Stderr = r, r
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { r.err = r.Cmd.Wait(); close(r.ended) }()
	t.Cleanup(func() {
		r.Process.Kill()
		<-r.ended
	})
	return r
}

// waitFor waits for a condition, for as long as the slowest machine needs.
func waitFor(t *testing.T, what string, of *running, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s\n%s", what, of.text())
		}
	}
}

func (r *running) hasEnded() bool {
	select {
	case <-r.ended:
		return true
	default:
		return false
	}
}

// node connects to whoever listens at path, as hauberk-node does.
func node(t *testing.T, path string, of *running) *link.Link {
	t.Helper()
	var l *link.Link
	waitFor(t, "link", of, func() (ok bool) {
		var err error
		l, err = link.Dial(context.Background(), path, link.Handlers{
			Sign:    func(context.Context, string, []byte) ([][]byte, []byte, error) { return nil, nil, nil },
			Sockets: func(string, int) ([]*os.File, error) { return nil, nil }, Event: func(api.Event) {}})
		return err == nil
	})
	return l
}

// A program takes the place of another, and a third takes that one's: sockets,
// plan and all. One that may not, or fails, changes nothing.
func TestTakeOver(t *testing.T) {
	dir, err := os.MkdirTemp("", "hm")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path, door := filepath.Join(dir, "link"), filepath.Join(dir, "door")
	first := launch(t, "--allow-root", "--link", path, "--handover", door)
	l := node(t, path, first)
	if l.Process() != first.Process.Pid {
		t.Errorf("process %d, want %d", l.Process(), first.Process.Pid)
	}
	waitFor(t, "door", first, func() bool { _, err := os.Stat(door); return err == nil })
	if fi, err := os.Stat(door); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	// There is nothing to take yet: a proxy without a plan is not one.
	early := launch(t, "--allow-root", "--take-over", door)
	<-early.ended
	if early.err == nil || !strings.Contains(early.text(), "there is no plan yet") {
		t.Errorf("%v\n%s", early.err, early.text())
	}
	if err := l.SetPlan(context.Background(), plan.Mesh{Generation: 7, TrustDomain: "t.local"}); err != nil {
		t.Fatal(err)
	}
	last := first
	for range 2 {
		next := launch(t, "--allow-root", "--take-over", door)
		waitFor(t, "end of the old program", last, last.hasEnded)
		if last.err != nil {
			t.Fatalf("%v\n%s", last.err, last.text())
		}
		l.Close()
		l = node(t, path, next)
		s, err := l.Stats(context.Background())
		if err != nil || s.Generation != 7 || l.Process() != next.Process.Pid {
			t.Errorf("plan %d in process %d, want 7 in %d; %v", s.Generation, l.Process(), next.Process.Pid, err)
		}
		last = next
	}
	l.Close()
	last.Process.Signal(syscall.SIGTERM)
	waitFor(t, "end", last, last.hasEnded)
	if last.err != nil {
		t.Errorf("%v\n%s", last.err, last.text())
	}
	nobody := launch(t, "--allow-root", "--take-over", door)
	<-nobody.ended
	if nobody.err == nil || !strings.Contains(nobody.text(), "take over") {
		t.Errorf("%v\n%s", nobody.err, nobody.text())
	}
}
