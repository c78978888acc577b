// Package cgroup bounds what a machine's monitor takes of the host's memory and
// processes: the guest's memory and no more than its own beside it.
//
// It uses version 2 where that has the memory controller, else the memory and
// pids hierarchies of version 1. Groups are made below those of this process, so
// that a bound on it holds for its machines too. A group is named before it is
// made, and whoever knows its paths can remove it.
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ErrNone says that this host has no cgroups to bound memory with.
var ErrNone = errors.New("no cgroup hierarchy with a memory controller can be written to")

// room holds the groups of all machines, below this process' own or beside it.
const room = "hauberk"

// Limits of a group. Zero is none.
type Limits struct {
	Memory    int64 // bytes, page cache and swap included
	Processes int64 // threads included
}

// Tree is where groups are made.
type Tree struct {
	second  bool     // version 2
	parents []string // one in version 2; in version 1 the memory's, the pids'
}

// Find finds out what this host has.
func Find() (Tree, error) {
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return Tree{}, fmt.Errorf("find cgroups: %w", err)
	}
	defer mounts.Close()
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return Tree{}, fmt.Errorf("find cgroups: %w", err)
	}
	t, err := find(mounts, string(own))
	if err == nil {
		err = t.prepare()
	}
	if err != nil {
		return Tree{}, fmt.Errorf("find cgroups: %w", err)
	}
	return t, nil
}

// hierarchy is a mounted one.
type hierarchy struct{ root, point, kind, options string }

func find(mounts io.Reader, own string) (Tree, error) {
	all, err := parseMounts(mounts)
	if err != nil {
		return Tree{}, err
	}
	if i := slices.IndexFunc(all, func(h hierarchy) bool { return h.kind == "cgroup2" }); i >= 0 {
		dir := all[i].below(path(own, ""))
		has, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err == nil && slices.Contains(strings.Fields(string(has)), "memory") {
			// A group with processes has no groups with limits below it, so ours
			// are beside this process' own.
			if dir != all[i].point {
				dir = filepath.Dir(dir)
			}
			return Tree{second: true, parents: []string{dir}}, nil
		}
	}
	var t Tree
	for _, controller := range []string{"memory", "pids"} {
		i := slices.IndexFunc(all, func(h hierarchy) bool {
			return h.kind == "cgroup" && slices.Contains(strings.Split(h.options, ","), controller)
		})
		if i < 0 {
			return Tree{}, ErrNone
		}
		t.parents = append(t.parents, all[i].below(path(own, controller)))
	}
	return t, nil
}

// below is where a group of the hierarchy lies.
func (h hierarchy) below(group string) string {
	rest, ok := strings.CutPrefix(group, strings.TrimSuffix(h.root, "/"))
	if !ok {
		rest = "" // what is mounted is not what we are in
	}
	return filepath.Join(h.point, rest)
}

// path finds a process' group in the text of its cgroup file. "" is version 2.
func path(own, controller string) string {
	for line := range strings.Lines(own) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 || (f[1] == "") != (controller == "") {
			continue
		}
		if controller == "" || slices.Contains(strings.Split(f[1], ","), controller) {
			return f[2]
		}
	}
	return "/"
}

func parseMounts(r io.Reader) (all []hierarchy, err error) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 6 || len(g) < 3 || g[0] != "cgroup" && g[0] != "cgroup2" {
			continue
		}
		all = append(all, hierarchy{root: f[3], point: f[4], kind: g[0], options: g[2]})
	}
	return all, sc.Err()
}

// prepare checks that groups with limits can be made.
func (t Tree) prepare() error {
	name := "probe-" + strconv.Itoa(os.Getpid())
	g, err := t.Make(t.Paths(name), Limits{Memory: 1 << 30, Processes: 1})
	if err != nil {
		return errors.Join(fmt.Errorf("%w: %w", ErrNone, err), Remove(t.Paths(name)))
	}
	return Remove(g.paths)
}

// Paths are where a group of a name will be.
func (t Tree) Paths(name string) (paths []string) {
	for _, p := range t.parents {
		paths = append(paths, filepath.Join(p, room, name))
	}
	return paths
}

// Group is a group that was made.
type Group struct{ paths []string }

// Make makes the group at Paths.
func (t Tree) Make(paths []string, l Limits) (Group, error) {
	if err := t.make(paths, l); err != nil {
		return Group{}, fmt.Errorf("make cgroup: %w", err)
	}
	return Group{paths}, nil
}

func (t Tree) make(paths []string, l Limits) error {
	for _, p := range paths {
		if err := t.makeDir(p); err != nil {
			return err
		}
	}
	if t.second {
		return set(paths[0], map[string]int64{"memory.max": l.Memory, "pids.max": l.Processes}, map[string]string{"memory.oom.group": "1"})
	}
	return errors.Join(
		set(paths[0], map[string]int64{"memory.limit_in_bytes": l.Memory}, map[string]string{"memory.memsw.limit_in_bytes": strconv.FormatInt(l.Memory, 10)}),
		set(paths[1], map[string]int64{"pids.max": l.Processes}, nil))
}

// makeDir makes a group and the room above it, which another may remove
// meanwhile, as it is empty.
func (t Tree) makeDir(path string) error {
	for try := 0; ; try++ {
		err := os.Mkdir(path, 0o755)
		if !errors.Is(err, fs.ErrNotExist) || try == 10 {
			return err
		}
		err = os.Mkdir(filepath.Dir(path), 0o755)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if t.second {
			for _, dir := range []string{filepath.Dir(filepath.Dir(path)), filepath.Dir(path)} {
				if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+memory +pids"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
			}
		}
	}
}

// set writes limits, and what a kernel may not have.
func set(dir string, limits map[string]int64, may map[string]string) error {
	for name, n := range limits {
		if n > 0 {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(strconv.FormatInt(n, 10)), 0); err != nil {
				return err
			}
		}
	}
	for name, text := range may {
		_ = os.WriteFile(filepath.Join(dir, name), []byte(text), 0)
	}
	return nil
}

// Add moves a process into the group, with what it starts from then on.
func (g Group) Add(pid int) error {
	for _, p := range g.paths {
		if err := os.WriteFile(filepath.Join(p, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("move process %d to its cgroup: %w", pid, err)
		}
	}
	return nil
}

// Remove removes a group whose processes have ended. One that is not there is no
// error.
func Remove(paths []string) error {
	var errs []error
	for _, p := range paths {
		if filepath.Base(filepath.Dir(p)) != room {
			errs = append(errs, fmt.Errorf("remove cgroup %q: it is none of ours", p))
			continue
		}
		if err := removeDir(p); err != nil {
			errs = append(errs, fmt.Errorf("remove cgroup: %w", err))
		}
		_ = os.Remove(filepath.Dir(p)) // fails while others are in it
	}
	return errors.Join(errs...)
}

// removeDir waits a moment: a process that was waited for may be counted still.
func removeDir(path string) error {
	for try := 0; ; try++ {
		err := os.Remove(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) || try == 100 {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}
