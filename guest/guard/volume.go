package guard

import (
	"strconv"
	"syscall"
)

// mounted is a mount of a container, by a descriptor of its root.
type mounted struct {
	cgroup uint64
	path   string
	fd     int
}

// Mounted tells the Guard of a mount that a container, which is the cgroup of
// that number, has from the start: what is at path now is what a policy means
// by it, whatever is mounted there later. fd is the Guard's from here on.
func (g *Guard) Mounted(cgroup uint64, path string, fd int) error {
	g.mounts = append(g.mounts, mounted{cgroup, path, fd})
	for _, v := range g.volumes {
		if v == path {
			_, err := g.apply(g.blob)
			return err
		}
	}
	return nil
}

// unmounted forgets a container's mounts.
func (g *Guard) unmounted(cgroup uint64) {
	kept, used := g.mounts[:0], false
	for _, m := range g.mounts {
		if m.cgroup != cgroup {
			kept = append(kept, m)
			continue
		}
		syscall.Close(m.fd)
		for _, v := range g.volumes {
			used = used || v == m.path
		}
	}
	g.mounts = kept
	if used {
		// If it fails, the marks stay, and the mounts with them, until the next
		// policy.
		_, _ = g.apply(g.blob)
	}
}

// volume lets the files of every mount at a path run.
func (n *next) volume(e *programEntry) error {
	found := false
	for _, m := range n.g.mounts {
		if m.path != e.path {
			continue
		}
		own, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(m.fd), syscall.F_DUPFD_CLOEXEC, 0)
		if errno != 0 {
			return fail("open", strconv.Quote(e.path), errno)
		}
		mark, err := n.g.take(int(own))
		if err != nil {
			return fail("mark", strconv.Quote(e.path), err)
		}
		n.meaning(mark).volume |= e.lists
		found = true
	}
	if !found {
		n.note(e.rule, absentName, 0)
	}
	return nil
}
