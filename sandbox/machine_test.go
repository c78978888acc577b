package sandbox_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/guard/trail"
	"hauberk.dev/internal/stage"
	"hauberk.dev/sandbox"
)

// callTime bounds one call of the tests.
const callTime = 5 * time.Minute

// place is where the tests' sandboxes are, with a real shim.
func place(t *testing.T) sandbox.Config {
	t.Helper()
	if err := stage.Missing(); err != nil {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "hand") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := stage.Build(dir, "containerd-shim-hauberk-v2", "hauberk-guest"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { leftOf(t, dir) })
	t.Setenv("HAUBERK_SHIM_POOL", "off") // each boots cold: test/run takes kept ones
	return sandbox.Config{
		State: dir + "/s", Run: dir + "/r", Shim: dir + "/containerd-shim-hauberk-v2", ShimState: dir + "/ss", ShimRun: dir + "/sr",
	}
}

// leftOf finds what the tests' sandboxes have left.
func leftOf(t *testing.T, dir string) {
	if err := stage.EndKeeper(dir+"/containerd-shim-hauberk-v2", dir+"/sr"); err != nil {
		t.Error(err)
	}
	for _, d := range []string{"s/boxes", "s/names", "sr/vm"} {
		if left, err := os.ReadDir(filepath.Join(dir, d)); err == nil && len(left) > 0 {
			t.Errorf("left in %s: %v", d, left)
		}
	}
	for pid, line := range stage.Processes(dir) {
		t.Errorf("process %d is left: %s", pid, line)
	}
}

// world is a host with one sandbox that stays while the tests use it.
type world struct {
	conf  sandbox.Config
	host  *sandbox.Host
	image string
	box   *sandbox.Sandbox
}

// TestSandbox is what programs do with sandboxes, on one host.
func TestSandbox(t *testing.T) {
	w := &world{conf: place(t)}
	layer, err := stage.Layer(nil)
	if err == nil {
		err = stage.DockerArchive(w.conf.State+".tar", "busybox:latest", layer, "A=image")
	}
	if err != nil {
		t.Fatal(err)
	}
	w.image = "docker-archive:" + w.conf.State + ".tar"
	if w.host, err = sandbox.Open(w.conf); err != nil {
		t.Fatal(err)
	}
	w.box = w.start(t, sandbox.Options{Name: "stays", Stdin: true, Env: []string{"B=mine"}, Hostname: "inside",
		Args: []string{"sh", "-c", `echo up; echo wrong >&2; while read l; do echo "got $l"; done; sleep 1000`}})
	t.Run("streams", w.testStreams)
	t.Run("exec", w.testExec)
	t.Run("events", w.testEvents)
	t.Run("look", w.testLook)
	t.Run("files", w.testFiles)
	t.Run("pause", w.testPause)
	t.Run("network", w.testNetwork)
	t.Run("snapshot", w.testSnapshot)
	t.Run("stop", w.testStop)
	t.Run("not run", w.testNotRun)
	t.Run("shim killed", w.testShimKilled)
	t.Run("example", w.testExample)
}

// testEvents reads what the Guard told of what ran before.
func (w *world) testEvents(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	found := errors.New("found")
	err := w.box.Events(ctx, true, func(r trail.Record) error {
		if r.Op == "started" && r.Verdict == "allowed" && strings.HasSuffix(r.Process.Exe, "busybox") && r.Sandbox.ID == w.box.ID() && r.Process.Container != "" {
			return found
		}
		return nil
	})
	if !errors.Is(err, found) {
		t.Errorf("%v; want a record of the first program", err)
	}
}

// start makes and starts a sandbox. With the test it goes.
func (w *world) start(t *testing.T, o sandbox.Options) *sandbox.Sandbox {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	o.Image = w.image
	b, err := w.host.Create(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), callTime)
		defer cancel()
		if err := b.Remove(ctx, true); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			t.Error(err)
		}
	})
	if err := b.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return b
}

// exec runs a command and gives what it printed and its code.
func (w *world) exec(t *testing.T, in string, c sandbox.Cmd) (out, errs string, code int) {
	t.Helper()
	return execIn(t, w.box, in, c)
}

func execIn(t *testing.T, b *sandbox.Sandbox, in string, c sandbox.Cmd) (out, errs string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	c.Stdin = in != ""
	p, err := b.Exec(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var o, e strings.Builder
	std := sandbox.Stdio{Out: &o, Err: &e}
	if in != "" {
		std.In = strings.NewReader(in)
	}
	if err := p.Run(ctx, std); err != nil {
		t.Fatal(err)
	}
	if code, err = p.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	return o.String(), e.String(), code
}

// until waits for a text in the log.
func (w *world) until(t *testing.T, text string) string {
	t.Helper()
	var out, errs strings.Builder
	for began := time.Now(); time.Since(began) < callTime; time.Sleep(20 * time.Millisecond) {
		out.Reset()
		if err := w.box.Logs(t.Context(), sandbox.LogOptions{Tail: -1}, &out, &errs); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out.String(), text) {
			return out.String()
		}
	}
	t.Fatalf("no %q in %q", text, out.String())
	return ""
}

// testStreams attaches, leaves and comes back; the log has all of it.
func (w *world) testStreams(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	for _, word := range []string{"one", "two"} {
		s, err := w.box.Attach(ctx)
		if err != nil {
			t.Fatal(err)
		}
		leave, left := context.WithCancel(ctx)
		var out strings.Builder
		done := make(chan error, 1)
		in, typed := io.Pipe()
		go func() { done <- s.Run(leave, sandbox.Stdio{In: in, Out: &out}) }()
		fmt.Fprintln(typed, word)
		w.until(t, "got "+word)
		left()
		if err := <-done; !errors.Is(err, context.Canceled) || !strings.Contains(out.String(), "got "+word) {
			t.Errorf("attached: %v, %q", err, out.String())
		}
		typed.Close()
	}
	var out, errs strings.Builder
	if err := w.box.Logs(ctx, sandbox.LogOptions{Tail: 1, Timestamps: true}, &out, &errs); err != nil || !strings.HasSuffix(out.String(), "Z got two\n") {
		t.Errorf("the last line is %q, %v", out.String(), err)
	}
	out.Reset()
	if err := w.box.Logs(ctx, sandbox.LogOptions{Tail: -1}, &out, &errs); err != nil || out.String() != "up\ngot one\ngot two\n" || errs.String() != "wrong\n" {
		t.Errorf("the log has %q and %q, %v", out.String(), errs.String(), err)
	}
}

func (w *world) testExec(t *testing.T) {
	out, errs, code := w.exec(t, "typed", sandbox.Cmd{
		Args: []string{"sh", "-c", "cat; echo; echo $A $B $C; pwd; id -u; hostname; echo wrong >&2; exit 9"},
		Env:  []string{"C=here"}, Dir: "/tmp", User: "app",
	})
	if out != "typed\nimage mine here\n/tmp\n1000\ninside\n" || errs != "wrong\n" || code != 9 {
		t.Errorf("printed %q and %q, ended with %d", out, errs, code)
	}
	if out, _, code := w.exec(t, "", sandbox.Cmd{Args: []string{"sh", "-c", "tty; stty size"}, Terminal: true, Rows: 7, Cols: 70}); out != "/dev/pts/0\r\n7 70\r\n" || code != 0 {
		t.Errorf("with a terminal: %q, %d", out, code)
	}
	big := strings.Repeat("0123456789abcdef", 1<<16)
	if out, _, _ := w.exec(t, big, sandbox.Cmd{Args: []string{"cat"}}); out != big {
		t.Errorf("%d bytes of %d came back", len(out), len(big))
	}
	// What was written does not run: the Guard is there.
	if _, _, code := w.exec(t, "", sandbox.Cmd{Args: []string{"sh", "-c", "cp /bin/busybox /tmp/x && /tmp/x echo ran"}}); code != 126 {
		t.Errorf("a written program ended with %d, want 126", code)
	}
	var program *sandbox.ProgramError
	if _, err := w.box.Exec(t.Context(), sandbox.Cmd{Args: []string{"nosuch"}}); !errors.As(err, &program) || program.Code != 127 {
		t.Errorf("a program that is not there: %v", err)
	}
	p, err := w.box.Exec(t.Context(), sandbox.Cmd{Args: []string{"sh", "-c", "echo up >/tmp/detached; sleep 1000"}, Detached: true})
	if err != nil {
		t.Fatal(err)
	}
	if out, _, _ := w.exec(t, "", sandbox.Cmd{Args: []string{"sh", "-c", "until test -s /tmp/detached; do sleep 0.1; done; cat /tmp/detached"}}); out != "up\n" {
		t.Errorf("a detached one wrote %q", out)
	}
	if err := errors.Join(p.Kill(t.Context(), syscall.SIGKILL), p.Close()); err != nil {
		t.Error(err)
	}
}

func (w *world) testLook(t *testing.T) {
	i, err := w.box.Info(t.Context())
	if err != nil || i.Phase != sandbox.Running || i.Name != "stays" || i.PID == 0 || i.Policy != "baseline" {
		t.Errorf("%+v, %v", i, err)
	}
	s, err := w.box.Stats(t.Context())
	if err != nil || s.Memory == 0 || s.Pids == 0 || s.CPUMicros == 0 || s.Host == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	if list, err := w.host.List(t.Context()); err != nil || len(list) != 1 || list[0].ID != w.box.ID() {
		t.Errorf("%+v, %v", list, err)
	}
	if err := w.box.Remove(t.Context(), false); !errors.Is(err, sandbox.ErrRunning) {
		t.Errorf("one that runs was removed: %v", err)
	}
	if err := w.box.Start(t.Context()); err == nil {
		t.Error("it was started twice")
	}
	if _, err := w.host.Create(t.Context(), sandbox.Options{Name: "stays", Image: w.image}); !errors.Is(err, sandbox.ErrTaken) {
		t.Errorf("a second of the name: %v", err)
	}
	if list, err := w.host.Images(); err != nil || len(list) != 1 {
		t.Errorf("images: %+v, %v", list, err)
	}
}

// testFiles takes files in and out, and sees what runs.
func (w *world) testFiles(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	big := bytes.Repeat([]byte("0123456789abcde\n"), 1<<16)
	if err := w.box.WriteFile(ctx, "/tmp/big", big, 0o640); err != nil {
		t.Fatal(err)
	}
	if got, err := w.box.ReadFile(ctx, "/tmp/big"); err != nil || !bytes.Equal(got, big) {
		t.Errorf("%d bytes of %d came back, %v", len(got), len(big), err)
	}
	if out, _, _ := w.exec(t, "", sandbox.Cmd{Args: []string{"sh", "-c", "ls -l /tmp/big; wc -c /tmp/big"}}); !strings.HasPrefix(out, "-rw-r-----") || !strings.HasSuffix(out, "1048576 /tmp/big\n") {
		t.Errorf("in the sandbox it is %q", out)
	}
	if _, err := w.box.ReadFile(ctx, "/nosuch"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a file that is not there: %v", err)
	}
	if _, err := w.box.ReadFile(ctx, "/tmp"); err == nil {
		t.Error("a directory was read as a file")
	}
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/in/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(dir+"/in/sub/f", []byte("body"), 0o600), os.Symlink("sub/f", dir+"/in/l")); err != nil {
		t.Fatal(err)
	}
	// Under a new name, into what is there, and only what is in it.
	for _, to := range []string{"/tmp/new", "/tmp/new", "/tmp/new/."} {
		from := dir + "/in"
		if strings.HasSuffix(to, "/.") {
			from += "/."
		}
		if err := w.box.Put(ctx, from, to); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.box.Get(ctx, "/tmp/new", dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"new/sub/f", "new/l", "new/in/sub/f"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != "body" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	gone, leave := context.WithCancel(ctx)
	leave()
	if err := w.box.CopyOut(gone, "/", io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("a copy that was given up: %v", err)
	}
	list, err := w.box.Top(ctx)
	if err != nil || len(list) == 0 || list[0].Name != "sh" {
		t.Errorf("%+v, %v", list, err)
	}
}

func (w *world) testPause(t *testing.T) {
	if err := w.box.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if i, err := w.box.Info(t.Context()); err != nil || i.Phase != sandbox.Paused {
		t.Errorf("%+v, %v", i, err)
	}
	if err := w.box.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, _, _ := w.exec(t, "", sandbox.Cmd{Args: []string{"echo", "on"}}); out != "on\n" {
		t.Errorf("afterwards it says %q", out)
	}
}

// testStop ends the sandbox that stayed, which is seen by who waits and by who
// looks.
func (w *world) testStop(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	waited := make(chan sandbox.Exit, 1)
	go func() { e, _ := w.box.Wait(ctx); waited <- e }()
	time.Sleep(50 * time.Millisecond)
	e, err := w.box.Stop(ctx, 500*time.Millisecond) // a shell that is process 1 heeds no SIGTERM
	if err != nil || e.Code != 137 {
		t.Errorf("ended with %+v, %v", e, err)
	}
	if got := <-waited; got.Code != 137 {
		t.Errorf("who waited heard %+v", got)
	}
	i, err := w.box.Info(ctx)
	if err != nil || i.Phase != sandbox.Exited || i.ExitCode == nil || *i.ExitCode != 137 {
		t.Errorf("%+v, %v", i, err)
	}
	if _, err := w.box.Exec(ctx, sandbox.Cmd{Args: []string{"true"}}); !errors.Is(err, sandbox.ErrNotRunning) {
		t.Errorf("exec in what has ended: %v", err)
	}
	var out strings.Builder
	if err := w.box.Logs(ctx, sandbox.LogOptions{Tail: -1, Follow: true}, &out, io.Discard); err != nil || !strings.HasPrefix(out.String(), "up\n") {
		t.Errorf("the log of what has ended: %q, %v", out.String(), err)
	}
	if err := w.box.Remove(ctx, false); err != nil {
		t.Error(err)
	}
}

// testNotRun has one whose program is not there, which is to go at its end: it
// does, with what it was.
func (w *world) testNotRun(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	b, err := w.host.Create(ctx, sandbox.Options{Image: w.image, Args: []string{"nosuch"}, Remove: true})
	if err != nil {
		t.Fatal(err)
	}
	var program *sandbox.ProgramError
	if err := b.Start(ctx); !errors.As(err, &program) || program.Code != 127 {
		t.Errorf("started: %v", err)
	}
	if e, err := b.Wait(ctx); err != nil || e.Code != 127 {
		t.Errorf("ended with %+v, %v", e, err)
	}
	if _, err := b.Info(ctx); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("it is still there: %v", err)
	}
}

// testShimKilled kills what holds a sandbox: it is seen to be lost, its machine
// with it, and can be removed.
func (w *world) testShimKilled(t *testing.T) {
	w.killShim(t, w.start(t, sandbox.Options{Args: []string{"sleep", "1000"}}))
}

func (w *world) killShim(t *testing.T, b *sandbox.Sandbox) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(w.conf.State, "boxes", b.ID(), "bundle", "shim.pid"))
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(raw), &pid); err != nil || pid < 2 {
		t.Fatal(pid, err)
	}
	i, err := b.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	machine := i.PID
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); time.Since(began) < callTime; time.Sleep(10 * time.Millisecond) {
		if i, err = b.Info(t.Context()); err == nil && i.Phase == sandbox.Exited {
			break
		}
	}
	if i.Phase != sandbox.Exited || *i.ExitCode != 137 || i.Reason == "" {
		t.Errorf("%+v, %v", i, err)
	}
	// One that nobody has reaped has no arguments any more.
	if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", machine)); err == nil && bytes.Contains(line, []byte("qemu")) {
		t.Errorf("its machine goes on: process %d, %q", machine, line)
	}
}

// testExample runs the example of the documentation.
func (w *world) testExample(t *testing.T) {
	r, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	config, imageName, output = w.conf, w.image, out
	Example()
	out.Close()
	if said, err := io.ReadAll(r); err != nil || string(said) != "it said \"hello agent\\n\" and ended with 3\n" {
		t.Errorf("printed %q, %v", said, err)
	}
}
