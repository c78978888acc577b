// Package jail starts machine monitors where there is nothing to steal.
//
// A jail is one thread of this process that has left for a mount namespace
// with a read-only root: the system's programs and libraries, a few harmless
// devices, a /proc that shows a process only its own kind, and no way back.
// The thread has no_new_privs and an empty capability bounding set, so what it
// starts can never gain a right; each child gets its own user and its own
// mount, network, process, IPC and host name namespaces. Everything a child
// needs beyond that it gets as open files.
//
// The package knows no monitor and waits for no child: children outlive the
// jail and the process that made it.
package jail

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrClosed says that the jail takes no more children.
var ErrClosed = errors.New("jail is closed")

// limiter sets resource limits in the child, after it has changed its user:
// doing it from outside would need CAP_SYS_RESOURCE.
const limiter = "/usr/bin/prlimit"

// Command is a program to start in a jail.
type Command struct {
	Path string // absolute, as the jail sees it
	Args []string
	// Files become descriptors 3, 4, … of the child. Output is its standard
	// output and error; its input is empty.
	Files  []*os.File
	Output *os.File
	// UID and GID must not be root's. Groups are supplementary.
	UID, GID uint32
	Groups   []uint32
	Limits   Limits
}

// Limits bound what a child may use. Zero leaves the inherited limit; core
// dumps are always off, for they hold a guest's memory.
type Limits struct {
	OpenFiles uint64
	Processes uint64 // threads included, counted per user
	FileSize  uint64 // of any file the child writes
}

// Jail is a thread in its own mount namespace.
type Jail struct {
	calls chan call
	done  chan struct{}
}

type call struct {
	run func() (*os.Process, error)
	out chan outcome
}

type outcome struct {
	process *os.Process
	err     error
}

// Open builds the jail. Devices are paths below /dev to show beside null,
// zero, random and urandom.
func Open(devices ...string) (*Jail, error) {
	// What this process inherited without meaning to must not reach a child.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("build jail: mark inherited files: %w", err)
	}
	j := &Jail{calls: make(chan call), done: make(chan struct{})}
	ready := make(chan error)
	go onSpareThread(func() { j.live(devices, ready) })
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("build jail: %w", err)
	}
	return j, nil
}

// onSpareThread runs f on a thread that is not the main one and that ends with
// f: the main thread is what /proc/self shows of the whole process.
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

func (j *Jail) live(devices []string, ready chan<- error) {
	err := enter(devices)
	ready <- err
	if err != nil {
		return
	}
	for {
		select {
		case c := <-j.calls:
			p, err := c.run()
			c.out <- outcome{p, err}
		case <-j.done:
			return
		}
	}
}

// Close ends the thread and with it the jail's root. Children go on. It must
// be called once, with no Start under way.
func (j *Jail) Close() error {
	close(j.done)
	return nil
}

// Start starts a program in the jail.
func (j *Jail) Start(c Command) (*os.Process, error) {
	if c.UID == 0 || c.GID == 0 {
		return nil, fmt.Errorf("start %s: a jailed program does not run as root", c.Path)
	}
	argv := slices.Concat(c.Limits.prefix(), []string{c.Path}, c.Args)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	output := c.Output
	if output == nil {
		output = null
	}
	attr := &os.ProcAttr{
		Dir: "/", Env: []string{},
		Files: append([]*os.File{null, output, output}, c.Files...),
		Sys: &syscall.SysProcAttr{
			Setsid:     true,
			Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
			Credential: &syscall.Credential{Uid: c.UID, Gid: c.GID, Groups: c.Groups},
		},
	}
	out := make(chan outcome, 1)
	run := func() (*os.Process, error) { return os.StartProcess(argv[0], argv, attr) }
	select {
	case j.calls <- call{run, out}:
	case <-j.done:
		return nil, fmt.Errorf("start %s: %w", c.Path, ErrClosed)
	}
	o := <-out
	if o.err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, o.err)
	}
	return o.process, nil
}

// prefix is the limiter's part of a command line.
func (l Limits) prefix() []string {
	argv := []string{limiter, "--core=0"}
	for _, x := range []struct {
		flag  string
		value uint64
	}{{"--nofile=", l.OpenFiles}, {"--nproc=", l.Processes}, {"--fsize=", l.FileSize}} {
		if x.value != 0 {
			argv = append(argv, x.flag+strconv.FormatUint(x.value, 10))
		}
	}
	return append(argv, "--")
}

// enter moves the calling thread into a new root and drops what its children
// shall not have.
func enter(devices []string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// A tmpfs on /mnt is seen by this thread alone.
	const root = "/mnt"
	if err := unix.Mount("jail", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=8m,mode=0755"); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	if err := furnish(root, devices); err != nil {
		return err
	}
	if err := pivot(root); err != nil {
		return err
	}
	return renounce()
}

// furnish puts into the root what programs need to be loaded.
func furnish(root string, devices []string) error {
	for _, dir := range []string{"usr", "dev", "proc", "etc"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	if err := bind("/usr", filepath.Join(root, "usr"), unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV); err != nil {
		return err
	}
	for _, dir := range []string{"/lib", "/lib64", "/bin"} {
		if err := system(root, dir); err != nil {
			return err
		}
	}
	// The loader's cache is a convenience: without it loading is slower.
	if cache, err := os.ReadFile("/etc/ld.so.cache"); err == nil {
		if err := os.WriteFile(filepath.Join(root, "etc/ld.so.cache"), cache, 0o644); err != nil {
			return err
		}
	}
	for _, name := range append([]string{"null", "zero", "random", "urandom"}, devices...) {
		path := filepath.Join(root, "dev", name)
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			return err
		}
		if err := bind(filepath.Join("/dev", name), path, unix.MS_NOSUID|unix.MS_NOEXEC); err != nil {
			return err
		}
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("proc", filepath.Join(root, "proc"), "proc", flags, "hidepid=invisible,subset=pid"); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	return nil
}

// system shows a system folder, which on most machines is a link into /usr.
func system(root, dir string) error {
	to := filepath.Join(root, dir)
	if link, err := os.Readlink(dir); err == nil {
		return os.Symlink(link, to)
	}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	return bind(dir, to, unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV)
}

func bind(from, to string, flags uintptr) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s: %w", from, err)
	}
	if err := unix.Mount("", to, "", unix.MS_REMOUNT|unix.MS_BIND|flags, ""); err != nil {
		return fmt.Errorf("restrict %s: %w", from, err)
	}
	return nil
}

// pivot makes root the root, with the old one gone.
func pivot(root string) error {
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	const flags = unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV
	if err := unix.Mount("", "/", "", flags, ""); err != nil {
		return fmt.Errorf("make root read-only: %w", err)
	}
	return nil
}

// renounce takes from the thread, for its children, every way to a right.
// What the thread itself may do stays: it must still change users.
func renounce() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	for c := uintptr(0); c < 64; c++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // past the kernel's last capability
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}
