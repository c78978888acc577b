package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"hauberk.dev/api/guestproto"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/evidence"
	"hauberk.dev/guard"
	"hauberk.dev/image"
	"hauberk.dev/internal/netns"
	"hauberk.dev/plan"
	"hauberk.dev/vm"
)

const (
	rootSlot = vm.Slot("r0")
	guestMTU = 1500
	// upperShare of the guest's memory may be written to the root file system.
	upperShare = 4
	pidsMax    = 4096
	// uidBase is the first of the users that machines run as; the low bits of
	// the guest's address make it one user per sandbox.
	uidBase = 0x48420000
	// agentTime bounds the first answer of a guest's agent.
	agentTime = 20 * time.Second
)

// sandbox is a body made of a virtual machine.
type sandbox struct {
	g  *guests
	id string

	exited chan int
	died   chan struct{}

	mu      sync.Mutex
	ns      *netns.Namespace
	tap     *os.File
	machine *vm.Machine
	channel *vm.Channel
	process *vm.Process
	console *console
	policy  guard.Compiled
	before  guard.Compiled // in force until policy was
	unsure  guard.Compiled // sent, and nobody knows whether it arrived
	unheld  []string       // of the policy, in words
	from    wire.Instance  // whose image it runs
	env     []string
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	trail trailOf

	// Of heartbeats, whose caller is one at a time.
	beats, agentKiB int
}

func (s *sandbox) Exited() <-chan int    { return s.exited }
func (s *sandbox) Died() <-chan struct{} { return s.died }
func (s *sandbox) Console() *console {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.console
}

// Launch checks the ticket, makes image, network and machine, arms the Guard
// and only then lets the workload's first process run.
func (s *sandbox) Launch(ctx context.Context, i wire.Instance) (launched, error) {
	if err := s.checkTicket(i); err != nil {
		return launched{}, &RefusalError{"TicketInvalid", err}
	}
	img, err := s.g.pull(ctx, i)
	if err != nil {
		return launched{}, fmt.Errorf("pull image: %w", err)
	}
	address, err := guestAddress(i.Address)
	if err != nil {
		return launched{}, &RefusalError{"AddressInvalid", err}
	}
	if err := errors.Join(s.openConsole(), s.openTrail(i)); err != nil {
		return launched{}, err
	}
	spare := s.g.takeSpare(i)
	if err := s.network(address, spare); err != nil {
		return launched{}, err
	}
	began := time.Now()
	s.from = i
	if err := s.boot(ctx, i, img, address, spare); err != nil {
		return launched{}, err
	}
	if err := s.Enforce(ctx, i.Guard); err != nil {
		return launched{}, &RefusalError{"PolicyRefused", err}
	}
	if err := s.hear(ctx); err != nil {
		return launched{}, err
	}
	if err := s.g.n.mesh.add(ctx, s.meshSandbox(i, address), s.ns); err != nil {
		return launched{}, fmt.Errorf("connect to the mesh: %w", err)
	}
	if err := s.spawn(ctx, i, img); err != nil {
		return launched{}, err
	}
	return launched{process: s.process.ID(), env: s.env, ready: time.Since(began)}, nil
}

// checkTicket verifies the permission to launch, field by field.
func (s *sandbox) checkTicket(i wire.Instance) error {
	t, err := evidence.VerifyTicket(i.Ticket, s.g.n.now(), s.g.n.ticketKeys())
	if err != nil {
		return err
	}
	for _, f := range []struct{ name, got, want string }{
		{"instance", t.Instance, i.ID}, {"namespace", t.Namespace, i.Namespace}, {"workload", t.Workload, i.Workload},
		{"digest", t.Digest, i.Digest}, {"repository", t.Repository, i.Repository}, {"node", t.Node, s.g.n.conf.Name},
		{"sandboxClass", t.SandboxClass, i.Spec.Sandbox.Class},
	} {
		if f.got != f.want {
			return fmt.Errorf("ticket of %s: %s is %q, the order says %q", i.ID, f.name, f.got, f.want)
		}
	}
	if t.Measurement != s.g.measurement {
		return fmt.Errorf("ticket of %s: it demands another guest than this node boots: ticket %+v, node %+v", i.ID, t.Measurement, s.g.measurement)
	}
	return nil
}

// guestAddress reads the address of a guest. It makes the guest's user and
// hardware address too, so it must be one of a guest.
func guestAddress(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	if err != nil {
		return a, fmt.Errorf("address %q: %w", text, err)
	}
	if !plan.Guests.Contains(a) {
		return a, fmt.Errorf("address %s is not in %s, where guests are", a, plan.Guests)
	}
	return a, nil
}

func guestMAC(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x02, 0x48, b[0], b[1], b[2], b[3]}
}

// fencedGuest is who a namespace is made for.
func fencedGuest(a netip.Addr) netns.Guest {
	return netns.Guest{Address: a, MAC: guestMAC(a), Owner: machineUser(a)}
}

func machineUser(a netip.Addr) int {
	b := a.As4()
	return uidBase + int(b[2])<<8 + int(b[3])
}

func (s *sandbox) openConsole() error {
	c, err := openConsole(filepath.Join(s.g.consoles, s.id+".log"))
	s.mu.Lock()
	s.console = c
	s.mu.Unlock()
	return err
}

// network makes the instance's namespace, with a tap for a clone, or that of a
// spare machine, which the sandbox owns from then on.
func (s *sandbox) network(address netip.Addr, spare *vm.Machine) (err error) {
	if spare != nil {
		s.own(spare)
	}
	if s.ns, err = netns.Create(s.g.namespaces, s.id); err != nil {
		return err
	}
	g := fencedGuest(address)
	if spare != nil {
		return s.ns.Adopt(spare.Tap(), g)
	}
	s.tap, err = s.ns.Tap(g)
	return err
}

// boot clones the template, or takes a spare clone of it, and makes it a machine
// of its own. From there on both are alike.
func (s *sandbox) boot(ctx context.Context, i wire.Instance, img image.Image, address netip.Addr, m *vm.Machine) (err error) {
	if m != nil {
		err = s.g.give(ctx, m, i, img)
	} else if m, err = s.g.clone(ctx, i, img, s.tap, uint32(machineUser(address))); err == nil {
		s.own(m)
	}
	if err != nil {
		return err
	}
	if err := s.connect(ctx, m); err != nil {
		return fmt.Errorf("%w; the guest printed: %s", err, m.Console())
	}
	if err := s.channel.Reseed(ctx, vm.NewSeed(i.ID)); err != nil {
		return err
	}
	upper := uint64(i.Spec.Sandbox.MemoryMiB) << 20 / upperShare
	if _, err := s.channel.MountRoot(ctx, guestproto.MountRoot{Serial: string(rootSlot), UpperBytes: upper}); err != nil {
		return err
	}
	return s.channel.Network(ctx, guestproto.SoleInterface(guestproto.DeviceMAC(0), [6]byte(guestMAC(address)), address.As4(), netns.Gateway.As4(), guestMTU))
}

// own takes a machine and watches it.
func (s *sandbox) own(m *vm.Machine) {
	s.mu.Lock()
	s.machine = m
	s.mu.Unlock()
	s.wg.Go(func() {
		<-m.Done()
		close(s.died)
	})
}

// connect opens the channel to the agent. A guest whose Guard is not attached
// runs nothing.
func (s *sandbox) connect(ctx context.Context, m *vm.Machine) error {
	ctx, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	c, hello, err := m.Channel(ctx, s.record)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.channel = c
	s.mu.Unlock()
	if hello.Guard != guestproto.GuardAttached && !s.g.n.conf.WithoutGuard {
		return fmt.Errorf("boot %s: the Guard is not attached: %s", s.id, hello.GuardText)
	}
	return nil
}

// Enforce compiles the policy for this guest and swaps it in whole.
func (s *sandbox) Enforce(ctx context.Context, g wire.Guard) error {
	if s.g.n.conf.WithoutGuard {
		return nil
	}
	if g.Kernel != "" && g.Kernel != s.g.measurement.Kernel {
		return fmt.Errorf("policy generation %d was checked for guests with kernel %.12s, those of this node have %.12s: refused", g.Generation, g.Kernel, s.g.measurement.Kernel)
	}
	c, err := guard.Compile(g, guard.CompileFacts{Gateway: netns.Gateway, FilesWith: func(digests []string) (map[string][]string, error) {
		img, err := s.g.pull(ctx, s.from)
		if err != nil {
			return nil, err
		}
		return image.FilesWith(ctx, img.Path, digests)
	}})
	if err != nil {
		return err
	}
	s.mu.Lock()
	before := s.policy
	s.before, s.policy = before, c // first, so that no event of the new policy is unknown
	s.mu.Unlock()
	s.learn(c)
	reply, err := s.channel.GuardPolicy(ctx, c.Generation, c.Blob)
	var applied guard.Applied
	if err == nil {
		applied, err = c.Applied(reply)
	}
	if err != nil {
		s.mu.Lock()
		s.policy, s.unsure = before, c
		s.mu.Unlock()
		s.learn(before)
		return fmt.Errorf("put policy generation %d in force: %w", g.Generation, err)
	}
	unheld := slices.Clone(c.Unsupported)
	for _, text := range c.Unsupported {
		s.g.n.slog.Warn("policy cannot be held as written; more is refused instead", "instance", s.id, "rule", text)
	}
	for _, l := range applied.Lost {
		s.g.n.slog.Warn("rule is not held", "instance", s.id, "rule", c.Why(l))
		unheld = append(unheld, c.Why(l))
	}
	s.mu.Lock()
	s.unheld = unheld[:min(len(unheld), maxUnheld)]
	s.mu.Unlock()
	return nil
}

// maxUnheld bounds how much of what is not held a node tells.
const maxUnheld = 32

// Unsupported says what of the policy in force is not held as written.
func (s *sandbox) Unsupported() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unheld
}

// compare finds what a Guard says it has and was not sent. Before the first
// policy there is nothing to compare.
func (s *sandbox) compare(st guard.Status) error {
	s.mu.Lock()
	if s.unsure.Generation != 0 && st.Generation == s.unsure.Generation && st.Digest == s.unsure.Digest {
		s.policy = s.unsure // its answer was lost
	}
	sent := s.policy
	s.mu.Unlock()
	for _, tag := range st.Tags {
		if !slices.ContainsFunc(s.g.manifest.Programs, func(p guard.Program) bool { return p.Tag == tag }) {
			return &MismatchError{"program", tag, "any of the bundle"}
		}
	}
	switch {
	case sent.Generation == 0:
	case st.Generation != sent.Generation:
		return &MismatchError{"policy generation", strconv.FormatUint(st.Generation, 10), strconv.FormatUint(sent.Generation, 10)}
	case st.Digest != sent.Digest:
		return &MismatchError{"policy", orNone(st.Digest), sent.Digest}
	}
	return nil
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// weighEvery is how many heartbeats pass until the agent is asked what it takes.
const weighEvery = 10

func (s *sandbox) Heartbeat(ctx context.Context) (wire.GuardHeartbeat, error) {
	if s.g.n.conf.WithoutGuard {
		return wire.GuardHeartbeat{At: time.Now().UTC()}, s.channel.Ping(ctx)
	}
	raw, err := s.channel.GuardStatus(ctx)
	if err != nil {
		return wire.GuardHeartbeat{}, err
	}
	st, err := guard.DecodeStatus(raw)
	if err == nil {
		s.tally(st.Tallies)
		s.tellLearnt()
		err = s.compare(st)
	}
	if s.beats++; s.beats%weighEvery == 1 {
		if used, err := s.channel.Stats(ctx); err == nil { // the next time will do
			s.agentKiB = int(used.AgentPrivate >> 10)
		}
	}
	return wire.GuardHeartbeat{AgentKiB: s.agentKiB, At: time.Now().UTC(), Generation: st.Generation, Digest: st.Digest,
		Programs: st.Programs, Sequence: st.Sequence, Lost: st.Lost, AuditSequence: st.AuditSequence, AuditLost: st.AuditLost}, err
}

// hear takes the first heartbeat, without which there is no identity.
func (s *sandbox) hear(ctx context.Context) error {
	h, err := s.Heartbeat(ctx)
	if err != nil {
		return fmt.Errorf("hear from the Guard: %w", err)
	}
	if a, ok := s.g.n.find(s.id); ok {
		a.heard(h)
	}
	return nil
}

// spawn makes the container and starts its first process.
func (s *sandbox) spawn(ctx context.Context, i wire.Instance, img image.Image) error {
	args := i.Spec.Command
	if len(args) == 0 {
		args = img.Config.Entrypoint
		if len(i.Spec.Args) == 0 {
			args = append(args[:len(args):len(args)], img.Config.Cmd...)
		}
	}
	args = append(args[:len(args):len(args)], i.Spec.Args...)
	if len(args) == 0 {
		return &RefusalError{"NoCommand", errors.New("neither the image nor spec.command says what to run")}
	}
	s.env = environment(img.Config.Env, i.Spec.Env)
	p, err := s.channel.Create(ctx, guestproto.Create{
		Hostname: i.ID, Resources: guestproto.Resources{PidsMax: pidsMax}, KeepLog: true, Files: files(i),
		Program: guestproto.Program{Args: args, Env: s.env, Cwd: img.Config.WorkingDir,
			UID: img.Config.UID, GID: img.Config.GID, Groups: img.Config.Groups},
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.process = p
	s.mu.Unlock()
	s.watch()
	return p.Start(ctx)
}

func environment(img []string, own []spec.EnvVar) []string {
	env := append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, img...)
	for _, v := range own {
		env = append(env, v.Name+"="+v.Value)
	}
	return env
}

// files are what every container finds in /etc, whatever its image has.
func files(i wire.Instance) []guestproto.File {
	resolv := fmt.Sprintf("nameserver %s\nsearch %s.svc.cluster.local svc.cluster.local\noptions ndots:2 timeout:2\n", netns.Gateway, i.Namespace)
	hosts := fmt.Sprintf("127.0.0.1 localhost\n%s %s\n", i.Address, i.ID)
	return []guestproto.File{
		{Path: "/etc/resolv.conf", Mode: 0o644, Data: []byte(resolv)},
		{Path: "/etc/hosts", Mode: 0o644, Data: []byte(hosts)},
		{Path: "/etc/hostname", Mode: 0o644, Data: []byte(i.ID + "\n")},
	}
}

// watch keeps the workload's output and waits for its end.
func (s *sandbox) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	for _, r := range []io.Reader{s.process.Stdout(), s.process.Stderr()} {
		s.wg.Go(func() {
			io.Copy(s.console, r) // ends with the stream or the channel
		})
	}
	s.wg.Go(func() {
		if st, err := s.process.Wait(ctx); err == nil {
			s.exited <- st.Code
		}
	})
}

// Adopt takes over a machine that an earlier process of this node started.
func (s *sandbox) Adopt(ctx context.Context, e entry) (err error) {
	address, err := guestAddress(e.Instance.Address)
	if err != nil {
		return fmt.Errorf("adopt %s: %w", s.id, err)
	}
	if s.ns, err = netns.Open(s.g.namespaces, s.id); err != nil {
		return fmt.Errorf("adopt: %w", err)
	}
	m, err := s.g.adopt(ctx, s.id)
	if err != nil {
		return err
	}
	if err := errors.Join(s.openConsole(), s.openTrail(e.Instance)); err != nil {
		return err
	}
	s.own(m)
	s.from = e.Instance
	if e.Contained {
		return m.Pause(ctx)
	}
	if err := s.connect(ctx, m); err != nil {
		return err
	}
	processes, err := s.channel.Processes(ctx)
	if err != nil {
		return err
	}
	for _, p := range processes {
		if p.Process != e.Process {
			continue
		}
		own, err := s.channel.Attach(ctx, p)
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.process, s.env = own, e.Env
		s.mu.Unlock()
		s.watch()
	}
	if s.process == nil {
		return fmt.Errorf("adopt %s: its process %d is gone", s.id, e.Process)
	}
	if err := s.Enforce(ctx, e.Instance.Guard); err != nil {
		return err
	}
	if err := s.hear(ctx); err != nil {
		return err
	}
	return s.g.n.mesh.adopt(ctx, s.meshSandbox(e.Instance, address), s.ns)
}

func (s *sandbox) meshSandbox(i wire.Instance, address netip.Addr) plan.Sandbox {
	return plan.Sandbox{Instance: i.ID, Address: address, Identity: i.Identity, Service: i.Workload, Namespace: i.Namespace}
}

func (s *sandbox) exec(ctx context.Context, in wire.Exec) (*vm.Process, error) {
	s.mu.Lock()
	c, p := s.channel, s.process
	s.mu.Unlock()
	if c == nil || p == nil {
		return nil, fmt.Errorf("exec in %s: it is not running yet", s.id)
	}
	return c.Exec(ctx, p, guestproto.Program{Args: in.Args, Env: slices.Concat(s.env, in.Env),
		TTY: in.TTY, Rows: in.Rows, Cols: in.Cols})
}

// Freeze stops the machine's processors.
func (s *sandbox) Freeze(ctx context.Context) error {
	s.mu.Lock()
	m := s.machine
	s.mu.Unlock()
	if m == nil {
		return nil // it never ran
	}
	err := m.Pause(ctx)
	select {
	case <-m.Done():
		return nil // and never will again
	default:
		return err
	}
}

// Stop ends everything in reverse order of making.
func (s *sandbox) Stop(ctx context.Context, grace time.Duration) error {
	var errs []error
	if s.process != nil && grace > 0 {
		polite, cancel := context.WithTimeout(ctx, grace)
		if err := s.process.Signal(polite, syscall.SIGTERM); err == nil {
			s.process.Wait(polite) // its end is polite, its refusal is not an error
		}
		cancel()
	}
	if s.cancel != nil {
		s.cancel()
	}
	if s.machine != nil {
		if err := s.machine.Kill(ctx); err != nil {
			return err // its network stays while it may live
		}
	}
	if s.channel != nil {
		s.channel.Close()
	}
	s.wg.Wait()
	if s.tap != nil {
		s.tap.Close()
	}
	if s.ns != nil {
		errs = append(errs, s.ns.Delete())
	}
	if s.console != nil {
		errs = append(errs, s.console.close())
	}
	errs = append(errs, s.closeTrail())
	return errors.Join(errs...)
}
