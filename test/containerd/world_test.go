// Package containerd_test runs Debian's containerd, with directories and
// sockets of its own, against the shim: what users of containerd do, and what
// happens to their containers when a process is killed.
package containerd_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/internal/kernel"
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

var busybox = "/bin/busybox"

// newWorld builds the programs, starts containerd and imports an image. With
// the test everything ends, and what is left is a fault.
func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("containerd and machines need root")
	}
	for _, program := range []string{"containerd", "ctr", "qemu-system-x86_64", busybox} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("not installed: %v", err)
		}
	}
	if _, err := kernel.Find("/", kernel.Flavour); errors.Is(err, kernel.ErrMissing) {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "hauberk-containerd-") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	w := &world{dir: dir}
	t.Cleanup(func() { os.RemoveAll(dir) })
	build := exec.Command("go", "build", "-o", w.path("bin")+"/", "hauberk.dev/cmd/containerd-shim-hauberk-v2", "hauberk.dev/cmd/hauberk-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	w.configure(t)
	w.serve(t)
	t.Cleanup(func() { w.end(t) })
	if err := os.WriteFile(w.path("image.tar"), archive(t), 0o600); err != nil {
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
	if out, err := exec.Command(w.path("bin/containerd-shim-hauberk-v2"), "keep", "-end", "-run", w.path("run")).CombinedOutput(); err != nil {
		t.Errorf("end keeper: %v: %s", err, out)
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
// or open files say.
func (w *world) processes() map[int]string {
	found := map[int]string{}
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		raw, err := os.ReadFile(name)
		line := string(bytes.ReplaceAll(raw, []byte{0}, []byte{' '}))
		if err != nil || !strings.Contains(line, w.dir) && !w.ours(line) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil && pid != os.Getpid() {
			found[pid] = line
		}
	}
	return found
}

var (
	seenMu sync.Mutex
	seen   = map[string]bool{} // marks of machines of this process' worlds
)

func (w *world) ours(line string) bool {
	seenMu.Lock()
	defer seenMu.Unlock()
	for mark := range seen {
		if strings.Contains(line, mark) {
			return true
		}
	}
	return false
}

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

// archive is an OCI layout with one image: busybox.
func archive(t *testing.T) []byte {
	t.Helper()
	program, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	layer := tar.NewWriter(&b)
	put := func(w *tar.Writer, h tar.Header, data []byte) {
		h.Size = int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		w.Write(data)
	}
	for _, dir := range []string{"bin/", "etc/", "root/", "proc/", "sys/", "dev/"} {
		put(layer, tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	put(layer, tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	put(layer, tar.Header{Name: "bin/busybox", Mode: 0o755}, program)
	put(layer, tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0::/root:/bin/sh\n"))
	for name := range strings.FieldsSeq(string(list)) {
		if name != "busybox" {
			put(layer, tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	if err := layer.Close(); err != nil {
		t.Fatal(err)
	}
	return layout(t, b.Bytes(), put)
}

// layout puts a layer into an OCI layout.
func layout(t *testing.T, layer []byte, put func(*tar.Writer, tar.Header, []byte)) []byte {
	t.Helper()
	var b bytes.Buffer
	out := tar.NewWriter(&b)
	type object = map[string]any
	blob := func(kind string, data []byte) object {
		digest := fmt.Sprintf("%x", sha256.Sum256(data))
		put(out, tar.Header{Name: "blobs/sha256/" + digest, Mode: 0o644}, data)
		return object{"mediaType": "application/vnd.oci.image." + kind, "digest": "sha256:" + digest, "size": len(data)}
	}
	text := func(v any) []byte {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	l := blob("layer.v1.tar", layer)
	c := blob("config.v1+json", text(object{"architecture": "amd64", "os": "linux",
		"config": object{"Env": []string{"PATH=/bin"}, "Cmd": []string{"/bin/sh"}},
		"rootfs": object{"type": "layers", "diff_ids": []any{l["digest"]}}}))
	m := blob("manifest.v1+json", text(object{"schemaVersion": 2, "config": c, "layers": []any{l}}))
	m["annotations"] = object{"io.containerd.image.name": imageName}
	put(out, tar.Header{Name: "index.json", Mode: 0o644}, text(object{"schemaVersion": 2, "manifests": []any{m}}))
	put(out, tar.Header{Name: "oci-layout", Mode: 0o644}, []byte(`{"imageLayoutVersion":"1.0.0"}`))
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
