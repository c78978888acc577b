package supervise

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// asSupervisor makes this test binary a supervisor, to be killed.
const asSupervisor = "HAUBERK_TEST_SUPERVISE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(asSupervisor); dir != "" {
		s := house(dir, io.Discard, program(dir, "asked", 0), program(dir, "left", syscall.SIGKILL))
		fmt.Println(s.Run(context.Background()))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// program writes its name to a file when it is asked to stop.
func program(dir, name string, leave syscall.Signal) Program {
	return Program{Name: name, Path: "/bin/sh", Leave: leave, Args: []string{"-c",
		`trap 'echo ` + name + ` >> ` + dir + `/stopped; exit 0' TERM; echo ` + name + ` up; touch ` + dir + `/` + name + `.up; while :; do sleep 0.02; done`}}
}

func house(dir string, out io.Writer, programs ...Program) *Supervisor {
	return &Supervisor{Programs: programs, RunDir: dir, LogDir: dir, Out: out, Grace: 5 * time.Second}
}

// start runs a supervisor and returns what ends it.
func start(t *testing.T, s *Supervisor) (end func(cause error)) {
	t.Helper()
	ctx, cancel := context.WithCancelCause(context.Background())
	over := make(chan error, 1)
	go func() { over <- s.Run(ctx) }()
	ended := sync.OnceFunc(func() {
		if err := <-over; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(nil); ended() })
	return func(cause error) { cancel(cause); ended() }
}

func TestStopsInReverseOrder(t *testing.T) {
	dir := t.TempDir()
	end := start(t, house(dir, nil, program(dir, "first", 0), program(dir, "second", 0), program(dir, "third", 0)))
	await(t, func() bool {
		return exists(dir, "first.up") && exists(dir, "second.up") && exists(dir, "third.up") && exists(dir, "second.pid")
	})
	p, err := Find(dir, "second")
	if err != nil || p == nil {
		t.Fatalf("find second: %v, %v", p, err)
	}
	end(nil)
	if got := read(t, dir, "stopped"); got != "third\nsecond\nfirst\n" {
		t.Errorf("stopped in the order %q", got)
	}
	if err := p.Signal(syscall.Signal(0)); err == nil {
		t.Error("second still runs")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.pid")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestLeave(t *testing.T) {
	dir := t.TempDir()
	end := start(t, house(dir, nil, program(dir, "asked", 0), program(dir, "left", syscall.SIGKILL)))
	await(t, func() bool { return exists(dir, "asked.up") && exists(dir, "left.up") })
	end(ErrLeave)
	if got := read(t, dir, "stopped"); got != "asked\n" {
		t.Errorf("asked to stop: %q", got)
	}
}

func TestStartsAgain(t *testing.T) {
	dir := t.TempDir()
	var out buffer
	start(t, house(dir, &out, Program{Name: "dies", Path: "/bin/sh", Args: []string{"-c", "echo one >> " + dir + "/count; exit 3"}}))
	began := time.Now()
	await(t, func() bool { return strings.Count(maybe(dir, "count"), "one") >= 3 })
	if took := time.Since(began); took < backoffFirst+2*backoffFirst {
		t.Errorf("three starts took %v: there was no backoff", took)
	}
	if got := out.String(); !strings.Contains(got, "dies: ended: exit status 3; starting it again in 400ms") {
		t.Errorf("log is %q", got)
	}
}

func TestProgramThatIsNotThere(t *testing.T) {
	dir := t.TempDir()
	var out buffer
	start(t, house(dir, &out, Program{Name: "absent", Path: filepath.Join(dir, "absent")}))
	await(t, func() bool { return strings.Contains(out.String(), "no such file") })
}

func TestKillsWhatDoesNotStop(t *testing.T) {
	dir := t.TempDir()
	deaf := Program{Name: "deaf", Path: "/bin/sh", Args: []string{"-c", "trap '' TERM; touch " + dir + "/deaf.up; while :; do sleep 0.02; done"}}
	var out buffer
	s := house(dir, &out, deaf)
	s.Grace = 100 * time.Millisecond
	end := start(t, s)
	await(t, func() bool { return exists(dir, "deaf.up") })
	end(nil)
	if got := out.String(); !strings.Contains(got, "deaf: stopped: killed: did not stop within 100ms") {
		t.Errorf("log is %q", got)
	}
}

func TestRunsAsItsUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may start programs as another user")
	}
	dir := t.TempDir()
	p := Program{Name: "who", Path: "/bin/sh", Args: []string{"-c", "id -u; id -g; id -G; env; sleep 60"}, User: &User{65534, 65533}}
	t.Setenv("SECRET_OF_THE_SHELL", "yes")
	start(t, house(dir, nil, p))
	await(t, func() bool { return strings.Contains(maybe(dir, "who.log"), "PATH=") })
	got := maybe(dir, "who.log")
	if !strings.HasPrefix(got, "65534\n65533\n65533\n") || strings.Contains(got, "SECRET") {
		t.Errorf("the program saw %q", got)
	}
}

func TestOneSupervisor(t *testing.T) {
	dir := t.TempDir()
	start(t, house(dir, nil))
	await(t, func() bool { return exists(dir, "supervisor.pid") })
	if err := house(dir, nil).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another supervisor") {
		t.Errorf("a second supervisor: %v", err)
	}
}

// TestKilledSupervisor kills a supervisor where it stands: what it started
// must end, each by its own signal.
func TestKilledSupervisor(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), asSupervisor+"="+dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	await(t, func() bool {
		return exists(dir, "asked.up") && exists(dir, "left.up") && exists(dir, "asked.pid") && exists(dir, "left.pid")
	})
	asked, err := Find(dir, "asked")
	if err != nil || asked == nil {
		t.Fatal(asked, err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	for _, name := range []string{"asked", "left"} {
		if err := gone(t.Context(), dir, name, 5*time.Second); err != nil {
			t.Error(err)
		}
	}
	await(t, func() bool { return exists(dir, "stopped") })
	if got := read(t, dir, "stopped"); got != "asked\n" {
		t.Errorf("asked to stop: %q", got)
	}
	if p, err := Find(dir, "supervisor"); p != nil || err != nil {
		t.Errorf("a dead supervisor was found: %v %v", p, err)
	}
}

func TestStop(t *testing.T) {
	dir := t.TempDir()
	deaf := exec.Command("/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.02; done")
	if err := deaf.Start(); err != nil {
		t.Fatal(err)
	}
	go deaf.Wait()
	time.Sleep(50 * time.Millisecond)
	if err := writeIdentity(filepath.Join(dir, "deaf.pid"), deaf.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if found, err := Stop(t.Context(), dir, "deaf", syscall.SIGTERM, 100*time.Millisecond); !found || err != nil {
		t.Errorf("stop: %v, %v", found, err)
	}
	if found, err := Stop(t.Context(), dir, "deaf", syscall.SIGTERM, time.Second); found || err != nil {
		t.Errorf("stop again: %v, %v", found, err)
	}
}

// TestForeignProcess proves that a pid that was given again is not touched.
func TestForeignProcess(t *testing.T) {
	dir := t.TempDir()
	start, err := startTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"older": fmt.Sprintf(`{"pid":%d,"start":%d}`, os.Getpid(), start-1),
		"gone":  `{"pid":4194304,"start":1}`,
	} {
		os.WriteFile(filepath.Join(dir, name+".pid"), []byte(content), 0o600)
		if p, err := Find(dir, name); p != nil || err != nil {
			t.Errorf("%s: found %v, %v", name, p, err)
		}
	}
	for name, content := range map[string]string{"empty": "", "init": `{"pid":1,"start":0}`, "group": `{"pid":-5,"start":0}`} {
		os.WriteFile(filepath.Join(dir, name+".pid"), []byte(content), 0o600)
		if _, err := Find(dir, name); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestBound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for i := range 30 {
		fmt.Fprintf(w, "line %02d\n", i)
		if err := bound(path, 100); err != nil {
			t.Fatal(err)
		}
	}
	now, _ := os.ReadFile(path)
	old, err := os.ReadFile(path + ".1")
	if err != nil || len(now) > 100 || len(old) > 100 {
		t.Fatalf("%d and %d bytes, %v", len(now), len(old), err)
	}
	if got := string(old) + string(now); !strings.HasSuffix(got, "line 28\nline 29\n") || bytes.Contains([]byte(got), []byte{0}) {
		t.Errorf("what is left is %q", got)
	}
}

func TestTail(t *testing.T) {
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "x.log"), []byte("one\ntwo\nthree\n"), 0o600)
	os.WriteFile(filepath.Join(dir, "long.log"), bytes.Repeat([]byte("0123456789abcde\n"), 1<<14), 0o600)
	for _, c := range []struct {
		name  string
		lines int
		want  string
	}{{"x", 2, "two\nthree"}, {"x", 9, "one\ntwo\nthree"}, {"absent", 3, ""}, {"long", 2, "0123456789abcde\n0123456789abcde"}} {
		if got := Tail(dir, c.name, c.lines); got != c.want {
			t.Errorf("tail of %s: %q", c.name, got)
		}
	}
}

func TestParseUser(t *testing.T) {
	if u, err := ParseUser("12:34"); err != nil || u != (User{12, 34}) {
		t.Errorf("%v, %v", u, err)
	}
	for _, s := range []string{"", "12", "0:5", "5:0", "a:b", "1:2:3", "-1:1", "4294967296:1"} {
		if u, err := ParseUser(s); err == nil {
			t.Errorf("%q is %v", s, u)
		}
	}
}

// buffer is a log that can be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) { b.mu.Lock(); defer b.mu.Unlock(); return b.b.Write(p) }
func (b *buffer) String() string              { b.mu.Lock(); defer b.mu.Unlock(); return b.b.String() }

func await(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited 20s in vain")
		}
	}
}

func exists(dir, name string) bool { _, err := os.Stat(filepath.Join(dir, name)); return err == nil }

func maybe(dir, name string) string { b, _ := os.ReadFile(filepath.Join(dir, name)); return string(b) }

func read(t *testing.T, dir, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// A program is replaced by one that makes it end, and goes on as it was if that
// one fails.
func TestReplace(t *testing.T) {
	dir := t.TempDir()
	serve := `echo $$ >> ` + dir + `/served; while [ ! -e ` + dir + `/end.$$ ]; do sleep 0.02; done`
	p := Program{Name: "mesh", Path: "/bin/sh", Args: []string{"-c", serve},
		TakeOver: []string{"-c", `[ -e ` + dir + `/fails ] && exit 3; touch ` + dir + `/end.$(tail -n 1 ` + dir + `/served); ` + serve}}
	var out bytes.Buffer
	s := house(dir, &locked{w: &out}, p)
	replace := make(chan os.Signal, 1)
	s.Replace = replace
	end := start(t, s)
	served := func() []string { b, _ := os.ReadFile(filepath.Join(dir, "served")); return strings.Fields(string(b)) }
	pid := func() string {
		if p, err := Find(dir, "mesh"); p != nil && err == nil {
			return fmt.Sprint(p.Pid)
		}
		return ""
	}
	await(t, func() bool { return len(served()) == 1 && pid() == served()[0] })
	first := pid()
	if err := os.WriteFile(filepath.Join(dir, "fails"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	replace <- syscall.SIGHUP
	await(t, func() bool { return strings.Contains(s.Out.(*locked).String(), "going on as it was") })
	if pid() != first {
		t.Errorf("process %s after a failure, want %s", pid(), first)
	}
	os.Remove(filepath.Join(dir, "fails"))
	replace <- syscall.SIGHUP
	await(t, func() bool { return len(served()) == 2 && pid() == served()[1] })
	end(nil)
	if left, _ := filepath.Glob(filepath.Join(dir, "*.pid")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// locked is a writer for many.
type locked struct {
	mu sync.Mutex
	w  *bytes.Buffer
}

func (l *locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.String()
}
