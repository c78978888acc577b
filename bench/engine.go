package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"hauberk.dev/internal/stage"
)

// The runtimes that containerd starts side by side.
const (
	ours   = "io.containerd.hauberk.v2"
	runcV2 = "io.containerd.runc.v2"

	engineImage = "docker.io/bench/inside:1"
	callTime    = 3 * time.Minute
)

// runtimeUnderTest is a runtime and how it is told to start.
type runtimeUnderTest struct {
	name  string // in the table
	shim  string
	start string // HAUBERK_SHIM_START, of ours
	runsc bool   // in place of runc, which it can stand in for
}

var underTest = []runtimeUnderTest{
	{name: "hauberk, from the pool", shim: ours, start: "pool"},
	{name: "hauberk, cloned", shim: ours, start: "clone"},
	{name: "hauberk, cold", shim: ours, start: "cold"},
	{name: "runc", shim: runcV2},
	{name: "gVisor", shim: runcV2, runsc: true},
}

// engine is a containerd with directories of its own, and the runtime that its
// shims start.
type engine struct {
	runtimeUnderTest
	dir    string
	bin    string // holds the programs of this tree
	cmd    *exec.Cmd
	exited chan struct{}
	made   int
}

// openEngine starts Debian's containerd for one runtime and imports the image.
func openEngine(ctx context.Context, l *lab, r runtimeUnderTest) (_ *engine, err error) {
	dir, err := os.MkdirTemp("", "hb-") // short, for sockets
	if err != nil {
		return nil, err
	}
	e := &engine{runtimeUnderTest: r, dir: dir, bin: l.bin, exited: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start containerd for %s: %w", r.name, err), e.close(ctx))
		}
	}()
	config := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = %q
[ttrpc]
address = %q
`, e.path("root"), e.path("state"), e.path("c.sock"), e.path("c.sock.ttrpc"))
	if err := os.WriteFile(e.path("config.toml"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	if r.runsc {
		// Debian's containerd gives gVisor's own shim no way to leave the
		// score of the kernel's memory killer alone; runc's shim does.
		script := fmt.Sprintf("#!/bin/sh\nexec %q --ignore-cgroups \"$@\"\n", filepath.Join(l.rivals, "runsc"))
		if err := os.WriteFile(e.path("runsc"), []byte(script), 0o700); err != nil {
			return nil, err
		}
	}
	log, err := os.Create(e.path("log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	e.cmd = exec.Command("containerd", "-c", e.path("config.toml"))
	e.cmd.Stdout, e.cmd.Stderr = log, log
	e.cmd.Env = append(os.Environ(), "PATH="+l.bin+":"+l.rivals+":"+os.Getenv("PATH"),
		"HAUBERK_SHIM_STATE="+e.path("s"), "HAUBERK_SHIM_RUN="+e.path("r"), "HAUBERK_SHIM_START="+r.start)
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us: containers end before it does
	if err := e.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { e.cmd.Wait(); close(e.exited) }()
	if err := e.await(ctx); err != nil {
		return nil, err
	}
	archive := filepath.Join(l.dir, "inside.tar")
	if _, err := os.Stat(archive); err != nil {
		layer, err := stage.Layer(map[string]string{"inside": "/proc/self/exe"})
		if err == nil {
			err = stage.Layout(archive, engineImage, layer)
		}
		if err != nil {
			return nil, err
		}
	}
	_, err = e.ctr(ctx, "images", "import", archive)
	return e, err
}

func (e *engine) path(name string) string { return filepath.Join(e.dir, name) }

// await waits until containerd answers.
func (e *engine) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		_, err := e.ctr(ctx, "version")
		if err == nil {
			return nil
		}
		select {
		case <-e.exited:
			return fmt.Errorf("it ended: %s", text(e.path("log")))
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// ctr calls containerd's client and returns what it printed.
func (e *engine) ctr(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ctr", append([]string{"-a", e.path("c.sock")}, args...)...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("ctr %s: %w: %.600s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// id gives names of one length that no other engine has: runsc takes a name for
// any that begins with it.
func (e *engine) id() string {
	e.made++
	return fmt.Sprintf("b%s-%05d", strings.TrimPrefix(filepath.Base(e.dir), "hb-"), e.made)
}

// begin is the start of a command that runs a container.
func (e *engine) begin(flags ...string) []string {
	args := []string{"run", "--runtime", e.shim}
	if e.shim == runcV2 { // its own, or all of the host share one
		args = append(args, "--runc-root", e.path("runc"))
	}
	if e.runsc {
		args = append(args, "--runc-binary", e.path("runsc"))
	}
	return append(args, flags...)
}

// run starts a container that ends by itself and returns what it printed.
func (e *engine) run(ctx context.Context, flags []string, args ...string) (string, error) {
	return e.ctr(ctx, slices.Concat(e.begin("--rm"), flags, []string{engineImage, e.id()}, args)...)
}

// word starts a container and times its first word.
func (e *engine) word(ctx context.Context, id string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	args := slices.Concat([]string{"-a", e.path("c.sock")}, e.begin("--rm"), []string{engineImage, id, "/bin/busybox", "echo", "up"})
	cmd := exec.CommandContext(ctx, "ctr", args...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	got := make([]byte, 3)
	_, err = io.ReadFull(out, got)
	took := time.Since(began)
	if werr := cmd.Wait(); werr != nil || err != nil || string(got) != "up\n" {
		return 0, fmt.Errorf("%s: first word %q: %w, %w: %.600s", e.name, got, err, werr, said.Bytes())
	}
	return took, nil
}

// idle starts a container that sleeps, and returns its name.
func (e *engine) idle(ctx context.Context, flags ...string) (string, error) {
	return e.idleAs(ctx, e.id(), flags...)
}

func (e *engine) idleAs(ctx context.Context, id string, flags ...string) (string, error) {
	_, err := e.ctr(ctx, slices.Concat(e.begin("-d"), flags, []string{engineImage, id, "/bin/busybox", "sleep", "3600"})...)
	return id, err
}

// end ends containers made by idle.
func (e *engine) end(ctx context.Context, ids ...string) error {
	ctx = context.WithoutCancel(ctx) // whoever is told to stop leaves nothing
	var mu sync.Mutex
	var wg sync.WaitGroup
	var errs []error
	slots := make(chan struct{}, atATime)
	for _, id := range ids {
		slots <- struct{}{}
		wg.Go(func() {
			_, err := e.ctr(ctx, "tasks", "rm", "-f", id)
			_, gone := e.ctr(ctx, "containers", "rm", id)
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err, gone)
			<-slots
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// close ends containerd and what its shims keep for later.
func (e *engine) close(context.Context) error {
	if e.cmd != nil && e.cmd.Process != nil {
		e.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-e.exited:
		case <-time.After(20 * time.Second):
			e.cmd.Process.Kill()
			<-e.exited
		}
	}
	// runsc leaves a mount of an empty network namespace beside its containers.
	_ = syscall.Unmount(e.path("runc/default/null-netns"), syscall.MNT_DETACH) // there is none of the others
	return errors.Join(stage.EndKeeper(filepath.Join(e.bin, "containerd-shim-hauberk-v2"), e.path("r")), os.RemoveAll(e.dir))
}
