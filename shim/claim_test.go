package shim

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"

	"hauberk.dev/internal/argv"
)

// TestMain is the shim as well: what it starts is the program that runs. It is
// also a program that only is there.
func TestMain(m *testing.M) {
	if os.Getenv("HAUBERK_TEST_MANY") != "" {
		beThere()
	}
	if os.Getenv("HAUBERK_TEST_SHIM") == "" {
		os.Exit(m.Run())
	}
	if err := Main(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	os.Exit(0)
}

// soon bounds what happens sooner or later.
const soon = 2 * time.Minute

// host is where shims of a test run: a directory of sockets, one of claims, and
// bundles.
type host struct {
	dir  string
	conf config
}

func newHost(t *testing.T) host {
	t.Helper()
	dir, err := os.MkdirTemp("", "hc-") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return host{dir, config{state: filepath.Join(dir, "state"), run: filepath.Join(dir, "run"), cold: true}}
}

// pod gives the arguments of a new pod, and makes its bundle.
func (h host) pod(t *testing.T, id string) arguments {
	t.Helper()
	a := arguments{namespace: "test", id: id, address: h.dir, bundle: filepath.Join(h.dir, "bundle-"+id)}
	if err := os.MkdirAll(a.bundle, 0o700); err != nil {
		t.Fatal(err)
	}
	return a
}

func (h host) socket(a arguments) string {
	dir := filepath.Join(h.dir, "s")
	path, err := socketPath(a, &bootstrap.BootstrapParams{SocketDir: &dir})
	if err != nil {
		panic(err)
	}
	return path
}

// command is the shim's program, as containerd calls it.
func (h host) command(t *testing.T, a arguments, action string) *exec.Cmd {
	t.Helper()
	dir := filepath.Join(h.dir, "s")
	in, err := proto.Marshal(&bootstrap.BootstrapParams{InstanceID: a.id, Namespace: a.namespace, SocketDir: &dir})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-namespace", a.namespace, "-id", a.id, "-address", a.address, "-bundle", a.bundle, action)
	cmd.Env = append(os.Environ(), "HAUBERK_TEST_SHIM=1", "HAUBERK_SHIM_START=cold", "HAUBERK_SHIM_STATE="+h.conf.state, "HAUBERK_SHIM_RUN="+h.conf.run, "TTRPC_ADDRESS=")
	cmd.Dir, cmd.Stdin = h.dir, bytes.NewReader(in)
	return cmd
}

// start starts a shim that serves, and gives its process.
func (h host) start(t *testing.T, a arguments) int {
	t.Helper()
	if out, err := h.command(t, a, "start").CombinedOutput(); err != nil {
		t.Fatalf("start: %v: %s", err, out)
	}
	pid := 0
	h.eventually(t, "the shim serves", func() bool {
		pid = h.conf.peek(machineID(a)).PID
		return pid != 0
	})
	t.Cleanup(func() { syscall.Kill(pid, syscall.SIGKILL) })
	return pid
}

func (h host) delete(t *testing.T, a arguments) {
	t.Helper()
	if out, err := h.command(t, a, "delete").CombinedOutput(); err != nil {
		t.Errorf("delete: %v: %s", err, out)
	}
}

func (h host) eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for late := time.Now().Add(soon); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(late) {
			t.Fatalf("it is never so that %s; left: %q", what, h.left())
		}
	}
}

// left lists sockets, claims and processes.
func (h host) left() (all []string) {
	for _, where := range []string{"s/*", "run/shims/*", "run/vm/*"} {
		found, _ := filepath.Glob(filepath.Join(h.dir, where))
		all = append(all, found...)
	}
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range found {
		raw, err := os.ReadFile(name)
		if err == nil && bytes.Contains(raw, []byte(h.dir)) {
			all = append(all, name+" "+strings.ReplaceAll(string(raw), "\x00", " "))
		}
	}
	return all
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// TestKilledWhileStarted kills who starts a shim at each step. Who removes the pod
// leaves nothing, and neither does the next sweep if nobody is asked to.
func TestKilledWhileStarted(t *testing.T) {
	steps := []struct {
		name string
		do   func(t *testing.T, h host, a arguments)
	}{
		{"before the claim says anything", func(t *testing.T, h host, a arguments) {
			k, err := h.conf.take(machineID(a), true)
			if err != nil || k == nil {
				t.Fatal(k, err)
			}
			k.leave()
		}},
		{"in the middle of its line", func(t *testing.T, h host, a arguments) {
			k, err := h.conf.take(machineID(a), true)
			if err != nil || k == nil {
				t.Fatal(k, err)
			}
			k.file.WriteString(`{"id":"x","sock`)
			k.leave()
		}},
		{"before the socket", func(t *testing.T, h host, a arguments) { h.claimed(t, a).leave() }},
		{"before the shim", func(t *testing.T, h host, a arguments) {
			k := h.claimed(t, a)
			ln, err := listen(h.socket(a))
			if err != nil || ln == nil {
				t.Fatal(ln, err)
			}
			ln.Close()
			k.leave()
		}},
		{"before its bundle names it", func(t *testing.T, h host, a arguments) {
			syscall.Kill(h.start(t, a), syscall.SIGKILL)
			for _, name := range []string{"shim.pid", addressFile} {
				os.Remove(filepath.Join(a.bundle, name))
			}
		}},
		{"after all of it", func(t *testing.T, h host, a arguments) { syscall.Kill(h.start(t, a), syscall.SIGKILL) }},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			h := newHost(t)
			// Deleted, as containerd should.
			a := h.pod(t, "deleted")
			step.do(t, h, a)
			h.delete(t, a)
			h.delete(t, a)
			// Removed with its bundle, as it does if it was killed itself.
			a = h.pod(t, "swept")
			step.do(t, h, a)
			h.conf.sweep(t.Context(), quiet())
			if h.conf.peek(machineID(a)).Bundle != "" && !exists(filepath.Join(h.conf.claims(), machineID(a))) {
				t.Error("swept while somebody may ask for it")
			}
			os.RemoveAll(a.bundle)
			// Started anew, as it does if a pod has the same name again.
			again := h.pod(t, "again")
			step.do(t, h, again)
			pid := h.start(t, again)
			if alive, err := argv.Has(pid, "again"); err != nil || !alive {
				t.Errorf("no shim after a dead one: %v", err)
			}
			h.delete(t, again)
			h.eventually(t, "nothing is left", func() bool {
				h.conf.sweep(t.Context(), quiet())
				return len(h.left()) == 0
			})
		})
	}
}

// claimed takes the claim of a new pod, up to its first line.
func (h host) claimed(t *testing.T, a arguments) *claim {
	t.Helper()
	k, err := h.conf.succeed(t.Context(), a, h.socket(a))
	if err != nil || k == nil {
		t.Fatal(k, err)
	}
	return k
}

// TestKilledAtAnyTime kills who starts shims at random, and takes their bundles
// away, as a containerd that was killed does: in the end nothing of them is left,
// and no shim but the one that has its bundle.
func TestKilledAtAnyTime(t *testing.T) {
	h := newHost(t)
	kept := h.pod(t, "kept")
	pid := h.start(t, kept)
	began := time.Now()
	h.delete(t, h.pod(t, "none")) // how long a process takes here
	whole := time.Since(began)
	var wg sync.WaitGroup
	for i := range 24 {
		a := h.pod(t, "pod"+itoa(i))
		cmd := h.command(t, a, "start")
		wg.Go(func() {
			if err := cmd.Start(); err != nil {
				t.Error(err)
				return
			}
			time.Sleep(time.Duration(rand.Int64N(int64(2 * whole))))
			cmd.Process.Kill()
			cmd.Wait()
			os.RemoveAll(a.bundle)
		})
		if i%4 == 3 {
			wg.Wait()
		}
	}
	h.eventually(t, "only one shim is left", func() bool {
		h.conf.sweep(t.Context(), quiet())
		return len(h.left()) == 3
	})
	if err := pingOnce(h.socket(kept), kept.id); err != nil {
		t.Errorf("the one that was not to die: %v", err)
	}
	h.delete(t, kept)
	h.eventually(t, "nothing is left", func() bool { return len(h.left()) == 0 })
	if alive, err := argv.Has(pid, kept.id); alive || err != nil {
		t.Errorf("it lives on: %v", err)
	}
}

func itoa(n int) string { return string(rune('a'+n/10)) + string(rune('0'+n%10)) }

func pingOnce(socket, id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	_, err := ping(ctx, socket, id)
	return err
}

// TestHungShim: a shim that takes calls and answers none is killed when its pod is
// given up, not when one container of it is.
func TestHungShim(t *testing.T) {
	h := newHost(t)
	a := h.pod(t, "pod")
	pid := h.start(t, a)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	member := a
	member.id = "member"
	j := journal{ID: "member", Pod: "pod", Machine: machineID(a), Run: h.conf.machines(), Socket: h.socket(a)}
	if _, err := removeLiving(ctx, member, h.conf, j, nil); err == nil {
		t.Error("a container of a shim that hangs was removed")
	}
	if !served(h.socket(a)) {
		t.Fatal("the shim is gone")
	}
	h.conf.sweep(t.Context(), quiet())
	if !served(h.socket(a)) {
		t.Fatal("a shim whose bundle is there was swept")
	}
	h.delete(t, a)
	h.eventually(t, "nothing is left", func() bool { return len(h.left()) == 0 })

	b := h.pod(t, "other")
	if err := syscall.Kill(h.start(t, b), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	os.RemoveAll(b.bundle)
	h.conf.sweep(t.Context(), quiet())
	h.eventually(t, "nothing is left", func() bool { return len(h.left()) == 0 })
}

// TestOneShimOfAName: many that start one at once get the same, and the next one
// waits for the end of the last.
func TestOneShimOfAName(t *testing.T) {
	h := newHost(t)
	a := h.pod(t, "pod")
	var wg sync.WaitGroup
	for range 6 {
		cmd := h.command(t, a, "start")
		wg.Go(func() {
			if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte(h.socket(a))) {
				t.Errorf("start: %v: %q", err, out)
			}
		})
	}
	wg.Wait()
	count := func() (n int) {
		for _, what := range h.left() {
			if strings.HasPrefix(what, "/proc") {
				n++
			}
		}
		return n
	}
	h.eventually(t, "one shim runs", func() bool { return count() == 1 })
	h.delete(t, a)
	h.start(t, a)
	h.delete(t, a)
	h.eventually(t, "nothing is left", func() bool { return len(h.left()) == 0 })
}

// TestClaimIsOnes: a claim is never two's, also while it is dropped and made anew.
func TestClaimIsOnes(t *testing.T) {
	h := newHost(t)
	var mu sync.Mutex
	held, took := 0, 0
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				k, err := h.conf.take("m", true)
				if err != nil {
					t.Error(err)
					return
				}
				if k == nil {
					continue
				}
				mu.Lock()
				held++
				took++
				if held != 1 {
					t.Error("two have the claim")
				}
				held--
				if took%2 == 0 {
					err = k.drop()
				} else {
					err = k.leave()
				}
				mu.Unlock()
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if took == 0 {
		t.Error("nobody got it")
	}
}

// TestRemoveDeadSocket leaves alone what is served, and what is no socket.
func TestRemoveDeadSocket(t *testing.T) {
	dir := t.TempDir()
	file, socket := filepath.Join(dir, "file"), filepath.Join(dir, "socket")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ln, err := listen(socket)
	if err != nil || ln == nil {
		t.Fatal(ln, err)
	}
	for _, path := range []string{"", file, socket} {
		if err := removeSocket(path); err != nil || path != "" && !exists(path) {
			t.Errorf("%q: %v", path, err)
		}
	}
	ln.Close()
	for range 2 { // it can be asked again
		if err := removeSocket(socket); err != nil || exists(socket) {
			t.Errorf("a socket that nobody serves is left: %v", err)
		}
	}
}

// FuzzClaim: whatever a claim holds, the first whole lines that are ones count.
func FuzzClaim(f *testing.F) {
	f.Add([]byte(`{"id":"x","bundle":"/b","socket":"/s"}` + "\n" + `{"pid":7}` + "\n" + `{"netw`))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		said := parseClaim(raw)
		if i := bytes.LastIndexByte(raw, '\n'); parseClaim(raw[:i+1]) != said {
			t.Errorf("half a line counts in %q", raw)
		}
		if again := parseClaim(append(bytes.Clone(raw), "\x00"...)); again != said {
			t.Errorf("%q: %+v, then %+v", raw, said, again)
		}
	})
}
