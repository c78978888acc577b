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

// Place tells the Guard of what a container has at a path, once all is mounted:
// first of its mounts, last of its root, from which on rules for files hold
// there, too. fd is the Guard's from here on.
func (g *Guard) Place(cgroup uint64, path string, fd int) error {
	g.places = append(g.places, mounted{cgroup, path, fd})
	if path != "/" || g.fileRules == 0 {
		return nil
	}
	return g.again()
}

// unmounted forgets a container's mounts.
func (g *Guard) unmounted(cgroup uint64) {
	kept, used := g.mounts[:0], false
	places := g.places[:0]
	for _, m := range g.places {
		if m.cgroup != cgroup {
			places = append(places, m)
			continue
		}
		syscall.Close(m.fd)
		used = used || g.fileRules > 0
	}
	g.places = places
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

// isShare says whether something is of a share of the host's files.
func isShare(fd int) bool {
	const fuse = 0x65735546
	var fs syscall.Statfs_t
	return syscall.Fstatfs(fd, &fs) == nil && fs.Type == fuse
}

// covered says whether rules are about a place, what is above it or what is below.
func (p *place) covered() bool {
	for up := p; up != nil; up = up.up {
		if len(up.rules) > 0 {
			return true
		}
	}
	for _, below := range p.in {
		if below.leads() {
			return true
		}
	}
	return false
}

func (p *place) leads() bool {
	found := len(p.rules) > 0 || p.anchor != 0
	for _, below := range p.in {
		found = found || below.leads()
	}
	return found
}

// protectPlaces finds what the rules' paths lead to in each container: over what
// is mounted there, and in it. What is mounted below a place that rules cover is
// under them, too.
func (n *next) protectPlaces() error {
	for _, root := range n.g.places {
		if root.path != "/" || len(n.p.files) == 0 {
			continue
		}
		top := &place{}
		for i := range n.p.files {
			if err := n.protect(root.fd, top, i); err != nil {
				return fail("protect", strconv.Quote(n.p.files[i].path), err)
			}
		}
		for _, m := range n.g.places {
			if m.cgroup != root.cgroup || m.path == "/" {
				continue
			}
			at, err := n.reach(root.fd, top, m.path)
			if err != nil {
				return fail("protect", strconv.Quote(m.path), err)
			}
			n.inShares = n.inShares || at != nil && isShare(m.fd) && at.covered()
		}
		if err := n.settle(top, fileSet{}); err != nil {
			return err
		}
	}
	return nil
}

// reach walks to a mount, whose root is not below what it is mounted on as far
// as the programs can see.
func (n *next) reach(root int, top *place, path string) (reached *place, err error) {
	w := walker{root: root, top: top, absent: func(*place, string) error { return nil }}
	w.step = func(fd int, at *place, last bool) error {
		if last {
			reached, at.mounted = at, true
		}
		if !last || at.mark != nil {
			return syscall.Close(fd)
		}
		m, err := n.g.take(fd)
		if err != nil {
			return fail("mark", strconv.Quote(path), err)
		}
		at.mark = m
		return nil
	}
	if err := w.walk(path); err != nil && !unreachable(err) {
		return nil, err
	}
	return reached, nil // what cannot be reached, nothing in the container reaches by that path
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
