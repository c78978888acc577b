package cgroup

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const version1 = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 /outer /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
41 31 0:38 / /nowhere/unified rw,relatime - cgroup2 cgroup2 rw
`

func TestFindFirst(t *testing.T) {
	got, err := find(strings.NewReader(version1), "8:pids:/outer/inner\n4:cpu,memory:/a/b\n0::/\n")
	want := []string{"/sys/fs/cgroup/memory/a/b", "/sys/fs/cgroup/pids/inner"}
	if err != nil || got.second || !slices.Equal(got.parents, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if p := got.Paths("x")[0]; p != "/sys/fs/cgroup/memory/a/b/hauberk/x" {
		t.Errorf("path %s", p)
	}
	if _, err := find(strings.NewReader("41 31 0:38 / /nowhere rw - cgroup2 cgroup2 rw\n"), "0::/\n"); !errors.Is(err, ErrNone) {
		t.Errorf("without a controller: %v", err)
	}
}

func TestFindSecond(t *testing.T) {
	dir := t.TempDir()
	own := filepath.Join(dir, "system.slice/node.service")
	if err := os.MkdirAll(own, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(own, "cgroup.controllers"), []byte("cpu memory pids\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := find(strings.NewReader("41 31 0:38 / "+dir+" rw - cgroup2 cgroup2 rw\n"), "0::/system.slice/node.service\n")
	if err != nil || !got.second || !slices.Equal(got.parents, []string{filepath.Join(dir, "system.slice")}) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRemoveIsCareful(t *testing.T) {
	dir := t.TempDir()
	if err := Remove([]string{dir}); err == nil {
		t.Error("a directory that is no group of ours was removed")
	}
	if err := Remove([]string{filepath.Join(dir, room, "gone")}); err != nil {
		t.Error(err)
	}
}

// TestGroup puts a process that takes more than it may into a real group.
func TestGroup(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("making cgroups needs root")
	}
	tree, err := Find()
	if errors.Is(err, ErrNone) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	paths := tree.Paths("test-" + filepath.Base(t.TempDir()))
	g, err := tree.Make(paths, Limits{Memory: 32 << 20, Processes: 16})
	if err != nil {
		t.Fatal(err)
	}
	greedy := exec.Command("sh", "-c", "read go; exec dd if=/dev/zero of=/dev/null bs=100M count=1")
	in, err := greedy.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := greedy.Start(); err != nil {
		t.Fatal(err)
	}
	if err := g.Add(greedy.Process.Pid); err != nil {
		t.Error(err)
	}
	if err := Remove(paths); err == nil {
		t.Error("a group with a process in it was removed")
	}
	in.Write([]byte("go\n"))
	if err := greedy.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("a process that takes more than its group may: %v", err)
	}
	for range 2 {
		if err := Remove(paths); err != nil {
			t.Error(err)
		}
	}
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			t.Errorf("%s is left", p)
		}
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add(version1, "0::/\n")
	f.Fuzz(func(t *testing.T, mounts, own string) {
		_, _ = parseMounts(strings.NewReader(mounts))
		path(own, "memory")
	})
}
