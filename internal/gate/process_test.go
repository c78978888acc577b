package gate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/internal/netns"
)

// TestMain plays the gate's process if it is started as one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "serve-gate" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := Serve(ctx, os.Stdin, os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const gateUser = 64470

func TestProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces needs root")
	}
	dir := t.TempDir()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p, err := ParsePublication("0:80")
	if err != nil {
		t.Fatal(err)
	}
	s := Spec{Dir: dir, Name: "box", Publish: []Publication{p}, UID: gateUser, GID: gateUser}
	program := []string{os.Args[0], "serve-gate"}
	start := func() (string, []Publication) {
		t.Helper()
		pod, published, err := Start(t.Context(), program, s, log)
		if err != nil || len(published) != 1 {
			t.Fatalf("published %v, %v", published, err)
		}
		return pod, published
	}
	pod, published := start()
	pid, err := Running(dir, "box")
	if err != nil || pid == 0 {
		t.Fatalf("process %d, %v", pid, err)
	}
	powerless(t, pid)
	h, err := netns.OpenHand(dir, "box")
	if err != nil || h.Pod.Path() != pod {
		t.Fatalf("%v; pod at %s", err, pod)
	}
	defer h.Close()
	err = h.Pod.Do(func() error {
		l, err := net.Listen("tcp4", netns.HandAddress.String()+":80")
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Write([]byte("guest"))
				c.Close()
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	hears := func(at Publication) {
		t.Helper()
		c, err := net.Dial("tcp", at.Host.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		b := make([]byte, 5)
		if _, err := c.Read(b); err != nil || string(b) != "guest" {
			t.Errorf("heard %q, %v", b, err)
		}
	}
	hears(published[0])
	if _, _, err := Start(t.Context(), program, s, log); err == nil || !strings.Contains(err.Error(), "runs already") {
		t.Errorf("a second gate: %v", err)
	}
	hears(published[0]) // and the first is none the worse for it

	// One that was killed leaves namespaces that the next takes over.
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for n, err := Running(dir, "box"); n != 0 || err != nil; n, err = Running(dir, "box") {
		time.Sleep(time.Millisecond)
	}
	_, published = start()
	hears(published[0])
	h.Pod.Do(func() error { // the list is empty
		if c, err := net.DialTimeout("tcp4", "192.0.2.1:443", 3*time.Second); err == nil {
			c.SetDeadline(time.Now().Add(3 * time.Second))
			if n, err := c.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%d bytes, %v", n, err)
			}
			c.Close()
		}
		return nil
	})
	for range 2 {
		if err := Stop(t.Context(), dir, "box"); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
	said, err := os.ReadFile(log.Name())
	if err != nil || !bytes.Contains(said, []byte(`refused "192.0.2.1:443"`)) {
		t.Errorf("log %q, %v", said, err)
	}
	s.UID = 0
	if _, _, err := Start(t.Context(), program, s, log); err == nil {
		t.Error("a gate runs as root")
	}
	s.UID = gateUser
	if _, _, err := Start(t.Context(), []string{"/bin/true"}, s, log); err == nil {
		t.Error("a program that is no gate was believed")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

// powerless looks at every thread of a process.
func powerless(t *testing.T, pid int) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(threads) < 2 {
		t.Fatalf("threads %v, %v", threads, err)
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it ended
		}
		for _, want := range []string{"Uid:\t64470\t64470\t64470\t64470\n", "Gid:\t64470\t64470\t64470\t64470\n", "Groups:\t \n",
			"CapEff:\t0000000000000000\n", "CapPrm:\t0000000000000000\n", "NoNewPrivs:\t1\n"} {
			if !strings.Contains(string(b), want) {
				t.Errorf("%s lacks %q:\n%s", path, want, b)
			}
		}
	}
}
