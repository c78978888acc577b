// Package containerd_test runs Debian's containerd, with directories and
// sockets of its own, against the shim: what users of containerd do, and what
// happens to their containers when a process is killed.
package containerd_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/internal/stage"
	"hauberk.dev/vm"
)

const (
	runtimeName = "io.containerd.hauberk.v2"
	imageName   = "docker.io/test/busybox:1"
	space       = "default"
	// callTime bounds one call of ctr, a boot included.
	callTime = 5 * time.Minute
)

// world is a containerd with everything it needs.
type world struct {
	dir    string
	server *server
}

// server is one run of containerd.
type server struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

// newWorld builds the programs, starts containerd and imports an image. With
// the test everything ends, and what is left is a fault.
func newWorld(t *testing.T) *world {
	t.Helper()
	if err := stage.Missing("containerd", "ctr"); err != nil {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "hauberk-containerd-") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	w := &world{dir: dir}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := stage.Build(w.path("bin"), "containerd-shim-hauberk-v2", "hauberk-guest"); err != nil {
		t.Fatal(err)
	}
	w.configure(t)
	w.serve(t)
	t.Cleanup(func() { w.end(t) })
	layer, err := stage.Layer(nil)
	if err == nil {
		err = stage.Layout(w.path("image.tar"), imageName, layer)
	}
	if err != nil {
		t.Fatal(err)
	}
	w.must(t, "", "images", "import", w.path("image.tar"))
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) configure(t *testing.T) {
	t.Helper()
	text := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = %q
[ttrpc]
address = %q
`, w.path("root"), w.path("state"), w.path("c.sock"), w.path("c.sock.ttrpc"))
	if err := os.WriteFile(w.path("config.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// serve starts containerd and waits until it answers.
func (w *world) serve(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(w.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("containerd", "-c", w.path("config.toml"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "PATH="+w.path("bin")+":"+os.Getenv("PATH"),
		"HAUBERK_SHIM_STATE="+w.path("shim"), "HAUBERK_SHIM_RUN="+w.path("run"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.server = &server{cmd: cmd, exited: make(chan struct{})}
	go func(s *server) { s.cmd.Wait(); close(s.exited) }(w.server)
	w.await(t, "containerd", w.server.exited, func(ctx context.Context) error {
		_, err := w.ctr(ctx, "", "version")
		return err
	})
}

// stop ends containerd by a signal.
func (w *world) stop(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := w.server.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	select {
	case <-w.server.exited:
	case <-time.After(callTime):
		t.Error("containerd does not end")
		w.server.cmd.Process.Kill()
	}
}

// end stops everything and says what is left.
func (w *world) end(t *testing.T) {
	if t.Failed() {
		t.Logf("end of containerd's log:\n%s", tail(w.path("log"), 4096))
	}
	w.stop(t, syscall.SIGTERM)
	w.machines(t)
	if err := stage.EndKeeper(w.path("bin/containerd-shim-hauberk-v2"), w.path("run")); err != nil {
		t.Error(err)
	}
	for late := time.Now().Add(callTime); len(w.processes()) > 0 && time.Now().Before(late); {
		time.Sleep(20 * time.Millisecond) // the last shim is on its way
	}
	for pid, line := range w.processes() {
		t.Errorf("process %d was left: %s", pid, line)
		if p, err := os.FindProcess(pid); err == nil {
			p.Kill()
		}
	}
	if left := w.machines(t); len(left) > 0 {
		t.Errorf("run directories were left: %q", left)
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], w.dir) {
			t.Errorf("a mount was left: %s", line)
			syscall.Unmount(f[4], syscall.MNT_DETACH)
		}
	}
}

// processes finds shims and machines of this world by what their command lines
// say.
func (w *world) processes() map[int]string {
	seenMu.Lock()
	defer seenMu.Unlock()
	return stage.Processes(append(slices.Collect(maps.Keys(seen)), w.dir)...)
}

var (
	seenMu sync.Mutex
	seen   = map[string]bool{} // marks of machines of this process' worlds
)

// machines lists the run directories of containers' machines, and remembers the
// marks of these and of what the keeper keeps.
func (w *world) machines(t *testing.T) (names []string) {
	t.Helper()
	parents, _ := filepath.Glob(w.path("run/keep-*"))
	for _, parent := range append(parents, w.path("run/vm")) {
		found, err := vm.Orphans(parent)
		if err != nil {
			t.Fatal(err)
		}
		seenMu.Lock()
		for _, o := range found {
			if o.Journal.Mark != "" {
				seen[o.Journal.Mark] = true
			}
			if filepath.Base(parent) == "vm" {
				names = append(names, o.ID)
			}
		}
		seenMu.Unlock()
	}
	return names
}

// ctr calls containerd's client. Its error holds what it printed.
func (w *world) ctr(ctx context.Context, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ctr", append([]string{"-a", w.path("c.sock"), "-n", space}, args...)...)
	cmd.WaitDelay = time.Second
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), &ctrError{err, errs.String()}
	}
	return out.String(), nil
}

// ctrError is how ctr ended, with what it said.
type ctrError struct {
	error
	said string
}

func (e *ctrError) Error() string { return fmt.Sprintf("%v: %s", e.error, e.said) }
func (e *ctrError) Unwrap() error { return e.error }

// must calls ctr and ends the test if that fails.
func (w *world) must(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	out, err := w.ctr(t.Context(), stdin, args...)
	if err != nil {
		t.Fatalf("ctr %q: %v; it printed %q", args, err, out)
	}
	return out
}

// run is "ctr run" of the image in a sandbox.
func (w *world) run(t *testing.T, stdin string, flags []string, id string, args ...string) (string, error) {
	t.Helper()
	all := append([]string{"run", "--runtime", runtimeName}, flags...)
	return w.ctr(t.Context(), stdin, append(append(all, imageName, id), args...)...)
}

// code is the exit code of a failed ctr, -1 if it did not exit.
func code(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}

// status is what "ctr task ls" says of a container, empty if nothing.
func (w *world) status(ctx context.Context, id string) (pid int, status string, err error) {
	out, err := w.ctr(ctx, "", "task", "ls")
	if err != nil {
		return 0, "", err
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == id {
			pid, err := strconv.Atoi(f[1])
			return pid, f[2], err
		}
	}
	return 0, "", nil
}

// becomes waits until a container has a status.
func (w *world) becomes(t *testing.T, id, want string) {
	t.Helper()
	w.await(t, id+" "+want, w.server.exited, func(ctx context.Context) error {
		if _, got, err := w.status(ctx, id); err != nil || got != want {
			return fmt.Errorf("it is %q, %v", got, err)
		}
		return nil
	})
}

// detach starts a container that stays.
func (w *world) detach(t *testing.T, id string, args ...string) (pid int) {
	t.Helper()
	if _, err := w.run(t, "", []string{"-d"}, id, args...); err != nil {
		t.Fatal(err)
	}
	w.becomes(t, id, "RUNNING")
	w.machines(t)
	pid, _, err := w.status(t.Context(), id)
	if err != nil || pid == 0 {
		t.Fatal(pid, err)
	}
	return pid
}

// discard kills and deletes a container.
func (w *world) discard(t *testing.T, id string) {
	t.Helper()
	w.ctr(t.Context(), "", "task", "kill", "-s", "KILL", id) // it may have ended
	w.becomes(t, id, "STOPPED")
	w.ctr(t.Context(), "", "task", "rm", id) // tells the exit code by its own
	w.must(t, "", "container", "rm", id)
}

// await calls check every 50 ms until it succeeds. It stops early when exited
// is closed.
func (w *world) await(t *testing.T, what string, exited <-chan struct{}, check func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return
		}
		select {
		case <-exited:
			t.Fatalf("await %s: containerd ended: %v\n%s", what, err, tail(w.path("log"), 2048))
		case <-ctx.Done():
			t.Fatalf("await %s: %v\n%s", what, err, tail(w.path("log"), 2048))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func tail(name string, most int) string {
	raw, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	return string(raw[max(0, len(raw)-most):])
}
