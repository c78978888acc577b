package hostile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"hauberk.dev/internal/stage"
	"hauberk.dev/vm"
	"hauberk.dev/vm/boot"
)

// User of the first machine in these tests; nobody else's.
const user = 0x48470000

// patience is how long is waited for what happens sooner or later. Only what
// hangs takes so long, on whatever machine.
const patience = 5 * time.Minute

// memoryMiB of each guest, and what a monitor may hold beside it.
const (
	memoryMiB  = 128
	monitorMiB = 256
)

// need skips where no machine can be made.
func need(t *testing.T) {
	t.Helper()
	if err := stage.Missing(); err != nil {
		t.Skip(err)
	}
}

// build makes a program, with what the linker is to set.
func build(t *testing.T, to, what, set string) string {
	t.Helper()
	c := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w "+set, "-o", to, what)
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v: %s", what, err, out)
	}
	return to
}

// guests prepares guests with an agent.
func guests(t *testing.T, dir, agent string) *boot.Guest {
	t.Helper()
	g, err := boot.Open(t.Context(), boot.Config{State: filepath.Join(dir, "state"), Run: filepath.Join(dir, "run"), User: user, Agent: agent})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

func start(t *testing.T, g *boot.Guest, n uint32) *vm.Machine {
	t.Helper()
	m, err := g.Driver.Boot(t.Context(), vm.Spec{ID: fmt.Sprintf("h%d", n), UID: user + n, GID: user + n, Template: g.Template(memoryMiB, 1, "hostile")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := m.Kill(ctx); err != nil {
			t.Errorf("kill %s: %v", m.ID(), err)
		}
		if _, err := os.Stat(m.Dir()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("its run directory is left: %v", err)
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", m.PID())); err == nil {
			t.Errorf("its monitor is left")
		}
	})
	return m
}

// short is a bound on a conversation with a guest.
func short(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// neighbour pings a good guest until it is stopped, and counts.
type neighbour struct {
	pings atomic.Int64
	worst atomic.Int64 // nanoseconds
	stop  context.CancelFunc
	done  chan error
}

func watch(t *testing.T, m *vm.Machine) *neighbour {
	t.Helper()
	c, _, err := m.Channel(short(t, patience), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	n := &neighbour{stop: stop, done: make(chan error, 1)}
	go func() {
		defer c.Close()
		for ctx.Err() == nil {
			began := time.Now()
			asked, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
			err := c.Ping(asked)
			cancel()
			if err != nil {
				n.done <- err
				return
			}
			n.worst.Store(max(n.worst.Load(), int64(time.Since(began))))
			n.pings.Add(1)
			time.Sleep(20 * time.Millisecond)
		}
		n.done <- nil
	}()
	return n
}

// the acts of the guest below, in order, and why the channel closes. The first
// ones come before there is a session, so that one call sees them all.
const before = "garbage,silence,half,oversize,future"

var acts = []struct{ name, want string }{
	{"records", "beyond their credit"},
	{"output", "process 1 is not ours"},
	{"wrong id", "nothing was asked under number"},
	{"twice", "nothing was asked under number"},
	{"list", "parse "},
}

// TestMachine boots a machine whose PID 1 is hostile beside one that is not.
// Whatever it says, its channel closes with a reason; whatever it does, the
// host's memory and files stay what they were meant to be, and its neighbour
// notices nothing.
func TestMachine(t *testing.T) {
	need(t)
	dir := t.TempDir()
	script := before
	for _, a := range acts {
		script += "," + a.name
	}
	bad := guests(t, dir, build(t, filepath.Join(dir, "hostile"), "./testdata/guest", "-X 'main.acts="+script+",never,worst'"))
	good := guests(t, dir, build(t, filepath.Join(dir, "hauberk-guest"), "hauberk.dev/cmd/hauberk-guest", ""))
	n := watch(t, start(t, good, 1))
	m := start(t, bad, 2)
	var heap runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&heap)

	for _, a := range acts {
		began := time.Now()
		c, act := onStage(t, m)
		if act != a.name {
			t.Fatalf("the guest is about to play %q, want %q", act, a.name)
		}
		_, err := c.Processes(short(t, patience))
		select {
		case <-c.Done():
		case <-time.After(patience):
			t.Errorf("%s: the channel is open still (%v)", a.name, err)
		}
		if err := c.Err(); err == nil || !strings.Contains(err.Error(), a.want) {
			t.Errorf("%s: closed by %v, want %q", a.name, err, a.want)
		}
		c.Close()
		t.Logf("%-8s after %5d ms: %v", a.name, time.Since(began).Milliseconds(), c.Err())
	}
	worst(t, m, never(t, m))

	var now runtime.MemStats
	runtime.ReadMemStats(&now)
	if grown := int64(now.HeapSys) - int64(heap.HeapSys); grown > 64<<20 {
		t.Errorf("this process' heap has grown by %d KiB", grown>>10)
	}
	runtime.GC()
	runtime.ReadMemStats(&now)
	if kept := int64(now.HeapAlloc) - int64(heap.HeapAlloc); kept > 4<<20 {
		t.Errorf("%d KiB of what it said are kept", kept>>10)
	}
	if kib := resident(t, m.PID()); m.Err() == nil && kib > (memoryMiB+monitorMiB)<<10 {
		t.Errorf("the monitor holds %d KiB for a guest of %d MiB", kib, memoryMiB)
	}
	if size := files(t, m.Dir()); size > 1<<20 {
		t.Errorf("the run directory holds %d bytes", size)
	}
	if said := m.Console(); strings.ContainsAny(said, "\x1b\x07\x00") || len(said) > 32<<10 {
		t.Errorf("what it printed is handed on raw, or whole: %.200q", said)
	}
	n.stop()
	if err := <-n.done; err != nil {
		t.Errorf("its neighbour: %v", err)
	}
	t.Logf("its neighbour answered %d times, after %v at most", n.pings.Load(), time.Duration(n.worst.Load()).Round(time.Millisecond))
}

// onStage opens a session with the guest, and says which act it is about to play.
func onStage(t *testing.T, m *vm.Machine) (c *vm.Channel, act string) {
	t.Helper()
	c, hello, err := m.Channel(short(t, patience), func([]byte) { time.Sleep(time.Millisecond) })
	if err != nil {
		t.Fatalf("%v; it says %.300s", err, m.Console())
	}
	t.Cleanup(func() { c.Close() })
	return c, hello.Release
}

// never asks a guest that does not answer until it has heard the question, and
// returns the session after that.
func never(t *testing.T, m *vm.Machine) *vm.Channel {
	t.Helper()
	for asked := 0; ; asked++ {
		c, act := onStage(t, m)
		if act == "worst" && asked > 0 {
			return c
		}
		if act != "never" {
			t.Fatalf("the guest is about to play %q, %d times asked in vain", act, asked)
		}
		if err := c.Ping(short(t, 300*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a guest that does not answer: %v", err)
		}
		c.Close()
	}
}

// worst lets the guest fork, fill its memory and its disk, and spin: it may
// end itself, and must stay what can be ended.
func worst(t *testing.T, m *vm.Machine, c *vm.Channel) {
	t.Helper()
	defer c.Close()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end) && m.Err() == nil; {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if err := c.Ping(ctx); err != nil {
			t.Logf("in its last act: %v", err)
			time.Sleep(time.Second)
		}
		cancel()
		time.Sleep(100 * time.Millisecond)
	}
	if err := m.Err(); err != nil {
		t.Logf("it has ended: %v", err)
	}
}

// resident is what a process holds, in KiB; 0 if it is gone.
func resident(t *testing.T, pid int) (kib int) {
	t.Helper()
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			return kib
		}
	}
	return 0
}

// files is the size of what a directory holds.
func files(t *testing.T, dir string) (size int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // turned meanwhile
		}
		size += info.Size()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return size
}
