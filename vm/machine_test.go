package vm

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

const sampleRollup = `55d0c0a00000-7ffd8a5f9000 ---p 00000000 00:00 0                          [rollup]
Rss:               64000 kB
Pss:               40000 kB
Pss_Dirty:         30000 kB
Pss_Anon:          20000 kB
Pss_File:           5000 kB
Shared_Clean:       3000 kB
Shared_Dirty:       1000 kB
Private_Clean:       500 kB
Private_Dirty:     20000 kB
Referenced:        64000 kB
`

func TestParseRollup(t *testing.T) {
	got, err := parseRollup([]byte(sampleRollup))
	want := Memory{Private: 20500 << 10, Shared: 4000 << 10, Proportional: 40000 << 10, Resident: 64000 << 10}
	if err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", "Rss: 1 kB\n", strings.Replace(sampleRollup, "64000", "-1", 1), strings.Replace(sampleRollup, "64000", "99999999999999999999", 1)} {
		if _, err := parseRollup([]byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if m, err := readMemory(os.Getpid()); err != nil || m.Private == 0 || m.Resident < m.Private {
		t.Errorf("our own memory is %+v, %v", m, err)
	}
}

func sampleJournal(t testing.TB) Journal {
	j, err := NewJournal("m0", "qemu", "hauberk-m0-mark", 64501)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func TestJournal(t *testing.T) {
	dir := t.TempDir()
	j := sampleJournal(t)
	if err := j.Write(dir); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadJournal(dir); err != nil || !reflect.DeepEqual(got, j) {
		t.Errorf("read back %+v, %v; want %+v", got, err, j)
	}
	if err := CheckAlive(dir, "qemu"); !errors.Is(err, ErrUnfinished) {
		t.Errorf("a starting machine: %v", err)
	}
	if err := j.Ready(dir, os.Getpid()); err != nil {
		t.Fatal(err)
	}
	if err := CheckAlive(dir, "qemu"); err != nil {
		t.Errorf("a live process: %v", err)
	}
	if err := CheckAlive(dir, "firecracker"); err == nil || errors.Is(err, ErrGone) {
		t.Errorf("another driver's machine: %v", err)
	}
	if fi, err := os.Stat(filepath.Join(dir, journalName)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("journal: %v, %v", fi.Mode(), err)
	}
}

func TestJournalRefuses(t *testing.T) {
	good := `{"version":1,"id":"m0","driver":"qemu","state":"ready","mark":"x","uid":5,"pid":7,"start":1,"bootID":"b","created":"2026-11-22T00:00:00Z"}`
	if _, err := parseJournal([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, edit := range [][2]string{
		{`"version":1`, `"version":2`}, {`"id":"m0"`, `"id":"../m0"`}, {`"ready"`, `"done"`}, {`"pid":7`, `"pid":0`},
		{`"pid":7`, `"pid":1`}, {`"pid":7`, `"pid":-7`}, {`"mark":"x"`, `"mark":""`}, {`"uid":5`, `"uid":0`},
		{`"uid":5`, `"uid":5,"more":1`}, {`{`, ``}, {good, strings.Repeat(" ", maxJournal+1)},
	} {
		if j, err := parseJournal([]byte(strings.Replace(good, edit[0], edit[1], 1))); err == nil {
			t.Errorf("%q instead of %q was accepted: %+v", edit[1], edit[0], j)
		}
	}
}

func FuzzJournal(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"m0","driver":"qemu","state":"ready","mark":"x","uid":5,"pid":7,"start":1,"bootID":"b","created":"2026-11-22T00:00:00Z"}`))
	f.Add([]byte(`{"version":1,"id":"m0","state":"starting","mark":"x","uid":5}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		j, err := parseJournal(raw)
		if err == nil && (j.PID < 0 || j.PID == 1 || j.UID == 0 || j.Mark == "" || !idPattern.MatchString(j.ID)) {
			t.Errorf("accepted %+v", j)
		}
	})
}

func FuzzRollup(f *testing.F) {
	f.Add([]byte(sampleRollup))
	f.Fuzz(func(t *testing.T, raw []byte) { parseRollup(raw) })
}

// sleeper starts a process that ends with the test.
func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

func TestHandleHoldsOneProcess(t *testing.T) {
	cmd := sleeper(t)
	start, err := startTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openHandle(cmd.Process.Pid, start+1, nil); !errors.Is(err, ErrGone) {
		t.Errorf("another start time: %v", err)
	}
	h, err := openHandle(cmd.Process.Pid, start, cmd.Process)
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	if err := h.kill(); err != nil {
		t.Fatal(err)
	}
	if how, err := h.wait(); err != nil || how != "signal: killed" {
		t.Errorf("it ended by %q, %v", how, err)
	}
	if err := h.kill(); err != nil {
		t.Errorf("killing what has ended: %v", err)
	}
	if _, err := openHandle(cmd.Process.Pid, start, nil); !errors.Is(err, ErrGone) {
		t.Errorf("a process that has ended: %v", err)
	}
}

func TestHandleCloseEndsWait(t *testing.T) {
	h, err := openHandle(sleeper(t).Process.Pid, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { _, err := h.wait(); ended <- err }()
	time.Sleep(20 * time.Millisecond)
	if err := h.close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a process that runs on was said to have ended")
		}
	case <-time.After(time.Minute):
		t.Fatal("the wait did not end")
	}
}

func TestRunDirWithALongName(t *testing.T) {
	parent := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	if err := os.Mkdir(parent, 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := CreateRunDir(parent, "m0")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := d.Listen(AgentSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := d.Dial(t.Context(), AgentSocket)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if _, err := CreateRunDir(parent, "m0"); !errors.Is(err, os.ErrExist) {
		t.Errorf("the same name again: %v", err)
	}
	if err := errors.Join(d.Remove(), d.Close()); err != nil {
		t.Error(err)
	}
}

// TestConsoleIsBounded prints without end.
func TestConsoleIsBounded(t *testing.T) {
	d, err := CreateRunDir(t.TempDir(), "m0")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	ours, guest := net.Pipe()
	done := make(chan struct{})
	go func() { defer close(done); keepConsole(ours, d) }()
	for range 100 {
		if _, err := guest.Write(bytes.Repeat([]byte("spam"), 1024)); err != nil {
			t.Fatal(err)
		}
	}
	guest.Write([]byte("last words"))
	guest.Close()
	<-done
	var total int64
	names, _ := filepath.Glob(filepath.Join(d.Path(), consoleLog+"*"))
	for _, n := range names {
		fi, err := os.Stat(n)
		if err != nil {
			t.Fatal(err)
		}
		total += fi.Size()
	}
	if total == 0 || total > 2*maxConsole || len(names) != 2 {
		t.Errorf("%d bytes in %q", total, names)
	}
	if got := d.Tail(consoleLog, 100); !strings.HasSuffix(got, `last words"`) {
		t.Errorf("it ends with %s", got)
	}
}

func TestOrphans(t *testing.T) {
	parent := t.TempDir()
	if got, err := Orphans(filepath.Join(parent, "none")); err != nil || got != nil {
		t.Errorf("no directory: %v, %v", got, err)
	}
	for _, dir := range []string{"empty", "broken", "dead", "Not-ours"} {
		if err := os.Mkdir(filepath.Join(parent, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(parent, "broken", journalName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	// A number that another process has by now: it must not be touched.
	other := sleeper(t)
	j := sampleJournal(t)
	j.ID, j.State, j.PID, j.Start = "dead", StateReady, other.Process.Pid, 1
	if err := j.Write(filepath.Join(parent, "dead")); err != nil {
		t.Fatal(err)
	}
	all, err := Orphans(parent)
	if err != nil || len(all) != 3 {
		t.Fatalf("found %+v, %v; want 3", all, err)
	}
	for _, o := range all {
		if o.Alive || (o.Err == nil) != (o.ID == "dead") {
			t.Errorf("%s: alive %v, %v", o.ID, o.Alive, o.Err)
		}
		if err := o.End(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if _, err := startTime(other.Process.Pid); err != nil {
		t.Errorf("another process was ended: %v", err)
	}
	left, _ := os.ReadDir(parent)
	if len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

func TestTemplateUseAndClose(t *testing.T) {
	open := func() *os.File {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	tpl := NewTemplate("k", "", open(), open())
	closed := make(chan error, 1)
	err := tpl.Use(func(memory, _ *os.File) error {
		go func() { closed <- tpl.Close() }()
		select {
		case <-closed:
			t.Error("the template was closed under its user")
		case <-time.After(50 * time.Millisecond):
		}
		_, err := memory.Stat()
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if err := tpl.Use(func(_, _ *os.File) error { return context.Canceled }); !errors.Is(err, ErrTemplateClosed) {
		t.Errorf("a closed template: %v", err)
	}
	if err := tpl.Close(); err != nil {
		t.Error(err)
	}
}

func TestSeedsDiffer(t *testing.T) {
	a, b := NewSeed("web-1"), NewSeed("web-1")
	if a.Entropy == b.Entropy || a.MachineID == b.MachineID || a.BootID == b.BootID {
		t.Errorf("seeds %+v and %+v", a, b)
	}
	if len(a.MachineID) != 32 || len(a.BootID) != 36 || a.BootID[14] != '4' || a.Hostname != "web-1" || a.UnixNanos == 0 {
		t.Errorf("seed %+v", a)
	}
}

// TestFindsWhatIsStarting looks for a monitor that is started again and again: at
// many moments it has no arguments, as one that was started just now.
func TestFindsWhatIsStarting(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("a monitor has a user of its own")
	}
	const user, mark = 65417, "hauberk-test-mark"
	again := `exec sh -c "$0" "$0" ` + mark
	cmd := exec.Command("sh", "-c", again, again, mark)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	j, err := NewJournal("m", "test", mark, user)
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		if pid, _, err := j.find(); pid != cmd.Process.Pid || err != nil {
			t.Fatalf("found %d, %v, want %d", pid, err, cmd.Process.Pid)
		}
	}
}

// TestMonitorLogIsBounded: who appends to a log that was emptied goes on at its
// beginning.
func TestMonitorLogIsBounded(t *testing.T) {
	dir, err := CreateRunDir(t.TempDir(), "m")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	f, err := dir.Create(MonitorLog)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := func() int64 {
		fi, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		return fi.Size()
	}
	for _, step := range []struct {
		write int
		want  int64
	}{{maxMonitorLog, maxMonitorLog}, {1, 0}, {5, 5}} {
		if _, err := f.Write(make([]byte, step.write)); err != nil {
			t.Fatal(err)
		}
		if err := dir.trim(MonitorLog, maxMonitorLog); err != nil || size() != step.want {
			t.Errorf("after %d bytes: %d, %v, want %d", step.write, size(), err, step.want)
		}
	}
}
