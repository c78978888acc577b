package shim

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// many is a process with several threads, which does nothing but say that it is
// there.
func many(t *testing.T) int {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HAUBERK_TEST_MANY=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "here\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return cmd.Process.Pid
}

// beThere is the process of many.
func beThere() {
	fmt.Println("here")
	_, _ = os.Stdin.Read(make([]byte, 1))
	os.Exit(0)
}

// onCPUs are the processors that each thread of a process may run on.
func onCPUs(t *testing.T, pid int) (threads int, all []string) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			continue // it ended
		}
		_, rest, _ := strings.Cut(string(raw), "\nCpus_allowed_list:\t")
		list, _, _ := strings.Cut(rest, "\n")
		threads++
		if !slices.Contains(all, list) {
			all = append(all, list)
		}
	}
	return threads, all
}

// TestPins: a machine runs where its containers want it to, all together, and
// anywhere while one of them does not care.
func TestPins(t *testing.T) {
	var whole unix.CPUSet
	if err := unix.SchedGetaffinity(0, &whole); err != nil {
		t.Fatal(err)
	}
	var have []int
	for n := 0; len(have) < 2 && n < 1024; n++ {
		if whole.IsSet(n) {
			have = append(have, n)
		}
	}
	if len(have) < 2 {
		t.Skip("it keeps a process to one of two processors, and this machine gives one")
	}
	pid := many(t)
	_, before := onCPUs(t, pid)
	one, two := fmt.Sprint(have[0]), fmt.Sprint(have[1])
	both := one + "," + two
	if have[1] == have[0]+1 {
		both = one + "-" + two
	}
	var p pins
	for i, step := range []struct {
		do   func() error
		want string
	}{
		{func() error { return p.set("a", nil, pid) }, before[0]},
		{func() error { return p.set("b", have[:1], pid) }, before[0]},
		{func() error { return p.drop("a", pid) }, one},
		{func() error { return p.set("c", have[1:], pid) }, both},
		{func() error { return p.drop("b", pid) }, two},
		{func() error { return p.set("c", have[:1], pid) }, one},
		{func() error { return p.set("d", nil, pid) }, before[0]},
		{func() error { return p.drop("d", pid) }, one},
		{func() error { return p.drop("d", pid) }, one},
	} {
		if err := step.do(); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if n, got := onCPUs(t, pid); n < 2 || !slices.Equal(got, []string{step.want}) {
			t.Errorf("step %d: %d threads run on %q, want %q", i, n, got, step.want)
		}
	}
	if err := p.set("c", []int{8000}, pid); err == nil || !strings.Contains(err.Error(), "8000") {
		t.Errorf("a processor that is not there: %v", err)
	}
	if _, got := onCPUs(t, pid); !slices.Equal(got, []string{one}) || len(p.wants["c"]) != 1 {
		t.Errorf("after that: %q, %v", got, p.wants)
	}
}
