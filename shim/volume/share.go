package volume

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/shim/oci"
)

// The share is one virtio file system for all volumes of a pod that are the
// host's directories. Its server is Debian's virtiofsd, which must act as root
// on files, so what it can reach is what makes it safe: in its mount namespace
// there is one directory, on a tmpfs of its own, with the pod's volumes bound
// below it, and nothing else of the host.
//
// The volumes are bound by a thread of this process that lives in the
// namespace the server's is a copy of: what it binds later reaches the server.
// Read-only volumes are read-only there, whatever the guest does. Mounts of the
// host that come later reach it below volumes that ask for them, and only below
// those; none goes back.

const (
	serverPath = "/usr/lib/qemu/virtiofsd"
	shareTag   = "share"
	shareRoot  = "/mnt" // in the thread's namespace
	// findTime is how long a guest may take to find the device.
	findTime, findAgain = 20 * time.Second, 10 * time.Millisecond
)

// serverRights are the capabilities that the server may have, by number: what
// root does with files, and what it needs to shut itself in. It cannot make
// device nodes.
var serverRights = map[uintptr]bool{
	unix.CAP_CHOWN: true, unix.CAP_DAC_OVERRIDE: true, unix.CAP_FOWNER: true, unix.CAP_FSETID: true, unix.CAP_SETGID: true,
	unix.CAP_SETUID: true, unix.CAP_SETFCAP: true, unix.CAP_SETPCAP: true, unix.CAP_SYS_ADMIN: true,
}

type share struct {
	binds  chan bind
	stop   chan struct{}
	server *exec.Cmd
	ended  chan struct{}

	mu     sync.Mutex
	names  map[string]string // by path of the host and how it is bound
	closed bool
}

// bind is a tree of mounts to be attached below the share.
type bind struct {
	tree  int
	name  string
	isDir bool
	out   chan error
}

func (p *Pod) addShared(ctx context.Context, m *guestproto.Mount, s *source, v oci.Volume) (string, error) {
	if p.share == nil {
		sh, err := p.openShare(ctx)
		if err != nil {
			return "", fmt.Errorf("share it: %w", err)
		}
		p.share = sh
	}
	name, err := p.share.add(s, v)
	if err != nil {
		return "", fmt.Errorf("share it: %w", err)
	}
	if v.ReadOnly && v.Recursive && !v.Below {
		// To the guest it is one file system; the host's mounts say what of it
		// can be written.
		several, err := mountsBelow(s.path)
		if err != nil {
			return "", fmt.Errorf("share it: %w", err)
		}
		if several {
			m.Flags &^= unix.MS_RDONLY
		}
	}
	return shareTag + "/" + name, nil
}

// openShare starts the server and gives the guest its file system.
func (p *Pod) openShare(ctx context.Context) (*share, error) {
	sh := &share{binds: make(chan bind), stop: make(chan struct{}), ended: make(chan struct{}), names: map[string]string{}}
	conn, err := sh.open(p.conf.ServerLog)
	if err != nil {
		return nil, err
	}
	go sh.watch(p.conf.Failed)
	// The machine has the connection from here on.
	if err = p.conf.Machine.Share(ctx, shareTag, conn); err == nil {
		err = p.mountShare(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, sh.close())
	}
	return sh, nil
}

// mountShare mounts the file system once the guest has found its device.
func (p *Pod) mountShare(ctx context.Context) error {
	if err := p.conf.Guest.Rescan(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, findTime)
	defer cancel()
	for {
		err := p.conf.Guest.MountShare(ctx, shareTag)
		if !errors.Is(err, unix.EINVAL) { // what the guest says of a tag that it does not know
			return err
		}
		select {
		case <-time.After(findAgain):
		case <-ctx.Done():
			return err
		}
	}
}

// open builds the share and starts its server. It returns the machine's end of
// the connection.
func (sh *share) open(log *os.File) (*os.File, error) {
	listener, conn, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	ready := make(chan error)
	go onSpareThread(func() { sh.live(listener, log, ready) })
	if err := <-ready; err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// socketPair makes a listening socket that only the connection that comes with
// it ever reaches: its name is gone before anybody else can use it.
func socketPair() (listener, conn *os.File, err error) {
	dir, err := os.MkdirTemp("", "hauberk-share-") // of mode 0700
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, nil, err
	}
	defer c.Close()
	if listener, err = ln.File(); err != nil {
		return nil, nil, err
	}
	if conn, err = c.File(); err != nil {
		return nil, nil, errors.Join(err, listener.Close())
	}
	return listener, conn, nil
}

// onSpareThread runs f on a thread that ends with f, and that is not the main
// one: that is what /proc/self shows of the whole process.
func onSpareThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f() // never unlocked: the runtime ends the thread
		return
	}
	done := make(chan struct{})
	go func() { defer close(done); onSpareThread(f) }()
	<-done
	runtime.UnlockOSThread()
}

// live is the thread of the share.
func (sh *share) live(listener, log *os.File, ready chan<- error) {
	err := shutIn()
	if err == nil {
		err = sh.start(listener, log)
	}
	ready <- err
	if err != nil {
		return
	}
	for {
		select {
		case b := <-sh.binds:
			b.out <- attach(b)
		case <-sh.ended:
			return
		case <-sh.stop:
			return
		}
	}
}

// shutIn moves this thread into a mount namespace with an empty, shared
// directory for volumes.
func shutIn() error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("volumes", shareRoot, "tmpfs", flags, "size=1m,nr_inodes=4096,mode=0755"); err != nil {
		return fmt.Errorf("mount the volumes' directory: %w", err)
	}
	if err := unix.Mount("", shareRoot, "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the volumes' directory: %w", err)
	}
	return nil
}

// start starts the server on this thread, as a copy of whose namespace its own
// begins. It takes the rights from the thread that the server shall not have.
func (sh *share) start(listener, log *os.File) error {
	for c := uintptr(0); c < 64; c++ {
		if serverRights[c] {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); errors.Is(err, unix.EINVAL) {
			break // past the kernel's last
		} else if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	sh.server = exec.Command(serverPath, "-f", "--fd=3", "-o", strings.Join([]string{
		"source=" + shareRoot, "sandbox=namespace", "modcaps=-mknod", "cache=auto", "no_posix_lock", "no_flock", "log_level=err",
	}, ","))
	sh.server.Env, sh.server.Dir = []string{}, "/"
	sh.server.ExtraFiles = []*os.File{listener}
	if log != nil {
		sh.server.Stdout, sh.server.Stderr = log, log
	}
	// The end of the first process of a PID namespace is that of all in it.
	sh.server.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS}
	if err := sh.server.Start(); err != nil {
		return fmt.Errorf("start file server: %w", err)
	}
	return nil
}

// attach puts a tree of mounts below the share.
func attach(b bind) error {
	defer unix.Close(b.tree)
	at := filepath.Join(shareRoot, b.name)
	var err error
	if b.isDir {
		err = os.Mkdir(at, 0o755)
	} else {
		err = os.WriteFile(at, nil, 0o644)
	}
	if err == nil {
		err = unix.MoveMount(b.tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	if err != nil {
		return fmt.Errorf("bind volume %s: %w", b.name, err)
	}
	return nil
}

// add binds a volume below the share, once for each way it is wanted.
func (sh *share) add(s *source, v oci.Volume) (string, error) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	key := fmt.Sprintf("%v %v %v %v %s", v.ReadOnly, v.Recursive, v.Below, v.Later, s.path)
	if name, ok := sh.names[key]; ok {
		return name, nil
	}
	if v.Later {
		if shared, err := isShared(s.path); err != nil || !shared {
			return "", errors.Join(errors.New("the host's mount that it lies on is private: nothing that is mounted below it later would be seen"), err)
		}
	}
	tree, err := cloneTree(s.file, v)
	if err != nil {
		return "", err
	}
	b := bind{tree, strconv.Itoa(len(sh.names)), s.stat.Mode&unix.S_IFMT == unix.S_IFDIR, make(chan error, 1)}
	gone := errors.New("the file server has ended")
	select {
	case <-sh.ended:
		return "", errors.Join(gone, unix.Close(tree))
	default:
	}
	select {
	case sh.binds <- b:
	case <-sh.ended:
		return "", errors.Join(gone, unix.Close(tree))
	}
	if err := <-b.out; err != nil {
		return "", err
	}
	sh.names[key] = b.name
	return b.name, nil
}

// cloneTree makes a copy of the mounts at a place, attached nowhere, with what
// a guest must not do taken away from all of them. Read-only is the first of
// them, and those below if that was asked for.
func cloneTree(f *os.File, v oci.Volume) (int, error) {
	how := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	if v.Recursive {
		how |= unix.AT_RECURSIVE
	}
	tree, err := unix.OpenTree(int(f.Fd()), "", how)
	if err != nil {
		return -1, os.NewSyscallError("open_tree", err)
	}
	all := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_PRIVATE}
	if v.Later {
		all.Propagation = unix.MS_SLAVE
	}
	if v.ReadOnly && v.Below {
		all.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &all)
	if err == nil && v.ReadOnly {
		err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	}
	if err != nil {
		return -1, errors.Join(os.NewSyscallError("mount_setattr", err), unix.Close(tree))
	}
	return tree, nil
}

// watch waits for the server's end, which is the volumes' if nobody wanted it.
func (sh *share) watch(failed func(error)) {
	err := sh.server.Wait()
	close(sh.ended)
	sh.mu.Lock()
	wanted := sh.closed
	sh.mu.Unlock()
	if !wanted && failed != nil {
		if err == nil {
			err = errors.New("it exited")
		}
		failed(fmt.Errorf("file server of the pod's volumes ended: %w", err))
	}
}

// close ends the server and with it the share's mounts.
func (sh *share) close() error {
	sh.mu.Lock()
	if sh.closed {
		sh.mu.Unlock()
		return nil
	}
	sh.closed = true
	sh.mu.Unlock()
	close(sh.stop)
	err := sh.server.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	<-sh.ended
	return err
}
