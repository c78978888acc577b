// Package netns puts a guest's tap into a network namespace: one that it makes,
// a place that holds the tap of one guest and nothing else, or one that CNI
// plugins made, whose place on the network the guest then takes (Join).
//
// There is no way out of a namespace made here. It has no other link and forwards
// nothing. TCP from the guest, whatever its destination, is handed by TPROXY to
// a listener inside the namespace; DNS to the gateway address reaches a socket
// inside it; everything else is dropped and counted by destination. Frames that
// do not carry the guest's own addresses are dropped before that. The sockets
// are made here, by a privileged process, and given to an unprivileged one.
//
// The package knows no proxy, no plan and no policy. Its functions need
// CAP_NET_ADMIN and CAP_SYS_ADMIN.
package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"

	"golang.org/x/sys/unix"
)

var nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,127}$`)

// Namespace is an open, named network namespace.
type Namespace struct {
	name string
	path string
	file *os.File
	// enclosed says that this process has installed the rules.
	enclosed bool
}

// Create makes a network namespace and binds it to dir/name, where Open finds
// it again. The namespace lives until Delete, and after that as long as a
// process or a socket is in it.
func Create(dir, name string) (*Namespace, error) { return create(dir, name, prepare) }

// create makes a namespace, which prepare makes ready before it has a name.
func create(dir, name string, prepare func() error) (*Namespace, error) {
	if !nameRE.MatchString(name) {
		return nil, fmt.Errorf("create namespace %q: name must match %s", name, nameRE)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create namespace %q: %w", name, err)
	}
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return nil, fmt.Errorf("create namespace %q: %w", name, err)
	}
	f.Close()
	ns := &Namespace{name: name, path: path}
	err = onThread(func() error {
		if err := ownTable(); err != nil {
			return err
		}
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		// Prepare before the name exists: who opens it finds it closed already.
		if err := prepare(); err != nil {
			return err
		}
		if err := unix.Mount(threadNS(), path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", path, err)
		}
		ns.file, err = os.Open(path)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create namespace %q: %w", name, err), ns.Delete())
	}
	return ns, nil
}

// tableSize is how many connections a namespace's own table is made for; it takes
// more, at the cost of searching.
const tableSize = "4096"

// ownTable has the next namespace get a table of TCP connections of its own. Who
// lists them then reads that and not the table of the whole machine, and nobody
// fills another's. A kernel says how large it is to be by the namespace that the
// next one is made from, hence one that is left at once. An older kernel has one
// table for all.
func ownTable() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	err := os.WriteFile("/proc/sys/net/ipv4/tcp_child_ehash_entries", []byte(tableSize), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("size table of connections: %w", err)
	}
	return nil
}

// Open opens a namespace that Create made, also in an earlier process.
func Open(dir, name string) (*Namespace, error) {
	if !nameRE.MatchString(name) {
		return nil, fmt.Errorf("open namespace %q: name must match %s", name, nameRE)
	}
	path := filepath.Join(dir, name)
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open namespace %q: %w", name, err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, fmt.Errorf("open namespace %q: %s is not a namespace (its mount is gone)", name, path)
	}
	return &Namespace{name: name, path: path, file: f}, nil
}

// List names what is in dir, namespaces and the leftovers of interrupted
// creations alike; each can be given to Remove.
func List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	var names []string
	for _, e := range entries {
		if nameRE.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Remove deletes dir/name, whether a namespace is bound to it or not. Removing
// what is not there is no error.
func Remove(dir, name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("remove namespace %q: name must match %s", name, nameRE)
	}
	return unbind(filepath.Join(dir, name))
}

// Name is the name given to Create.
func (ns *Namespace) Name() string { return ns.name }

// Path is the file the namespace is bound to, as setns(2) and QEMU's launcher
// want it.
func (ns *Namespace) Path() string { return ns.path }

// Close forgets the namespace without deleting it.
func (ns *Namespace) Close() error {
	if ns.file == nil {
		return nil
	}
	// The file itself knows that it is closed, also while Do is using it.
	if err := ns.file.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Delete closes the namespace and removes its name. Links, routes and rules go
// with it once its last process and socket are gone.
func (ns *Namespace) Delete() error {
	return errors.Join(ns.Close(), unbind(ns.path))
}

// Do runs f in the namespace, on its own thread: what f opens belongs to the
// namespace, what f starts in other goroutines does not.
func (ns *Namespace) Do(f func() error) error {
	if ns.file == nil {
		return fmt.Errorf("enter namespace %q: %w", ns.name, fs.ErrClosed)
	}
	raw, err := ns.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("enter namespace %q: %w", ns.name, err)
	}
	return onThread(func() error {
		var entered error
		// Close waits for this, so the number cannot mean another file.
		if err := raw.Control(func(fd uintptr) { entered = unix.Setns(int(fd), unix.CLONE_NEWNET) }); err != nil {
			return fmt.Errorf("enter namespace %q: %w", ns.name, err)
		}
		if entered != nil {
			return fmt.Errorf("enter namespace %q: %w", ns.name, entered)
		}
		return f()
	})
}

// unbind undoes the bind mount, however often it was made, and the file.
func unbind(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // no mount left, or no file
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// onThread runs f on a thread whose namespace f may change. The thread goes
// back to the pool only if its namespace could be restored.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open(threadNS())
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own namespace: %w", err)
			return
		}
		defer home.Close()
		err = f()
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		} // else the runtime ends the thread with this goroutine
		done <- err
	}()
	return <-done
}

func threadNS() string { return fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()) }
