package keep

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/vm"
)

// patience of the tests with a busy machine.
const testTime = 90 * time.Second

// TestMain is also the keeper that the tests start.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "keep" {
		if err := keepMain(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func keepMain(args []string) error {
	c := Config{PerSize: 1, Sizes: 1, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	f := flag.NewFlagSet("keep", flag.ExitOnError)
	f.StringVar(&c.State, "state", "", "")
	f.StringVar(&c.Run, "run", "", "")
	f.StringVar(&c.Agent, "agent", "", "")
	f.DurationVar(&c.Idle, "idle", time.Minute, "")
	f.Parse(args)
	c.Prepare = Rehearse(filepath.Join(c.State, "rehearsal"), nil)
	return Run(context.Background(), c)
}

// place makes a client with directories of its own, and leaves nothing running.
func place(t *testing.T, idle time.Duration) Client {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("starting machines needs root")
	}
	if _, err := kernel.Find("/", kernel.Flavour); errors.Is(err, kernel.ErrMissing) {
		t.Skip(err)
	}
	dir := t.TempDir()
	agent := filepath.Join(dir, "hauberk-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", agent, "hauberk.dev/cmd/hauberk-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build hauberk-guest: %v: %s", err, out)
	}
	c := Client{Place: Place{State: filepath.Join(dir, "state"), Run: filepath.Join(dir, "run"), Agent: agent}}
	c.Start = []string{"keep", "-state", c.State, "-run", c.Run, "-agent", agent, "-idle", idle.String()}
	if err := os.MkdirAll(c.Machines(), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		killKeeper(t, c)
		if err := c.Sweep(context.Background()); err != nil {
			t.Error(err)
		}
		left, _ := vm.Orphans(c.Machines())
		for _, o := range left {
			if err := o.End(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	return c
}

// keeperPID finds the keeper of a place, 0 if there is none.
func keeperPID(c Client) int {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range lines {
		raw, _ := os.ReadFile(name)
		args := strings.Split(string(raw), "\x00")
		if len(args) > 5 && args[1] == "keep" && args[5] == c.Run {
			var pid int
			fmt.Sscanf(name, "/proc/%d/", &pid)
			return pid
		}
	}
	return 0
}

func killKeeper(t *testing.T, c Client) {
	t.Helper()
	pid := keeperPID(c)
	if pid == 0 {
		return
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	for until := time.Now().Add(testTime); keeperPID(c) != 0; {
		if time.Now().After(until) {
			t.Fatal("the keeper does not die")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func ask(t *testing.T, c Client, id string) Given {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTime)
	defer cancel()
	began := time.Now()
	g, err := c.Machine(ctx, Request{ID: id, MemoryMiB: 120, CPUs: 1, TrustDomain: "test"}, func(line string) { t.Log(line) })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %s after %v", id, g.How, time.Since(began).Round(time.Millisecond))
	return g
}

// works speaks with a machine's agent.
func works(t *testing.T, g Given) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTime)
	defer cancel()
	began := time.Now()
	ch, hello, err := g.Machine.Channel(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(ch.Reseed(ctx, vm.NewSeed("h")), ch.Ping(ctx), ch.Close()); err != nil || hello.Version != guestproto.Version {
		t.Errorf("%s: %+v, %v", g.Machine.ID(), hello, err)
	}
	t.Logf("%s: speaks after %v", g.Machine.ID(), time.Since(began).Round(time.Millisecond))
}

func kept(t *testing.T, c Client) (spares int) {
	t.Helper()
	dir, err := c.keeper()
	if err != nil {
		t.Fatal(err)
	}
	left, err := vm.Orphans(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range left {
		if o.Alive {
			spares++
		}
	}
	return spares
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for until := time.Now().Add(testTime); !f(); {
		if time.Now().After(until) {
			t.Fatal(what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// pooled waits until a spare machine is ready.
func pooled(t *testing.T, c Client) {
	t.Helper()
	dir, err := c.keeper()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "no spare machine was made", func() bool {
		left, err := vm.Orphans(dir)
		return err == nil && len(left) == 1 && strings.HasPrefix(left[0].ID, "spare-") && left[0].Journal.State == vm.StateReady && quiet(left[0].Journal.PID)
	})
}

// quiet says whether a process has no processor time to speak of: a paused
// machine.
func quiet(pid int) bool {
	used := func() string { raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid)); return string(raw) }
	before := used()
	time.Sleep(100 * time.Millisecond)
	return before == used()
}

// TestKeeper goes through the life of a keeper: started by who asks first, it
// gives machines and keeps one ahead; killed, it takes no machine with it that
// is somebody's, and what it kept is swept.
func TestKeeper(t *testing.T) {
	c := place(t, time.Minute)
	first := ask(t, c, "c-first")
	if first.How != FromTemplate || first.Machine.Tap() == nil {
		t.Errorf("the first machine is a %s, its tap %v", first.How, first.Machine.Tap())
	}
	works(t, first)
	pooled(t, c)
	second := ask(t, c, "c-second")
	if second.How != FromPool {
		t.Errorf("the second machine is a %s", second.How)
	}
	works(t, second)
	if a, b := user(t, first), user(t, second); a == b || a <= FirstUser || b <= FirstUser {
		t.Errorf("users %d and %d", a, b)
	}
	refusals(t, c)
	pooled(t, c)
	killKeeper(t, c)
	works(t, first)
	if kept(t, c) != 1 {
		t.Errorf("a killed keeper left %d machines, want the spare one", kept(t, c))
	}
	eventually(t, "what a killed keeper kept is not swept", func() bool {
		if err := c.Sweep(t.Context()); err != nil { // it may be dying still
			t.Fatal(err)
		}
		return kept(t, c) == 0
	})
	third := ask(t, c, "c-third")
	works(t, third)
	for _, g := range []Given{first, second, third} {
		if err := end(g.Machine); err != nil {
			t.Error(err)
		}
	}
	none(t, c)
}

func user(t *testing.T, g Given) uint32 {
	j, err := vm.ReadJournal(g.Machine.Dir())
	if err != nil {
		t.Error(err)
	}
	return j.UID
}

// none checks that no machine is anybody's.
func none(t *testing.T, c Client) {
	t.Helper()
	eventually(t, "machines are left", func() bool {
		left, err := vm.Orphans(c.Machines())
		return err == nil && len(left) == 0
	})
}

// refusals asks for what a keeper does not give, and in ways it does not take.
func refusals(t *testing.T, c Client) {
	ctx, cancel := context.WithTimeout(t.Context(), testTime)
	defer cancel()
	for says, r := range map[string]Request{
		"file already exists": {ID: "c-first", TrustDomain: "test"},
		"letters, digits":     {ID: "../x", TrustDomain: "test"},
		"no trust domain":     {ID: "c-x"},
		"no machine has 5000": {ID: "c-x", MemoryMiB: 5_000_000, TrustDomain: "test"},
	} {
		if _, err := c.Machine(ctx, r, nil); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("error %v, want one that says %q", err, says)
		}
	}
	// Who asks and goes away leaves no machine behind.
	conn, err := c.connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, `{"version":1,"id":"c-gone","memoryMiB":128,"cpus":1,"trustDomain":"test"}`+"\n")
	eventually(t, "the machine never came", func() bool {
		_, err := os.Stat(filepath.Join(c.Machines(), "c-gone"))
		return err == nil
	})
	conn.Close()
	eventually(t, "the machine of nobody stays", func() bool {
		_, err := os.Stat(filepath.Join(c.Machines(), "c-gone"))
		return errors.Is(err, os.ErrNotExist)
	})
	dir, err := c.keeper()
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Join(dir, socketName)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", fi, err)
	}
}

// TestKeeperIdles shows that a keeper that nobody needs ends, with all it kept.
func TestKeeperIdles(t *testing.T) {
	c := place(t, 2*time.Second)
	g := ask(t, c, "c-one")
	eventually(t, "the keeper stays", func() bool { return keeperPID(c) == 0 })
	if kept(t, c) != 0 {
		t.Errorf("it left %d machines", kept(t, c))
	}
	works(t, g)
	if err := end(g.Machine); err != nil {
		t.Error(err)
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"c-x","memoryMiB":128,"cpus":1,"trustDomain":"test"}`))
	f.Add([]byte(`{"version":1,"cpus":-1}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := parseRequest(line)
		if err != nil {
			return
		}
		mib, cpus := vm.SizeClass(r.MemoryMiB, r.CPUs)
		if mib < r.MemoryMiB || cpus < r.CPUs || r.TrustDomain == "" {
			t.Errorf("%+v is taken for %d MiB, %d CPUs", r, mib, cpus)
		}
	})
}

func FuzzParseAnswer(f *testing.F) {
	f.Add([]byte(`{"progress":"boot template"}`))
	f.Add([]byte(`{"dir":"/run/x","how":"pool"}`))
	f.Add([]byte(`{"error":"no"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		if a, err := parseAnswer(line); err == nil && a.Progress == "" && a.Dir == "" && a.Error == "" {
			t.Error("an empty answer was taken")
		}
	})
}

// TestEndsWhatItKeeps ends a keeper as an administrator does.
func TestEndsWhatItKeeps(t *testing.T) {
	c := place(t, time.Minute)
	if err := c.End(t.Context()); err != nil {
		t.Errorf("end where none is: %v", err)
	}
	g := ask(t, c, "c-one")
	pooled(t, c)
	for range 2 {
		if err := c.End(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if keeperPID(c) != 0 || kept(t, c) != 0 {
		t.Errorf("keeper %d, %d machines are left", keeperPID(c), kept(t, c))
	}
	works(t, g)
	another := ask(t, c, "c-two")
	dir, err := c.keeper()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the keeper serves a directory that is gone", func() bool { return keeperPID(c) == 0 })
	works(t, another)
	if err := end(another.Machine); err != nil {
		t.Error(err)
	}
	if err := end(g.Machine); err != nil {
		t.Error(err)
	}
}
