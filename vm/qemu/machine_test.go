package qemu

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"hauberk.dev/internal/kernel"
	"hauberk.dev/vm"
)

// Users of the machines in these tests; nobody else's.
const (
	templateUID = 64500
	firstUID    = 64501
)

// patience is how long a test waits for a guest on a busy machine.
const patience = 60 * time.Second

// guest is what the tests boot: the installed kernel around the test agent.
var guest = sync.OnceValues(func() (vm.TemplateSpec, error) {
	k, err := kernel.Find("/", kernel.Flavour)
	if err != nil {
		return vm.TemplateSpec{}, err
	}
	dir, err := os.MkdirTemp("", "hauberk-vm-test-")
	if err != nil {
		return vm.TemplateSpec{}, err
	}
	scratch = dir
	a, err := kernel.Prepare(dir, k, kernel.SandboxModules()...)
	if err != nil {
		return vm.TemplateSpec{}, err
	}
	agent := filepath.Join(dir, "agent")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", agent, ".")
	build.Dir, build.Env = "testdata/agent", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return vm.TemplateSpec{}, fmt.Errorf("build test agent: %w: %s", err, out)
	}
	initrd, err := a.Initrd(agent, nil)
	return vm.TemplateSpec{
		Kernel:    vm.Blob{Path: a.Kernel, Digest: a.KernelDigest},
		Initrd:    vm.Blob{Path: initrd.Path, Digest: initrd.Digest},
		MemoryMiB: 128, CPUs: 1, TrustDomain: "test.local",
	}, err
})

var scratch string // removed by TestMain

func TestMain(m *testing.M) {
	if run := os.Getenv("HAUBERK_TEST_ABANDON"); run != "" {
		os.Exit(abandon(run))
	}
	code := m.Run()
	if scratch != "" {
		os.RemoveAll(scratch)
	}
	os.Exit(code)
}

// needMachine skips where no machine can be made, and says why.
func needMachine(t testing.TB) vm.TemplateSpec {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("starting machines needs root")
	}
	if _, err := os.Stat(program); err != nil {
		t.Skipf("no QEMU: %v", err)
	}
	spec, err := guest()
	if errors.Is(err, kernel.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// deadline is a context for one test.
func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// driver opens a driver whose machines all end with the test.
func driver(t testing.TB, run string) *Driver {
	t.Helper()
	d, err := Open(deadline(t), Config{Run: run, UID: templateUID, GID: templateUID, Ready: answers})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		endAll(t, run)
	})
	return d
}

// endAll ends what a failed test left.
func endAll(t testing.TB, run string) {
	left, err := vm.Orphans(run)
	if err != nil {
		t.Error(err)
	}
	for _, o := range left {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		if err := o.End(ctx); err != nil {
			t.Error(err)
		}
		cancel()
	}
}

func answers(ctx context.Context, m *vm.Machine) error {
	a, err := talk(ctx, m)
	if err != nil {
		return err
	}
	defer a.conn.Close()
	if got, err := a.ask("ping"); err != nil || got != "pong" {
		return fmt.Errorf("agent says %q, %w", got, err)
	}
	return nil
}

// agent is a conversation with the test agent.
type agent struct {
	conn net.Conn
	in   *bufio.Scanner
}

func talk(ctx context.Context, m *vm.Machine) (*agent, error) {
	conn, err := m.Agent(ctx)
	if err != nil {
		return nil, err
	}
	if d, ok := ctx.Deadline(); ok {
		conn.SetDeadline(d)
	}
	return &agent{conn, bufio.NewScanner(conn)}, nil
}

func (a *agent) ask(line string) (string, error) {
	if _, err := fmt.Fprintln(a.conn, line); err != nil {
		return "", err
	}
	if !a.in.Scan() {
		return "", fmt.Errorf("%s: no answer: %w", line, a.in.Err())
	}
	return a.in.Text(), nil
}

// say is ask that must succeed.
func say(t testing.TB, a *agent, line string) string {
	t.Helper()
	got, err := a.ask(line)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func converse(t testing.TB, ctx context.Context, m *vm.Machine) *agent {
	t.Helper()
	a, err := talk(ctx, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.conn.Close() })
	return a
}

func machine(i int, spec vm.TemplateSpec) vm.Spec {
	return vm.Spec{ID: fmt.Sprintf("m%d", i), UID: uint32(firstUID + i), GID: uint32(firstUID + i), Template: spec}
}

func TestTemplateAndClones(t *testing.T) {
	spec := needMachine(t)
	run := filepath.Join(t.TempDir(), "run")
	d, ctx := driver(t, run), deadline(t)
	began := time.Now()
	template, err := d.Template(ctx, spec, func(s string) {
		t.Log(s)
		if left, err := vm.Orphans(run); err != nil || len(left) != 0 {
			t.Errorf("left beside a template: %v, %v", left, err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("template made in %v", time.Since(began).Round(time.Millisecond))
	if again, err := d.Template(ctx, spec, nil); err != nil || again != template {
		t.Errorf("asked again: another template, %v", err)
	}
	seen := map[string]int{}
	for i := range 3 {
		began := time.Now()
		m, err := d.Clone(ctx, template, machine(i, spec))
		if err != nil {
			t.Fatal(err)
		}
		cloned := time.Since(began)
		a := converse(t, ctx, m)
		if got := say(t, a, "ping"); got != "pong" {
			t.Errorf("clone %d says %q", i, got)
		}
		t.Logf("clone %d runs after %v, answers after %v", i, cloned.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
		seed := make([]byte, 32)
		seed[0] = byte(i)
		if got := say(t, a, "reseed "+hex.EncodeToString(seed)); got != "ok" {
			t.Errorf("reseed: %s", got)
		}
		random := say(t, a, "random")
		if before, twice := seen[random]; twice || len(random) != 32 {
			t.Errorf("clones %d and %d drew the same random bytes %q", before, i, random)
		}
		seen[random] = i
		mem, err := m.Memory()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("clone %d: private %d KiB, shared %d KiB, proportional %d KiB", i, mem.Private>>10, mem.Shared>>10, mem.Proportional>>10)
		if mem.Private == 0 || mem.Shared == 0 {
			t.Errorf("memory %+v", mem)
		}
		if m.Template() != template.Key {
			t.Errorf("machine says its template is %q", m.Template())
		}
		confined(t, m)
	}
}
