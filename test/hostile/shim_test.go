package hostile

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/guard/bpf"
	"hauberk.dev/internal/stage"
	"hauberk.dev/shim/client"
	"hauberk.dev/vm/boot"
)

// bench is a place for shims with an agent of the test's choice.
type bench struct {
	dir    string
	bundle string
	p      client.Program
}

// newBench puts the shim and an agent side by side, and a bundle that sleeps.
func newBench(t *testing.T, state, shim, agent string) *bench {
	t.Helper()
	dir, err := os.MkdirTemp("", "hh-") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{dir: dir, bundle: filepath.Join(dir, "bundle")}
	t.Cleanup(func() { b.end(t) })
	if err := os.MkdirAll(filepath.Join(b.bundle, "rootfs/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	b.p = client.Program{Path: filepath.Join(dir, "containerd-shim-hauberk-v2"), Namespace: "hostile", ID: "pod", Owner: dir, Bundle: b.bundle, Sockets: dir,
		Env: []string{"HAUBERK_SHIM_STATE=" + state, "HAUBERK_SHIM_RUN=" + filepath.Join(dir, "run"), "HAUBERK_SHIM_START=cold"}}
	for to, from := range map[string]string{b.p.Path: shim, filepath.Join(dir, "hauberk-guest"): agent, filepath.Join(b.bundle, "rootfs/bin/sh"): stage.Busybox} {
		raw, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, raw, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	b.configure(t, "while :; do read x </dev/zero; done")
	return b
}

// configure writes what ctr writes, but for the script that runs.
func (b *bench) configure(t *testing.T, script string) {
	t.Helper()
	raw, err := os.ReadFile("../../shim/testdata/ctr-run.json")
	if err != nil {
		t.Fatal(err)
	}
	var c map[string]any
	if err := json.Unmarshal(raw, &c); err != nil {
		t.Fatal(err)
	}
	c["process"].(map[string]any)["args"] = []string{"/bin/sh", "-c", script}
	if raw, err = json.Marshal(c); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.bundle, "config.json"), raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

// processes whose command line names this bench, but for the test's own.
func (b *bench) processes() map[int]string { return stage.Processes(b.dir) }

// end cleans up as containerd would, and says what is left then.
func (b *bench) end(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := client.Delete(ctx, b.p); err != nil {
		t.Error(err)
	}
	if err := stage.EndKeeper(b.p.Path, filepath.Join(b.dir, "run")); err != nil {
		t.Error(err)
	}
	for until := time.Now().Add(patience); len(b.processes()) > 0 && time.Now().Before(until); {
		time.Sleep(20 * time.Millisecond)
	}
	for pid, line := range b.processes() {
		t.Errorf("process %d is left: %s", pid, line)
		syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, where := range []string{"run/vm/c-*", "run/vm/p-*"} {
		if left, _ := filepath.Glob(filepath.Join(b.dir, where)); len(left) > 0 {
			t.Errorf("run directories are left: %q", left)
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, b.dir) {
			t.Errorf("a mount is left: %s", line)
		}
	}
	os.RemoveAll(b.dir)
}

// prepared is a state directory in which the Guard has been linked already:
// what that takes is not the guests' doing.
func prepared(t *testing.T, dir string) string {
	t.Helper()
	state := filepath.Join(dir, "state")
	g, err := boot.Open(t.Context(), boot.Config{State: state, Run: filepath.Join(dir, "run"), User: user, Agent: stage.Busybox, Link: bpf.Link})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	return state
}

// TestShim gives a shim guests that lie, flood or die: the container is not
// made, the error says why, the shim lives and holds little, and all of it can
// be cleaned up.
func TestShim(t *testing.T) {
	need(t)
	dir := t.TempDir()
	shim := build(t, filepath.Join(dir, "shim"), "hauberk.dev/cmd/containerd-shim-hauberk-v2", "")
	state := prepared(t, dir)
	for _, a := range []struct{ act, want string }{
		{"panics", "read from guest"},
		{"records", "beyond their credit"},
		{"list", "parse reseed reply"},
		{"good", "not a status of the guard"},                       // which "done" is not
		{"never", "ask guest to reseed: context deadline exceeded"}, // after a minute
	} {
		t.Run(a.act, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, state, shim, build(t, filepath.Join(dir, a.act), "./testdata/guest", "-X main.acts="+a.act))
			ctx := short(t, 3*patience)
			s, err := client.Start(ctx, b.p)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			began := time.Now()
			_, err = s.Create(ctx, client.Create{ID: "pod", Bundle: b.bundle})
			if err == nil || !strings.Contains(err.Error(), a.want) || len(err.Error()) > 32<<10 || strings.ContainsAny(err.Error(), "\x1b\x00") {
				t.Errorf("want %q: %.500v", a.want, err)
			}
			t.Logf("after %v: %.200v", time.Since(began).Round(time.Millisecond), err)
			if _, err := s.State(ctx, "pod", ""); err == nil {
				t.Error("a container that was not made has a state")
			}
			for pid, line := range b.processes() {
				if kib := resident(t, pid); strings.Contains(line, "containerd-shim") && kib > 256<<10 {
					t.Errorf("the shim holds %d KiB", kib)
				}
			}
			if err := s.Shutdown(ctx, "pod", true); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLostGuests has the agent that sandboxes run, and loses its guests: to a
// program that exhausts all there is, to a signal for QEMU, to a machine that
// has no memory left for it. Each end is told, and nothing is left.
func TestLostGuests(t *testing.T) {
	need(t)
	dir := t.TempDir()
	shim := build(t, filepath.Join(dir, "shim"), "hauberk.dev/cmd/containerd-shim-hauberk-v2", "")
	agent := build(t, filepath.Join(dir, "guest"), "hauberk.dev/cmd/hauberk-guest", "")
	state := prepared(t, dir)
	t.Run("workload", func(t *testing.T) { workload(t, newBench(t, state, shim, agent)) })
	t.Run("killed", func(t *testing.T) {
		lost(t, newBench(t, state, shim, agent), func(_ *client.Shim, pid int) {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		})
	})
	t.Run("unbootable", func(t *testing.T) { unbootable(t, newBench(t, state, shim, agent)) })
	t.Run("memory", func(t *testing.T) {
		b := newBench(t, state, shim, agent)
		b.configure(t, "until [ -e /go ]; do sleep 0.1; done; head -c 1000000000 /dev/zero | tail -n 1; sleep 1000")
		lost(t, b, func(s *client.Shim, pid int) {
			confine(t, pid, 8<<20)
			// What it needs of memory is new to the host, and may be too much already.
			process := []byte(`{"args": ["/bin/sh", "-c", ": >/go"], "cwd": "/", "env": ["PATH=/bin"]}`)
			if err := s.Exec(t.Context(), "pod", "go", process, client.Streams{}); err == nil {
				_ = s.Start(short(t, patience), "pod", "go")
			}
		})
	})
}

// unbootable confines the shim before it starts a machine: there is no memory
// to boot one. The pod fails, or the kernel takes the shim itself; both can be
// cleaned up.
func unbootable(t *testing.T, b *bench) {
	ctx := short(t, 3*patience)
	s, err := client.Start(ctx, b.p)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	found := 0
	for pid, line := range b.processes() {
		if strings.Contains(line, "containerd-shim") {
			confine(t, pid, 96<<20)
			found++
		}
	}
	if found == 0 {
		t.Fatal("no shim runs")
	}
	began := time.Now()
	_, err = s.Create(ctx, client.Create{ID: "pod", Bundle: b.bundle})
	if err == nil {
		t.Error("a machine has booted in 96 MiB")
	}
	t.Logf("after %v: %.300v", time.Since(began).Round(time.Millisecond), err)
	_ = s.Shutdown(ctx, "pod", true) // it may be gone
}

// lost starts a container, has its monitor end, and looks at what is told.
func lost(t *testing.T, b *bench, end func(s *client.Shim, pid int)) {
	ctx := short(t, 3*patience)
	s, err := client.Start(ctx, b.p)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	pid, err := s.Create(ctx, client.Create{ID: "pod", Bundle: b.bundle})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(ctx, "pod", ""); err != nil {
		t.Fatal(err)
	}
	if raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline"); err != nil || !bytes.Contains(raw, []byte("qemu")) {
		t.Fatalf("process %d is not the monitor: %q, %v", pid, raw, err)
	}
	end(s, pid)
	e, err := s.Wait(short(t, patience), "pod", "")
	if err != nil || e.Code == 0 {
		t.Errorf("ended with %+v, %v", e, err)
	}
	for until := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) { // its end is told before it is buried
		if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); err != nil {
			break
		}
		if time.Now().After(until) {
			t.Fatal("the monitor is there still")
		}
	}
	st, err := s.State(ctx, "pod", "")
	if err != nil || st.Phase != client.Stopped {
		t.Errorf("state %+v, %v", st, err)
	}
	if err := s.Start(ctx, "pod", ""); err == nil {
		t.Error("started once more")
	}
	if _, err := s.Delete(ctx, "pod", ""); err != nil {
		t.Error(err)
	}
	if err := s.Shutdown(ctx, "pod", false); err != nil {
		t.Error(err)
	}
}

// confine lets a process have so much more memory, and then the kernel end it.
func confine(t *testing.T, pid int, most int) {
	t.Helper()
	root, limit := "/sys/fs/cgroup", "memory.max"
	if _, err := os.Stat(filepath.Join(root, "memory/memory.limit_in_bytes")); err == nil {
		root, limit = filepath.Join(root, "memory"), "memory.limit_in_bytes" // the first version
	}
	group := filepath.Join(root, "hauberk-test-"+strconv.Itoa(pid))
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var err error
		for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
			if err = os.Remove(group); err == nil {
				return
			}
		}
		t.Errorf("who was confined does not end: %v", err)
	})
	for _, w := range []struct{ name, value string }{{limit, strconv.Itoa(most)}, {"cgroup.procs", strconv.Itoa(pid)}} {
		if err := os.WriteFile(filepath.Join(group, w.name), []byte(w.value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// workload forks without end and fills memory and disk; it must stay what can
// be asked about and killed.
func workload(t *testing.T, b *bench) {
	b.configure(t, `f() { while :; do f & done; }; (cat /dev/zero >/fill) & (head -c 2000000000 /dev/zero | tail -n 1) & f`)
	ctx := short(t, 3*patience)
	s, err := client.Start(ctx, b.p)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Create(ctx, client.Create{ID: "pod", Bundle: b.bundle}); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(ctx, "pod", ""); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second)
	began := time.Now()
	if st, err := s.State(ctx, "pod", ""); err != nil {
		t.Errorf("state: %+v, %v", st, err)
	}
	if took := time.Since(began); took > 20*time.Second { // less than one waits for a guest
		t.Errorf("its state took %v", took)
	}
	if _, err := s.Stats(short(t, 40*time.Second), "pod"); err != nil {
		t.Logf("stats: %v", err) // a guest that is lost has none
	}
	began = time.Now()
	if err := s.Kill(short(t, patience), "pod", "", syscall.SIGKILL, true); err != nil {
		t.Logf("kill: %v", err)
	}
	e, err := s.Wait(short(t, patience), "pod", "")
	if err != nil {
		t.Errorf("it does not end: %v", err)
	}
	t.Logf("ended with %d, %v after it was killed", e.Code, time.Since(began).Round(time.Millisecond))
	if _, err := s.Delete(ctx, "pod", ""); err != nil {
		t.Error(err)
	}
	if err := s.Shutdown(ctx, "pod", false); err != nil {
		t.Error(err)
	}
}
