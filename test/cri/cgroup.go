package cri

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// hierarchy is a mounted tree of cgroups, of either version, and the group in
// it that is ours.
type hierarchy struct {
	mount  string
	kind   string // cgroup or cgroup2
	option string // which of version 1 it is
	group  string // directory
}

// hierarchies finds those that this process is in.
func hierarchies(group string) (all []hierarchy, err error) {
	member, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		f, after, ok := strings.Cut(strings.TrimSpace(line), " - ")
		fields, kind := strings.Fields(f), strings.Fields(after)
		if !ok || len(fields) < 5 || len(kind) < 3 || !strings.HasPrefix(kind[0], "cgroup") {
			continue
		}
		h := hierarchy{mount: fields[4], kind: kind[0]}
		options := strings.Split(kind[2], ",")
		for m := range strings.Lines(string(member)) {
			p := strings.SplitN(strings.TrimSpace(m), ":", 3)
			first, _, _ := strings.Cut(p[1], ",")
			if p[1] == "" && kind[0] == "cgroup2" || p[1] != "" && kind[0] == "cgroup" && slices.Contains(options, first) {
				h.option, h.group = p[1], filepath.Join(h.mount, p[2], group)
			}
		}
		if h.group != "" && !slices.ContainsFunc(all, func(o hierarchy) bool { return o.group == h.group }) {
			all = append(all, h)
		}
	}
	if len(all) == 0 {
		return nil, errors.New("find cgroups: none is mounted")
	}
	return all, nil
}

// enterCgroups makes a group in every hierarchy the root of what this thread
// and its children see of it.
func enterCgroups(group string) error {
	all, err := hierarchies(group)
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := h.join(); err != nil {
			return fmt.Errorf("join %s: %w", h.group, err)
		}
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare cgroups: %w", err)
	}
	for _, h := range all {
		if err := unix.Unmount(h.mount, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", h.mount, err)
		}
		if err := unix.Mount(h.kind, h.mount, h.kind, 0, h.option); err != nil {
			return fmt.Errorf("mount %s: %w", h.mount, err)
		}
		if h.kind == "cgroup2" { // a group with processes has no children with limits
			h.group = filepath.Join(h.mount, "self")
			if err := h.join(); err != nil {
				return fmt.Errorf("join %s: %w", h.group, err)
			}
		}
	}
	return nil
}

func (h hierarchy) join() error {
	if err := os.Mkdir(h.group, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		raw, err := os.ReadFile(filepath.Join(filepath.Dir(h.group), name))
		if h.kind != "cgroup" || err != nil {
			continue // not there
		}
		if err := os.WriteFile(filepath.Join(h.group, name), raw, 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(h.group, "cgroup.procs"), []byte("0"), 0o644)
}

// remove takes the group away, with those below it.
func (h hierarchy) remove() error {
	var dirs []string
	err := filepath.WalkDir(h.group, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, name)
		}
		return nil // none was made
	})
	for _, dir := range slices.Backward(dirs) {
		if e := os.Remove(dir); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}
