package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// kinds of things that could be left, in the order of the table.
var kinds = []string{"process", "mount", "namespace", "link", "address", "filter rule", "cgroup", "socket", "file", ofContainerd, "pod", "container", "task", "snapshot"}

// ofContainerd is what containerd and its client leave when containerd is killed:
// a bundle renamed for removal, the pipes of a ctr that lost it, and its lease,
// which ends after a day.
// They are shown, and no runtime can be blamed for them.
const ofContainerd = "containerd's"

// inventory names what there is, by kind.
type inventory map[string][]string

// settle waits until nothing is there but what is known, or for so long that
// it will not go, and returns what there is.
func (s *soak) settle(ctx context.Context, known inventory) (inventory, error) {
	patience := time.Now().Add(90 * time.Second)
	for {
		now, err := s.count(ctx)
		if err != nil {
			return nil, err
		}
		if known == nil && len(now["task"]) == 0 || known != nil && len(now.beyond(known)) == len(now[ofContainerd])-len(known[ofContainerd]) || time.Now().After(patience) {
			return now, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// beyond lists what is not in another inventory.
func (n inventory) beyond(known inventory) (left []string) {
	for _, kind := range kinds {
		for _, what := range n[kind] {
			if !slices.Contains(known[kind], what) {
				left = append(left, kind+" "+what)
			}
		}
	}
	return left
}

func (s *soak) count(ctx context.Context) (inventory, error) {
	n := inventory{}
	for pid, command := range processes() {
		if pid != 1 && pid != os.Getpid() && pid != s.server.Pid() {
			n["process"] = append(n["process"], fmt.Sprintf("%d %.200s", pid, strings.Join(command, " ")))
		}
	}
	for line := range lines("/proc/self/mountinfo") {
		f := strings.Fields(line)
		if strings.Contains(line, " - nsfs ") {
			n["namespace"] = append(n["namespace"], f[3])
		}
		n["mount"] = append(n["mount"], f[4]+" "+f[3])
	}
	for line := range lines("/proc/net/unix") {
		if f := strings.Fields(line); len(f) == 8 && f[3] == "00010000" {
			n["socket"] = append(n["socket"], f[7])
		}
	}
	s.files(n)
	var faults []error
	command := func(kind string, field int, call func(context.Context, ...string) (string, error), args ...string) {
		out, err := call(ctx, args...)
		if err != nil {
			faults = append(faults, err)
		}
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) > field && f[field] != "KEY" && f[field] != "ID" && f[field] != "TASK" {
				n[kind] = append(n[kind], f[field])
			}
		}
	}
	program := func(name string) func(context.Context, ...string) (string, error) {
		return func(ctx context.Context, args ...string) (string, error) {
			out, err := exec.CommandContext(ctx, name, args...).Output()
			return string(out), err
		}
	}
	command("link", 1, program("ip"), "-o", "link")
	command("pod", 0, s.crictl, "pods", "-q")
	command("container", 0, s.ctr, "containers", "ls", "-q")
	command("task", 0, s.ctr, "tasks", "ls", "-q")
	command("snapshot", 0, s.ctr, "snapshots", "ls")
	command(ofContainerd, 0, s.ctr, "leases", "ls", "-q")
	rules, err := program("iptables-save")(ctx)
	for line := range strings.Lines(rules) {
		if strings.HasPrefix(line, "-A ") {
			n["filter rule"] = append(n["filter rule"], strings.TrimSpace(line))
		}
	}
	return n, errors.Join(append(faults, err)...)
}

func lines(name string) func(func(string) bool) {
	raw, _ := os.ReadFile(name)
	return strings.Lines(string(raw))
}

// files lists what is written while containers run. Images and what is made of
// them stay, as do the files of containerd's own plugins.
func (s *soak) files(n inventory) {
	walk := func(kind, root string, want func(path string, d fs.DirEntry) bool) {
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && path != root && want(path, d) {
				n[kind] = append(n[kind], path)
			}
			return nil // what goes away while being listed is not left
		})
	}
	work := s.tools.Work
	bundles := filepath.Join(work, "state", "io.containerd.runtime.v2.task", space)
	all := func(path string, _ fs.DirEntry) bool { return !foreign(bundles, path) }
	walk(ofContainerd, bundles, func(path string, _ fs.DirEntry) bool { return foreign(bundles, path) })
	walk(ofContainerd, pipes, func(string, fs.DirEntry) bool { return true })
	for _, dir := range []string{filepath.Join(work, "state"), filepath.Join(work, "run"), filepath.Join(work, "tmp"), "/run/containerd", "/run/netns", "/dev/shm", "/var/lib/cni"} {
		walk("file", dir, all)
	}
	walk("file", filepath.Join(work, "root"), func(path string, _ fs.DirEntry) bool {
		rel, _ := filepath.Rel(filepath.Join(work, "root"), path)
		return strings.HasPrefix(rel, "io.containerd.runtime.v2.task/") || strings.HasPrefix(rel, "io.containerd.grpc.v1.cri") || strings.HasPrefix(rel, "io.containerd.sandbox")
	})
	// Of the state that is kept, only what is half made.
	walk("file", filepath.Join(work, "shim"), func(_ string, d fs.DirEntry) bool { return strings.HasPrefix(d.Name(), ".") })
	walk("address", filepath.Join(work, "ipam"), func(_ string, d fs.DirEntry) bool {
		return !d.IsDir() && d.Name() != "lock" && !strings.HasPrefix(d.Name(), "last_reserved")
	})
	walk("cgroup", "/sys/fs/cgroup", func(_ string, d fs.DirEntry) bool { return d.IsDir() })
}

// pipes is where ctr and the CRI make theirs.
const pipes = "/run/containerd/fifo"

func foreign(bundles, path string) bool {
	return strings.HasPrefix(path, bundles+"/.") || strings.HasPrefix(path, pipes+"/")
}

// report prints the table, and is an error unless nothing is left and nothing
// failed by itself.
func (s *soak) report(before, after inventory) error {
	total := 0
	for _, v := range victims {
		fmt.Printf("killed  %-12s %4d\n", v.name, s.killed[v.name])
		total += s.killed[v.name]
	}
	fmt.Printf("killed  %-12s %4d, and %d times there was none\n\n", "in all", total, s.missed)
	left := after.beyond(before)
	if s.killed["containerd"] > 0 {
		left = slices.DeleteFunc(left, func(what string) bool { return strings.HasPrefix(what, ofContainerd) })
	}
	fmt.Printf("%-12s %7s %7s %7s\n", "kind", "before", "after", "leaked")
	for _, kind := range kinds {
		leaked := 0
		if kind == ofContainerd {
			leaked = max(0, len(after[kind])-len(before[kind]))
		}
		for _, what := range left {
			if strings.HasPrefix(what, kind+" ") {
				leaked++
			}
		}
		fmt.Printf("%-12s %7d %7d %7d\n", kind, len(before[kind]), len(after[kind]), leaked)
	}
	for _, what := range left {
		fmt.Println("LEAKED:", what)
	}
	for _, what := range s.broken {
		fmt.Println("FAILED:", what)
	}
	if len(left)+len(s.broken) > 0 {
		return fmt.Errorf("%d things leaked, %d cycles failed though nothing was killed", len(left), len(s.broken))
	}
	say("%d cycles, %d kills, nothing leaked", s.cycles, total)
	return nil
}
