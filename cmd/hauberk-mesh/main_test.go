package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/link"
)

// TestMain lets the test binary be the program.
func TestMain(m *testing.M) {
	if os.Getenv("HAUBERK_MESH_MAIN") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func program(args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], args...)
	c.Env = append(os.Environ(), "HAUBERK_MESH_MAIN=1")
	return c
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--nonsense"}, "flag provided but not defined"},
		{[]string{"more"}, "unexpected argument"},
		{[]string{"--allow-root", "--link", "/nonexistent/mesh.sock"}, "listen on /nonexistent/mesh.sock"},
	} {
		out, err := program(c.args...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.want) {
			t.Errorf("%q: %v, %s", c.args, err, out)
		}
	}
	if os.Geteuid() == 0 {
		out, err := program("--link", filepath.Join(t.TempDir(), "s")).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "refuse to run as root") {
			t.Errorf("as root: %v, %s", err, out)
		}
	}
}

// As the unprivileged user it will be, the program serves the link, keeps its
// memory to itself and ends on SIGTERM.
func TestServes(t *testing.T) {
	dir, err := os.MkdirTemp("", "hauberk-mesh")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "mesh.sock")
	var out bytes.Buffer
	c := program("--link", path)
	c.Stdout, c.Stderr = &out, &out
	if os.Geteuid() == 0 {
		const nobody = 65534
		if err := os.Chown(dir, nobody, nobody); err != nil {
			t.Fatal(err)
		}
		exe := filepath.Join(dir, "exe") // where that user can read it
		raw, err := os.ReadFile(os.Args[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(exe, raw, 0o755); err != nil {
			t.Fatal(err)
		}
		c.Path, c.Dir = exe, dir
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	var l *link.Link
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		l, err = link.Dial(context.Background(), path, link.Handlers{
			Sign:    func(context.Context, string, []byte) ([][]byte, []byte, error) { return nil, nil, nil },
			Sockets: func(string, int) ([]*os.File, error) { return nil, nil }, Event: func(api.Event) {}})
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			c.Process.Kill()
			t.Fatalf("%v\n%s", err, out.String())
		}
	}
	if err := l.Ping(context.Background()); err != nil || l.Process() != c.Process.Pid {
		t.Errorf("ping: %v, process %d", err, l.Process())
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	// A process that is not dumpable belongs to root in /proc.
	if fi, err := os.Stat("/proc/" + strconv.Itoa(c.Process.Pid) + "/mem"); err != nil || fi.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("the memory of the program is open to its user: %v", err)
	}
	c.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("%v\n%s", err, out.String())
		}
	case <-time.After(10 * time.Second):
		c.Process.Kill()
		t.Error("SIGTERM did not end it")
	}
	l.Close()
}
