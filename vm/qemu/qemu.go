// Package qemu drives QEMU's microvm machine: it composes the command line,
// starts QEMU in a jail with nothing but open files, and speaks its control
// protocol.
//
// A QEMU that runs a guest is taken to be the guest's: it has no right, no
// network, no path to a file of ours, and its words are bounded and never
// trusted. Every image and every socket is opened here and passed; QEMU's own
// seccomp filter forbids it to start or become anything.
package qemu

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/netns"
	"hauberk.dev/vm"
	"hauberk.dev/vm/cgroup"
	"hauberk.dev/vm/jail"
)

const (
	program    = "/usr/bin/qemu-system-x86_64"
	driverName = "qemu"

	defaultCacheMiB     = 32
	defaultMaxTemplates = 4
	templateDeadline    = 3 * time.Minute
	maxMonitorLog       = 1 << 20
	maxThreads          = 256
)

// Config is how a driver is set up.
type Config struct {
	// Run is the directory of run directories, made if it is missing.
	Run string
	// UID and GID are those of QEMUs that make templates and probe.
	UID, GID uint32
	// Accelerator is what Probe found. Empty means TCG.
	Accelerator Accelerator
	// CacheMiB bounds the code that TCG keeps translated, per machine. 0 means
	// 32: enough for a busy guest; an idle one uses a part.
	CacheMiB int
	// MaxTemplates bounds the templates kept, about 96 MB of memory each. 0
	// means 4.
	MaxTemplates int
	// Ready waits until a booting guest is worth freezing. nil opens a session
	// with the agent and closes it.
	Ready func(context.Context, *vm.Machine) error

	scratch bool // every machine of the driver is for a moment only
}

// Driver makes machines with QEMU. It is safe for concurrent use.
type Driver struct {
	config      Config
	version     string
	commandLine string
	jail        *jail.Jail
	nowhere     *netns.Nowhere // of the taps of guests without a network
	cgroups     cgroup.Tree
	bounded     bool // by cgroups

	making    sync.Mutex // held while a template is made
	mu        sync.Mutex
	templates []*vm.Template // the least recently used first
}

var _ vm.Driver = (*Driver)(nil)

// Open checks that QEMU is there and builds the jail it will run in.
func Open(ctx context.Context, c Config) (*Driver, error) {
	if c.UID == 0 || c.GID == 0 {
		return nil, errors.New("open QEMU driver: the user for templates must not be root")
	}
	if c.Accelerator == "" {
		c.Accelerator = TCG
	}
	if c.CacheMiB == 0 {
		c.CacheMiB = defaultCacheMiB
	}
	if c.MaxTemplates == 0 {
		c.MaxTemplates = defaultMaxTemplates
	}
	if c.Ready == nil {
		c.Ready = greet
	}
	version, err := Version(ctx)
	if err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	tsc, err := hostTSC()
	if err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	if err := os.MkdirAll(c.Run, 0o700); err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	if c.Run, err = filepath.Abs(c.Run); err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	nowhere, err := netns.OpenNowhere()
	if err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	j, err := jail.Open(c.Accelerator.devices()...)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open QEMU driver: %w", err), nowhere.Close())
	}
	d := &Driver{config: c, version: version, commandLine: commandLine(tsc), jail: j, nowhere: nowhere}
	d.cgroups, err = cgroup.Find()
	if d.bounded = err == nil; err != nil && !errors.Is(err, cgroup.ErrNone) {
		return nil, errors.Join(fmt.Errorf("open QEMU driver: %w", err), d.Close())
	}
	return d, nil
}

// Close frees the jail and the templates. Machines run on.
func (d *Driver) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	errs := []error{d.jail.Close(), d.nowhere.Close()}
	for _, t := range d.templates {
		errs = append(errs, t.Close())
	}
	d.templates = nil
	return errors.Join(errs...)
}

// Bounded says whether the host can bound what a machine takes of its memory
// beside the guest's. On a host without usable cgroups it cannot.
func (d *Driver) Bounded() bool { return d.bounded }

// CommandLine is what every guest of this driver boots with.
func (d *Driver) CommandLine() string { return d.commandLine }

// Version asks QEMU what it is: its first line, package revision included.
func Version(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callDeadline)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, "--version").Output()
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("find QEMU: %w: apt-get install qemu-system-x86", err)
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	if err != nil || !bytes.Contains(line, []byte("version")) {
		return "", fmt.Errorf("ask %s for its version: %w, %q", program, err, clip(string(line)))
	}
	return string(line), nil
}

// greet opens a session with the agent and closes it.
func greet(ctx context.Context, m *vm.Machine) error {
	c, _, err := m.Channel(ctx, nil)
	if err != nil {
		return err
	}
	return c.Close()
}

// Boot starts a machine from its kernel.
func (d *Driver) Boot(ctx context.Context, spec vm.Spec) (*vm.Machine, error) {
	if err := spec.Check(); err != nil {
		return nil, fmt.Errorf("boot machine %q: %w", spec.ID, err)
	}
	memory, err := memfd("guest", int64(spec.Template.MemoryMiB)<<20)
	if err != nil {
		return nil, fmt.Errorf("boot machine %s: %w", spec.ID, err)
	}
	defer memory.Close()
	m, _, err := d.boot(ctx, spec, roleBoot, memory)
	if err != nil {
		return nil, fmt.Errorf("boot machine %s: %w", spec.ID, err)
	}
	return m, nil
}

// boot starts a machine from its kernel on given memory.
func (d *Driver) boot(ctx context.Context, spec vm.Spec, r role, memory *os.File) (*vm.Machine, *monitor, error) {
	kernel, err := openBlob("kernel", spec.Template.Kernel)
	if err != nil {
		return nil, nil, err
	}
	defer kernel.Close()
	initrd, err := openBlob("initrd", spec.Template.Initrd)
	if err != nil {
		return nil, nil, err
	}
	defer initrd.Close()
	return d.launch(ctx, launch{
		spec: spec, role: r, memory: memory, boot: []*os.File{kernel, initrd},
		begin: func(context.Context, *monitor) error { return nil },
	})
}

// launch is one start of a QEMU.
type launch struct {
	spec     vm.Spec
	role     role
	memory   *os.File
	boot     []*os.File // kernel and initrd
	template string     // key
	saved    bool       // the state holds the memory, and devices no template has
	// begin brings the guest to where it can run.
	begin func(context.Context, *monitor) error

	tap *os.File // of the first network device
}

// launch starts a QEMU and takes its machine. Nothing is left if it fails.
func (d *Driver) launch(ctx context.Context, l launch) (_ *vm.Machine, _ *monitor, err error) {
	dir, err := vm.CreateRunDir(d.config.Run, l.spec.ID)
	if err != nil {
		return nil, nil, err
	}
	started := &started{dir: dir}
	defer func() {
		if err != nil {
			err = started.undo(ctx, err)
		}
	}()
	if len(l.spec.Networks) > 0 {
		l.tap = l.spec.Networks[0].Tap
	} else if started.tap, err = d.nowhere.Tap(); err != nil {
		return nil, nil, err
	} else {
		l.tap = started.tap
	}
	c := d.configuration(l)
	journal, err := vm.NewJournal(l.spec.ID, driverName, c.mark, l.spec.UID)
	if err != nil {
		return nil, nil, err
	}
	journal.Template, journal.Memory = l.template, int64(c.memoryMiB)<<20
	journal.Key, journal.Origin = d.key(l.spec.Template), d.origin(l.spec.Template)
	if d.bounded {
		journal.Cgroups = d.cgroups.Paths(c.mark)
	}
	journal.Scratch = l.role == roleTemplate || d.config.scratch || l.spec.Spare
	if err := journal.Write(dir.Path()); err != nil {
		return nil, nil, err
	}
	if l.spec.Journaled != nil {
		l.spec.Journaled()
	}
	if started.process, err = d.start(dir, c, l); err != nil {
		return nil, nil, err
	}
	if d.bounded { // before it has anything to do
		started.cgroups = journal.Cgroups
		if err := d.bound(journal.Cgroups, c, started.process.Pid); err != nil {
			return nil, nil, err
		}
	}
	conn, err := dir.Dial(ctx, vm.MonitorSocket)
	if err != nil {
		return nil, nil, err
	}
	if started.monitor, err = openMonitor(ctx, conn); err != nil {
		return nil, nil, err
	}
	if err := l.run(ctx, started.monitor); err != nil {
		return nil, nil, err
	}
	if err := journal.Ready(dir.Path(), started.process.Pid); err != nil {
		return nil, nil, err
	}
	m, err := vm.NewMachine(ctx, vm.Parts{Dir: dir, Process: started.process, Monitor: started.monitor, Tap: started.tap})
	if err != nil {
		return nil, nil, err
	}
	return m, started.monitor, nil
}

// run brings the guest to run, with the devices that no template has.
func (l launch) run(ctx context.Context, mon *monitor) error {
	plug := func() error {
		for i, n := range l.spec.Networks {
			if i == 0 {
				continue // the board's
			}
			if err := mon.AttachNetwork(ctx, i, n.Tap); err != nil {
				return err
			}
		}
		return nil
	}
	steps := []func() error{func() error { return l.begin(ctx, mon) }, plug}
	if l.saved {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return mon.Resume(ctx)
}

// started is what a start has made so far.
type started struct {
	dir     *vm.RunDir
	tap     *os.File // if it is the machine's own
	process *os.Process
	monitor *monitor
	cgroups []string
}

// undo ends what was started and adds to the error what QEMU said.
func (s *started) undo(ctx context.Context, err error) error {
	if s.process != nil {
		_ = s.process.Kill() // at worst it has ended
		if st, werr := s.process.Wait(); werr == nil && errors.Is(err, errHungUp) {
			err = fmt.Errorf("%w: %s", err, st)
		}
	}
	if s.monitor != nil {
		_ = s.monitor.Close()
	}
	if s.tap != nil {
		_ = s.tap.Close()
	}
	if said := s.dir.Tail(vm.MonitorLog, 1024); said != "" {
		err = fmt.Errorf("%w: QEMU says %s", err, said)
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	return errors.Join(err, cgroup.Remove(s.cgroups), s.dir.Remove())
}

// beside is what a monitor may take of the host beside the guest's memory and
// the code it has translated.
const beside = 160 << 20

// bound puts a monitor into a group that holds it to what its guest was given.
func (d *Driver) bound(paths []string, c configuration, pid int) error {
	g, err := d.cgroups.Make(paths, cgroup.Limits{
		Memory: int64(c.memoryMiB+c.cacheMiB)<<20 + beside, Processes: maxThreads,
	})
	if err != nil {
		return err
	}
	return g.Add(pid)
}

func (d *Driver) configuration(l launch) configuration {
	c := d.shape(l.spec.Template)
	c.role, c.shared = l.role, l.spec.Shared || l.saved
	c.mark = "hauberk-" + l.spec.ID + "-" + strings.ToLower(rand.Text()[:12])
	return c
}

// shape is the part of a configuration that a template decides.
func (d *Driver) shape(spec vm.TemplateSpec) configuration {
	return configuration{
		accelerator: d.config.Accelerator, commandLine: d.commandLine, cacheMiB: d.config.CacheMiB,
		memoryMiB: spec.MemoryMiB, cpus: spec.CPUs,
	}
}

// start opens what QEMU needs and starts it.
func (d *Driver) start(dir *vm.RunDir, c configuration, l launch) (*os.Process, error) {
	var files, ours []*os.File
	defer func() {
		for _, f := range ours {
			f.Close()
		}
	}()
	for _, name := range []string{vm.MonitorSocket, vm.AgentSocket, vm.ConsoleSocket} {
		f, err := dir.Listen(name)
		if err != nil {
			return nil, err
		}
		files, ours = append(files, f), append(ours, f)
	}
	files = append(append(files, l.memory, l.tap), l.boot...)
	fileSize := max(maxMonitorLog, l.spec.DiskLimit)
	for _, d := range l.spec.Disks {
		f, fi, err := reopen(d)
		if err != nil {
			return nil, err
		}
		files, ours = append(files, f), append(ours, f)
		c.disks = append(c.disks, disk{d.Slot, diskDriver(fi)})
		if d.Slot.Writable() {
			fileSize = max(fileSize, fi.Size())
		}
	}
	output, err := dir.Create(vm.MonitorLog)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	return d.jail.Start(jail.Command{
		Path: program, Args: c.arguments(), Files: files, Output: output,
		UID: l.spec.UID, GID: l.spec.GID, Groups: d.config.Accelerator.groups(),
		Limits: jail.Limits{OpenFiles: 256, Processes: maxThreads, FileSize: uint64(fileSize)},
	})
}

// reopen opens a disk anew with no more than the rights it needs, so that
// machines share no file position and a read-only disk is one.
func reopen(d vm.Disk) (*os.File, os.FileInfo, error) {
	flags := os.O_RDONLY
	if d.Slot.Writable() {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", d.File.Fd()), flags, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open disk %s: %w", d.Slot, err)
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() && fi.Mode().Type() != os.ModeDevice {
		err = errors.New("it is neither a file nor a block device")
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open disk %s: %w", d.Slot, err), f.Close())
	}
	return f, fi, nil
}

// memfd makes a file in memory. Anyone who holds it may seal it.
func memfd(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("hauberk-"+name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memfd:"+name)
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	return f, nil
}

// Adopt takes up a machine that outlived whoever started it.
func (d *Driver) Adopt(ctx context.Context, path string) (*vm.Machine, error) {
	return Adopt(ctx, path)
}

// Adopt takes up a machine that some driver started. It needs none.
func Adopt(ctx context.Context, path string) (*vm.Machine, error) {
	dir, err := vm.OpenRunDir(path)
	if err != nil {
		return nil, fmt.Errorf("adopt machine: %w", err)
	}
	// Asked before anything is dialled: a dead machine's sockets answer nobody.
	if err := vm.CheckAlive(path, driverName); err != nil {
		return nil, errors.Join(fmt.Errorf("adopt machine in %s: %w", path, err), dir.Close())
	}
	var conn *net.UnixConn
	if conn, err = dir.Dial(ctx, vm.MonitorSocket); err != nil {
		return nil, errors.Join(fmt.Errorf("adopt machine: %w", err), dir.Close())
	}
	mon, err := openMonitor(ctx, conn)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("adopt machine in %s: %w", path, err), dir.Close())
	}
	m, err := vm.NewMachine(ctx, vm.Parts{Dir: dir, Monitor: mon})
	if err != nil {
		return nil, fmt.Errorf("adopt machine: %w", err)
	}
	return m, nil
}
