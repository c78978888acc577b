package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"hauberk.dev/api/guestproto"
	wire "hauberk.dev/api/node"
	"hauberk.dev/guard"
	"hauberk.dev/guard/bpf"
	"hauberk.dev/image"
	"hauberk.dev/internal/netns"
	"hauberk.dev/vm"
	"hauberk.dev/vm/boot"
	"hauberk.dev/vm/pool"
	"hauberk.dev/vm/qemu"
)

const (
	guestMiB = 160 // what a node gives a sandbox unless told otherwise
	// firstUser of the machines made here; no node uses these.
	firstUser = 0x48430000
	busybox   = "/bin/busybox"
	rootSlot  = vm.Slot("r0")
)

// workload says one word when it runs, and then idles.
var workload = []string{"/bin/busybox", "sh", "-c", "echo up; exec /bin/busybox sleep 3600"}

// lab is what machines are made of here: the same parts as a node uses, put
// together in the same order.
type lab struct {
	n        int
	bin, dir string
	rivals   string // where gVisor's programs are
	calls    int    // of a path in a turn
	// pods is how many idle containers are weighed together.
	pods int
	// grow bounds how long idle containers are started until memory is used up.
	grow       time.Duration
	log        io.Writer
	conditions conditions

	guest     *boot.Guest
	template  vm.TemplateSpec
	image     image.Image
	rehearsal *os.File // disk of a rehearsal
	made      int
}

func openLab(ctx context.Context, bin, kernel string, n int, machines bool, log io.Writer) (_ *lab, err error) {
	l := &lab{n: n, log: log, conditions: surroundings(ctx)}
	if l.bin, err = filepath.Abs(bin); err != nil {
		return nil, err
	}
	if l.dir, err = os.MkdirTemp("", "hauberk-bench-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	// The proxies measured run as other users and look for their files here.
	if err := os.Chmod(l.dir, 0o711); err != nil {
		return nil, err
	}
	if !machines {
		return l, nil
	}
	if l.image, err = pack(ctx, filepath.Join(l.dir, "images")); err != nil {
		return nil, err
	}
	if l.rehearsal, err = rehearsal(ctx, filepath.Join(l.dir, "images")); err != nil {
		return nil, err
	}
	return l, l.prepare(ctx, kernel)
}

// prepare makes what guests boot from, as a node does, and the template.
func (l *lab) prepare(ctx context.Context, kernel string) (err error) {
	l.guest, err = boot.Open(ctx, boot.Config{
		State: l.dir, Run: filepath.Join(l.dir, "vm"), User: firstUser,
		Kernel: kernel, Agent: filepath.Join(l.bin, "hauberk-guest"), Link: bpf.Link,
	})
	if err != nil {
		return err
	}
	l.template = l.guest.Template(guestMiB, 1, "bench.local")
	l.conditions.GuestKernel, l.conditions.GuestMiB = l.guest.Kernel.Release, guestMiB
	l.conditions.Accelerator = string(l.guest.Accelerator)
	if l.conditions.QEMU, err = qemu.Version(ctx); err != nil {
		return err
	}
	_, err = l.guest.Driver.Template(ctx, l.template, func(line string) { fmt.Fprintln(l.log, "bench:", line) })
	return err
}

// say tells how far a run is.
func (l *lab) say(format string, a ...any) {
	fmt.Fprintf(l.log, "bench: %s "+format+"\n", append([]any{time.Now().UTC().Format("15:04:05")}, a...)...)
}

func (l *lab) Close() error {
	var err error
	if l.rehearsal != nil {
		err = l.rehearsal.Close()
	}
	if l.guest != nil {
		err = errors.Join(err, l.guest.Close())
	}
	return errors.Join(err, os.RemoveAll(l.dir))
}

// pack makes an image that holds a static busybox and nothing else.
func pack(ctx context.Context, dir string) (image.Image, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return image.Image{}, fmt.Errorf("read the workload: %w: apt-get install busybox-static", err)
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	var errs []error
	for _, name := range []string{"./", "./bin/", "./etc/", "./proc/", "./sys/", "./dev/", "./tmp/"} {
		errs = append(errs, w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}))
	}
	errs = append(errs, w.WriteHeader(&tar.Header{Name: "./bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program))}))
	_, err = w.Write(program)
	if err := errors.Join(append(errs, err, w.Close())...); err != nil {
		return image.Image{}, err
	}
	return image.Pack(ctx, &archive, dir)
}

// rehearsal packs and opens the disk that machines of a pool rehearse with.
func rehearsal(ctx context.Context, dir string) (*os.File, error) {
	archive, err := pool.Archive()
	if err != nil {
		return nil, err
	}
	img, err := image.Pack(ctx, bytes.NewReader(archive), dir)
	if err != nil {
		return nil, err
	}
	return os.Open(img.Path)
}

// lap is one step of a launch. spent is the processor time of the machine: it
// says what the step costs when neighbours make everything take longer.
type lap struct {
	step        string
	took, spent time.Duration
}

// sandbox is a machine with a workload in it.
type sandbox struct {
	ns      *netns.Namespace
	tap     *os.File
	machine *vm.Machine
	channel *vm.Channel
	process *vm.Process

	id      string
	address netip.Addr
	laps    []lap
	spent   time.Duration // of the machine's processor time, since the clock started
	before  time.Duration
}

// step is one step of a launch.
type step struct {
	name string
	run  func() error
}

// steps runs some and notes how long each took.
func (s *sandbox) steps(all ...step) error {
	for _, one := range all {
		began := time.Now()
		if err := one.run(); err != nil {
			return fmt.Errorf("launch %s: %s: %w", s.id, one.name, err)
		}
		took, before := time.Since(began), s.spent
		if s.machine != nil {
			s.spent = processor(s.machine.PID()) - s.before
		}
		s.laps = append(s.laps, lap{one.name, took, s.spent - before})
	}
	return nil
}

// processor is the processor time that the threads of a process have had; of
// those that have ended nothing is known.
func processor(pid int) (sum time.Duration) {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid)) // the pattern is good
	for _, name := range threads {
		var ns int64
		if _, err := fmt.Sscan(text(name), &ns); err == nil {
			sum += time.Duration(ns)
		}
	}
	return sum
}

// total is from the machine's start to the workload's first word.
func (s *sandbox) total() (d time.Duration) {
	for _, l := range s.laps {
		if l.step != stepNetwork {
			d += l.took
		}
	}
	return d
}

func (s *sandbox) user() uint32 {
	b := s.address.As4()
	return firstUser + uint32(b[2])<<8 + uint32(b[3])
}

func (s *sandbox) mac() net.HardwareAddr {
	b := s.address.As4()
	return net.HardwareAddr{0x02, 0x48, b[0], b[1], b[2], b[3]}
}

// stepNetwork is done before the clock of a launch starts, as on a node.
const stepNetwork = "namespace, tap and its rules"

// how a machine is started.
type how string

const (
	fromKernel   how = "cold"
	fromTemplate how = "clone"
	fromPool     how = "pool"
)

// launch starts a sandbox as node's sandbox.Launch does.
func (l *lab) launch(ctx context.Context, h how) (s *sandbox, err error) {
	l.made++
	s = &sandbox{id: fmt.Sprintf("bench-%d", l.made), address: netip.AddrFrom4([4]byte{10, 88, byte(l.made >> 8), byte(l.made)})}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop(context.WithoutCancel(ctx)))
		}
	}()
	var spare *vm.Machine
	if h == fromPool { // made before the clock starts
		if spare, err = l.spare(ctx, s); err != nil {
			return s, err
		}
		s.machine = spare // to be ended
		s.before = processor(spare.PID())
	}
	err = s.steps(step{stepNetwork, func() (err error) {
		if s.ns, err = netns.Create(filepath.Join(l.dir, "netns"), s.id); err != nil {
			return err
		}
		g := netns.Guest{Address: s.address, MAC: s.mac(), Owner: int(s.user())}
		if spare != nil {
			return s.ns.Adopt(spare.Tap(), g)
		}
		s.tap, err = s.ns.Tap(g)
		return err
	}})
	if err == nil {
		err = l.machine(ctx, s, h)
	}
	if err == nil {
		err = s.own(ctx)
	}
	if err == nil {
		err = s.fill(ctx)
	}
	return s, err
}

// spare makes a machine as a pool does.
func (l *lab) spare(ctx context.Context, s *sandbox) (*vm.Machine, error) {
	m, err := l.guest.Clone(ctx, vm.Spec{ID: "spare-" + s.id, Spare: true, Template: l.template, UID: s.user(), GID: s.user()}, nil)
	if err != nil {
		return nil, err
	}
	if err := pool.Ready(ctx, m, pool.Rehearsal{Disk: l.rehearsal, Policy: baseline}.Prepare); err != nil {
		return nil, errors.Join(err, m.Kill(context.WithoutCancel(ctx)))
	}
	return m, nil
}

// baseline puts the policy in force that every sandbox begins with.
func baseline(ctx context.Context, c *vm.Channel) error {
	p, err := guard.Compile(wire.Guard{Generation: 1}, guard.CompileFacts{Gateway: netns.Gateway})
	if err == nil {
		_, err = c.GuardPolicy(ctx, p.Generation, p.Blob)
	}
	return err
}

// machine starts the machine and opens the channel.
func (l *lab) machine(ctx context.Context, s *sandbox, h how) error {
	root, err := os.Open(l.image.Path)
	if err != nil {
		return err
	}
	defer root.Close()
	spec := vm.Spec{
		ID: s.id, Template: l.template, UID: s.user(), GID: s.user(),
		Disks:    []vm.Disk{{File: root, Slot: rootSlot}},
		Networks: []vm.Network{{Tap: s.tap}},
	}
	return s.steps(
		step{"image verified", func() error { return image.Verify(l.image.Path, l.image.ErofsSHA256) }},
		step{"machine runs", func() (err error) {
			switch h {
			case fromKernel:
				s.machine, err = l.guest.Driver.Boot(ctx, spec)
			case fromTemplate:
				s.machine, err = l.guest.Clone(ctx, spec, nil)
			case fromPool:
				err = errors.Join(s.machine.Become(filepath.Join(l.dir, "vm"), s.id),
					s.machine.Attach(ctx, spec.Disks[0]), s.machine.Resume(ctx))
			}
			return err
		}},
		step{"agent answers", func() error {
			c, hello, err := s.machine.Channel(ctx, nil)
			if err != nil {
				return err
			}
			s.channel = c
			if hello.Guard != guestproto.GuardAttached {
				return fmt.Errorf("the Guard is not attached: %q", hello.GuardText)
			}
			return nil
		}},
	)
}

// own makes the machine one of its own, with its disk and its network.
func (s *sandbox) own(ctx context.Context) error {
	return s.steps(
		step{"entropy, clock, names", func() error { return s.channel.Reseed(ctx, vm.NewSeed(s.id)) }},
		step{"root mounted", func() error {
			_, err := s.channel.MountRoot(ctx, guestproto.MountRoot{Serial: string(rootSlot), UpperBytes: guestMiB << 18})
			return err
		}},
		step{"network set", func() error {
			return s.channel.Network(ctx, guestproto.SoleInterface(guestproto.DeviceMAC(0), [6]byte(s.mac()), s.address.As4(), netns.Gateway.As4(), 1500))
		}},
	)
}

// fill puts the policy in force and lets the workload run.
func (s *sandbox) fill(ctx context.Context) error {
	var c guard.Compiled
	return s.steps(
		step{"policy compiled", func() (err error) {
			c, err = guard.Compile(wire.Guard{Generation: 1}, guard.CompileFacts{Gateway: netns.Gateway})
			return err
		}},
		step{"policy in force", func() error {
			_, err := s.channel.GuardPolicy(ctx, c.Generation, c.Blob)
			return err
		}},
		step{"Guard heard", func() error {
			_, err := s.channel.GuardStatus(ctx)
			return err
		}},
		step{"container made", func() (err error) {
			s.process, err = s.channel.Create(ctx, guestproto.Create{Hostname: s.id, Resources: guestproto.Resources{PidsMax: 4096}, KeepLog: true,
				Files:   []guestproto.File{{Path: "/etc/hostname", Mode: 0o644, Data: []byte(s.id + "\n")}},
				Program: guestproto.Program{Args: workload, Env: []string{"PATH=/bin"}}})
			return err
		}},
		step{"first process started", func() error { return s.process.Start(ctx) }},
		step{"workload's first word", func() error {
			_, err := io.ReadFull(s.process.Stdout(), make([]byte, 1))
			return err
		}},
	)
}

// stop ends the sandbox, however far it came.
func (s *sandbox) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var errs []error
	if s.machine != nil {
		errs = append(errs, s.machine.Kill(ctx))
	}
	if s.channel != nil {
		errs = append(errs, s.channel.Close())
	}
	if s.tap != nil {
		errs = append(errs, s.tap.Close())
	}
	if s.ns != nil {
		errs = append(errs, s.ns.Delete())
	}
	return errors.Join(errs...)
}
