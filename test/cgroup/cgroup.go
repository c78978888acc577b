// Package cgroup gives a test cgroups of its own, of version 2, and starts the test's
// program in them.
//
// It sets no limit and moves nobody. What is put into a cgroup has to end with the
// test.
package cgroup

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// New makes a cgroup that goes when the test ends, and gives its directory. The test
// is skipped where cgroups of version 2 cannot be made.
func New(t testing.TB, name string) (dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making a cgroup needs root")
	}
	dir = filepath.Join(mounted(t), fmt.Sprintf("hauberk-test-%d-%s", os.Getpid(), name))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := os.Remove(dir)
		for end := time.Now().Add(time.Minute); err != nil && time.Now().Before(end); err = os.Remove(dir) {
			time.Sleep(10 * time.Millisecond) // what ended in it is on its way
		}
		if err != nil {
			t.Error(err)
		}
	})
	return dir
}

// mounted is where the hierarchy of version 2 is.
func mounted(t testing.TB) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	t.Skip("no cgroup v2 is mounted")
	return ""
}

// Command is this program, to be started in a cgroup with one variable more in its
// environment: "NAME=value". It is killed when the test ends.
func Command(t testing.TB, dir, variable string, args ...string) *exec.Cmd {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), variable)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.Fd())}
	cmd.Stderr = os.Stderr
	return cmd
}
