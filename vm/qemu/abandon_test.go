package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/vm"
)

// abandon is the program of a process that starts two machines and dies
// without a word, as a node does that is killed. What it boots comes as JSON
// in the environment.
func abandon(run string) int {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var spec vm.TemplateSpec
	if err := json.Unmarshal([]byte(os.Getenv("HAUBERK_TEST_SPEC")), &spec); err != nil {
		fmt.Println(err)
		return 1
	}
	d, err := Open(ctx, Config{Run: run, UID: templateUID, GID: templateUID, Ready: answers})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	t, err := d.Template(ctx, spec, nil)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	for i := range 2 {
		m, err := d.Clone(ctx, t, machine(i, spec))
		if err != nil {
			fmt.Println(err)
			return 1
		}
		if err := answers(ctx, m); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	unix.Kill(os.Getpid(), unix.SIGKILL)
	return 1
}

func TestMachinesOutliveTheirNode(t *testing.T) {
	spec := needMachine(t)
	run, ctx := filepath.Join(t.TempDir(), "run"), deadline(t)
	t.Cleanup(func() { endAll(t, run) })
	raw, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	node := exec.CommandContext(ctx, os.Args[0])
	node.Env = append(os.Environ(), "HAUBERK_TEST_ABANDON="+run, "HAUBERK_TEST_SPEC="+string(raw))
	if out, err := node.CombinedOutput(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("the first node: %v: %s", err, out)
	}
	d := driver(t, run)
	left, err := vm.Orphans(run)
	if err != nil || len(left) != 2 {
		t.Fatalf("%d machines left, %v; want 2", len(left), err)
	}
	if !left[0].Adoptable() || !left[1].Adoptable() {
		t.Errorf("a live machine cannot be adopted: %+v", left)
	}
	refusesScratch(t, ctx, d, left[0])
	adopted, err := d.Adopt(ctx, left[0].Dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := say(t, converse(t, ctx, adopted), "ping"); got != "pong" {
		t.Errorf("the adopted machine says %q", got)
	}
	if _, err := adopted.Memory(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(adopted.Pause(ctx), adopted.Resume(ctx), adopted.Kill(ctx)); err != nil {
		t.Error(err)
	}
	gone(t, adopted.PID(), left[0].Dir)
	endUnfinished(t, ctx, d, left[1])
	if left, err := vm.Orphans(run); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// refusesScratch shows that a guest on its way to a template is nobody's.
func refusesScratch(t *testing.T, ctx context.Context, d *Driver, o vm.Orphan) {
	t.Helper()
	j := o.Journal
	j.Scratch = true
	if err := j.Write(o.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Adopt(ctx, o.Dir); !errors.Is(err, vm.ErrUnfinished) {
		t.Errorf("adopting a template's guest: %v", err)
	}
	if err := o.Journal.Write(o.Dir); err != nil {
		t.Fatal(err)
	}
}

// endUnfinished makes a machine look as if its node had died while it was
// starting, before anyone wrote down its process.
func endUnfinished(t *testing.T, ctx context.Context, d *Driver, o vm.Orphan) {
	t.Helper()
	pid := o.Journal.PID
	j := o.Journal
	j.State, j.PID, j.Start = vm.StateStarting, 0, 0
	if err := j.Write(o.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Adopt(ctx, o.Dir); !errors.Is(err, vm.ErrUnfinished) {
		t.Errorf("adopting an unfinished machine: %v", err)
	}
	all, err := vm.Orphans(filepath.Dir(o.Dir))
	if err != nil || len(all) != 1 || !all[0].Alive {
		t.Fatalf("the unfinished machine's process is not found: %+v, %v", all, err)
	}
	if err := all[0].End(ctx); err != nil {
		t.Error(err)
	}
	gone(t, pid, o.Dir)
}

func TestAdoptRefuses(t *testing.T) {
	spec := needMachine(t)
	run, ctx := filepath.Join(t.TempDir(), "run"), deadline(t)
	d := driver(t, run)
	if _, err := d.Adopt(ctx, filepath.Join(run, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	m, err := d.Boot(ctx, machine(0, spec))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Release(); err != nil {
		t.Fatal(err)
	}
	j, err := vm.ReadJournal(m.Dir())
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*vm.Journal){
		"another process of the number": func(j *vm.Journal) { j.Start++ },
		"another boot":                  func(j *vm.Journal) { j.BootID = "00000000-0000-0000-0000-000000000000" },
		"our own process":               func(j *vm.Journal) { j.PID = os.Getpid() },
	} {
		other := j
		edit(&other)
		if err := other.Write(m.Dir()); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Adopt(ctx, m.Dir()); !errors.Is(err, vm.ErrGone) {
			t.Errorf("%s: %v, want %v", name, err, vm.ErrGone)
		}
	}
	if err := j.Write(m.Dir()); err != nil {
		t.Fatal(err)
	}
	again, err := d.Adopt(ctx, m.Dir())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Kill(ctx); err != nil {
		t.Error(err)
	}
}

// gone checks that nothing is left of a machine. A zombie is nothing.
func gone(t testing.TB, pid int, dir string) {
	t.Helper()
	until := time.Now().Add(5 * time.Second)
	for {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(raw), ") Z ") {
			break
		}
		if time.Now().After(until) {
			t.Errorf("process %d still runs: %s", pid, raw)
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", dir, err)
	}
}
