package qemu

import (
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/vm"
)

// realGuest is the guest of the tests around the agent that sandboxes run.
func realGuest(t testing.TB) vm.TemplateSpec {
	t.Helper()
	spec := needMachine(t)
	k, err := kernel.Find("/", kernel.Flavour)
	if err != nil {
		t.Fatal(err)
	}
	a, err := kernel.Prepare(filepath.Join(scratch, "real"), k, kernel.SandboxModules()...)
	if err != nil {
		t.Fatal(err)
	}
	agent := filepath.Join(scratch, "hauberk-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", agent, "hauberk.dev/cmd/hauberk-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build hauberk-guest: %v: %s", err, out)
	}
	initrd, err := a.Initrd(agent, nil)
	if err != nil {
		t.Fatal(err)
	}
	spec.Initrd = vm.Blob{Path: initrd.Path, Digest: initrd.Digest}
	return spec
}

// TestRealAgent clones machines with the agent that sandboxes run and speaks
// with it as a node does.
func TestRealAgent(t *testing.T) {
	spec := realGuest(t)
	run, ctx := filepath.Join(t.TempDir(), "run"), deadline(t)
	t.Cleanup(func() { endAll(t, run) })
	d, err := Open(ctx, Config{Run: run, UID: templateUID, GID: templateUID})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	began := time.Now()
	template, err := d.Template(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("template made in %v", time.Since(began).Round(time.Millisecond))
	for i := range 3 {
		began := time.Now()
		m, err := d.Clone(ctx, template, machine(i, spec))
		if err != nil {
			t.Fatal(err)
		}
		cloned := time.Since(began)
		c, hello, err := m.Channel(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		greeted := time.Since(began)
		if hello.Version != guestproto.Version {
			t.Errorf("hello %+v", hello)
		}
		seed := guestproto.Reseed{UnixNanos: time.Now().UnixNano(), BootID: "2b1a9d4e-9a53-4a3f-8f0e-1d0c5a7b6e01", Hostname: m.ID()}
		rand.Read(seed.Entropy[:])
		if err := c.Reseed(ctx, seed); err != nil {
			t.Error(err)
		}
		if err := c.Ping(ctx); err != nil {
			t.Error(err)
		}
		mem, err := m.Memory()
		if err != nil {
			t.Error(err)
		}
		t.Logf("clone %d runs after %v, greets after %v, is reseeded after %v; private %d KiB, shared %d KiB", i, cloned.Round(time.Millisecond),
			greeted.Round(time.Millisecond), time.Since(began).Round(time.Millisecond), mem.Private>>10, mem.Shared>>10)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		// The next session must find the agent again.
		if c, _, err = m.Channel(ctx, nil); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		defer func() {
			if err := m.Kill(ctx); err != nil {
				t.Error(err)
			}
			gone(t, m.PID(), m.Dir())
		}()
	}
}
