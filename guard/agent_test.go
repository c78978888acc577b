package guard

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/api/spec"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/vm"
)

// sandbox is a machine with the real agent.
type sandbox struct {
	c      *vm.Channel
	disks  [2]string // of the machine, with the serials w0 and w1
	mu     sync.Mutex
	events []Event
	shared string // what the guest has as the share "share"
}

// guest is what a machine with the real agent is made of.
type guest struct {
	image  string
	disks  []string // with the serials w0, w1 ...
	memory int      // MiB
	open   bool     // without the Guard
	trust  *Trust   // whose policies it takes
	share  string   // a folder of this machine; none: nothing is shared
}

func startSandbox(t *testing.T) *sandbox {
	t.Helper()
	m, err := prepare()
	if err != nil {
		t.Fatal(err)
	}
	image := buildImage(t, m, imageFiles(), nil)
	for _, d := range []string{image + "0", image + "1"} {
		if err := os.WriteFile(d, make([]byte, 8<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", image+"0").CombinedOutput(); err != nil {
		t.Fatalf("make file system: %v\n%s", err, out)
	}
	shared := t.TempDir()
	s := guest{image: image, disks: []string{image + "0", image + "1"}, memory: 256, share: shared}.start(t)
	s.disks, s.shared = [2]string{image + "0", image + "1"}, shared
	return s
}

// withAgent is what the machines with the real agent boot, made once.
var withAgent = sync.OnceValues(func() (*kernel.Artefacts, error) {
	m, err := prepare()
	if err != nil {
		return nil, err
	}
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(m.dir, "agent"), "hauberk.dev/cmd/hauberk-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build agent: %w\n%s", err, out)
	}
	found, err := kernel.Find("/", flavour())
	if err != nil {
		return nil, err
	}
	return kernel.Prepare(m.dir+"/cache", found, "virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "erofs", "overlay", "virtiofs")
})

// start boots the machine, and ends it with the test.
func (g guest) start(t *testing.T) *sandbox {
	t.Helper()
	m, err := prepare()
	if err != nil {
		t.Fatal(err)
	}
	k, err := withAgent()
	if err != nil {
		t.Fatal(err)
	}
	bundle, state := m.bundle, guestproto.GuardAttached
	if g.open {
		bundle, state = nil, guestproto.GuardAbsent
	}
	if g.trust != nil {
		if bundle, err = g.trust.Behind(bundle); err != nil {
			t.Fatal(err)
		}
	}
	initrd, err := k.Initrd(filepath.Join(m.dir, "agent"), bundle)
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "agent")
	args := []string{
		"-M", "microvm,acpi=on,pcie=on", "-accel", "tcg,tb-size=64", "-cpu", "max", "-smp", "1", "-m", fmt.Sprint(g.memory),
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio",
		"-kernel", k.Kernel, "-initrd", initrd.Path,
		"-append", "console=ttyS0 quiet reboot=t panic=-1 lsm=lockdown,capability,landlock,yama,bpf tsc_early_khz=" + tscKHz(t) +
			" cryptomgr.notests random.trust_cpu=on audit=0 no_timer_check rcupdate.rcu_expedited=1 8250.nr_uarts=1",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=ag,path=" + socket + ",server=on,wait=off",
		"-device", "virtserialport,chardev=ag,name=agent.0",
		"-drive", "if=none,id=root,format=raw,read-only=on,file=" + g.image, "-device", "virtio-blk-pci,drive=root,serial=root0",
	}
	for i, d := range g.disks {
		args = append(args, "-drive", fmt.Sprintf("if=none,id=d%d,format=raw,file=%s", i, d), "-device", fmt.Sprintf("virtio-blk-pci,drive=d%d,serial=w%d", i, i))
	}
	if g.share != "" {
		args[1] += ",memory-backend=mem"
		args = append(args, "-object", fmt.Sprintf("memory-backend-memfd,id=mem,size=%dM,share=on", g.memory),
			"-chardev", "socket,id=vfs,path="+serveShare(t, g.share), "-device", "vhost-user-fs-pci,chardev=vfs,tag=share")
	}
	qemu := exec.CommandContext(t.Context(), "qemu-system-x86_64", args...)
	var console bytes.Buffer
	qemu.Stdout, qemu.Stderr = &console, &console
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		qemu.Process.Kill()
		qemu.Wait()
		if t.Failed() {
			t.Logf("console:\n%s", &console)
		}
	})
	s := &sandbox{}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c, hello, err := vm.Dial(ctx, socket, s.hear(t))
	if err != nil {
		t.Fatal(err)
	}
	if hello.Guard != state {
		t.Fatalf("guard is in state %d: %s", hello.Guard, hello.GuardText)
	}
	t.Cleanup(func() { c.Close() })
	s.c = c
	return s
}

// serveShare serves a folder to a machine, and gives the socket of it.
func serveShare(t *testing.T, folder string) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "share")
	server := exec.CommandContext(t.Context(), "/usr/lib/qemu/virtiofsd", "--socket-path="+socket, "-o", "source="+folder+",sandbox=chroot,cache=auto,log_level=err")
	var said bytes.Buffer
	server.Stdout, server.Stderr = &said, &said
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Process.Kill()
		server.Wait()
		if t.Failed() {
			t.Logf("file server:\n%s", &said)
		}
	})
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return socket
		}
	}
	t.Fatal("the file server makes no socket")
	return ""
}

func (s *sandbox) hear(t *testing.T) func([]byte) {
	return func(record []byte) {
		e, err := DecodeEvents(record)
		if err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.events = append(s.events, e)
	}
}

// told waits for an event.
func (s *sandbox) told(t *testing.T, op Op, verdict Verdict) Event {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		s.mu.Lock()
		for _, e := range s.events {
			if e.Op == op && e.Verdict == verdict {
				s.mu.Unlock()
				return e
			}
		}
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t.Fatalf("no event of operation %d, verdict %s among %v", op, verdict, s.events)
	return Event{}
}

// The agent of this tree starts its containers under the Guard, which holds
// them to a policy that may change while they run.
func TestAgentRunsContainersUnderGuard(t *testing.T) {
	s := startSandbox(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute+time.Duration(floodExecs(t))*20*time.Millisecond)
	defer cancel()
	if _, err := s.c.MountRoot(ctx, guestproto.MountRoot{Serial: "root0"}); err != nil {
		t.Fatal(err)
	}
	boot, err := s.c.Stats(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("agent before it ran anything: %d kB private", boot.AgentPrivate>>10)
	create := guestproto.Create{
		Hostname: "box", Files: []guestproto.File{{Path: "/etc/hosts", Mode: 0o644, Data: []byte("127.0.0.1 box\n")}},
		Program: guestproto.Program{Args: []string{"/attack", "serve"}, Env: []string{"PATH=/bin"}},
	}
	first, err := s.c.Create(ctx, create)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Start(ctx); err == nil {
		t.Error("a container started before there was a policy")
	}
	s.told(t, OpExec, Denied)

	policy := strict()
	policy.Files = append(policy.Files, spec.GuardFile{Path: "/etc/hosts", Deny: "w"})
	compiled := compileForTest(t, 1, policy)
	reply, err := s.c.GuardPolicy(ctx, 1, compiled.Blob)
	if err != nil {
		t.Fatal(err)
	}
	applied, err := DecodeApplied(reply)
	if err != nil || applied.Generation != 1 {
		t.Fatalf("%+v %v; want generation 1 in force", applied, err)
	}
	box, err := s.c.Create(ctx, create)
	if err != nil {
		t.Fatal(err)
	}
	if err := box.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for run, want := range map[string]int{
		"nothing": 0, "exec /bin/tool": 0, "write /tmp/file": 0, "drop /tmp/x": 10,
		// The agent replaced this file after the policy was in force.
		"write /etc/hosts": 10,
	} {
		if got := s.run(t, ctx, box, run); got != want {
			t.Errorf("%s: exit %d, want %d", run, got, want)
		}
	}
	e := s.told(t, OpWrite, Denied)
	if e.Path != "/etc/hosts" {
		t.Errorf("%s; want /etc/hosts named", e)
	}
	ran := s.told(t, OpStarted, Allowed)
	t.Log(ran)
	if ran.Exe != "/attack" || ran.Container == 0 || ran.Start == 0 || len(ran.Lineage) != 0 {
		t.Errorf("%+v; want /attack in a container, with nobody before it", ran)
	}
	s.hasLineage(t)
	s.flood(t, ctx, box)

	open := compileForTest(t, 2, spec.GuardPolicy{Exec: &spec.GuardExec{Origin: "any"}})
	if _, err := s.c.GuardPolicy(ctx, 2, open.Blob); err != nil {
		t.Fatal(err)
	}
	if got := s.run(t, ctx, box, "drop /tmp/y"); got != 0 {
		t.Errorf("drop under an open policy: exit %d, want 0", got)
	}
	if _, err := s.c.GuardPolicy(ctx, 1, compiled.Blob); err == nil {
		t.Error("an older generation was put in force")
	}
	status, err := s.c.GuardStatus(ctx)
	if err != nil {
		t.Fatal(err)
	}
	st, err := DecodeStatus(status)
	if err != nil || st.Generation != 2 || st.Digest != open.Digest || st.Programs < 40 {
		t.Errorf("status %+v %v; want generation 2, digest %s", st, err, open.Digest)
	}
	wantTags(t, st.Tags)
	s.volumes(t, ctx, 3)
	s.devices(t, ctx)
	s.remount(t, ctx, create, first, box)
	used, err := s.c.Stats(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("agent: %d kB resident, %d kB private", used.AgentResident>>10, used.AgentPrivate>>10)
}

// hasLineage looks for the tool that one of the attacks ran, and for the dropped
// program that another could not run, which its parent tried from a thread.
func (s *sandbox) hasLineage(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.events {
		if e.Op == OpStarted && e.Path == "/bin/tool" {
			if e.Exe != "/bin/tool" || e.Parent != "/attack" || len(e.Lineage) != 1 || e.Lineage[0].Name != "attack" || e.Lineage[0].PID != e.PPID {
				t.Errorf("%+v; want /bin/tool, of /attack", e)
			}
			return
		}
	}
	t.Error("no record of /bin/tool being run")
}

// wantTags compares the names the kernel gives to what is loaded with those that
// the host reads out of the bundle.
func wantTags(t *testing.T, got []string) {
	t.Helper()
	made, err := prepare()
	if err != nil {
		t.Fatal(err)
	}
	m, err := ReadManifest(made.bundle)
	if err != nil || len(got) == 0 || len(got) > len(m.Programs) {
		t.Fatalf("%d tags of %d programs, %v", len(got), len(m.Programs), err)
	}
	for _, tag := range got {
		if !slices.ContainsFunc(m.Programs, func(p Program) bool { return p.Tag == tag }) {
			t.Errorf("tag %s is of no program of the bundle", tag)
		}
	}
}

// remount gives the root up and mounts it again: the Guard must let go of it,
// and hold what comes after as it held what was before.
func (s *sandbox) remount(t *testing.T, ctx context.Context, create guestproto.Create, all ...*vm.Process) {
	t.Helper()
	policy := strict()
	policy.Files = append(policy.Files, spec.GuardFile{Path: "/etc/hosts", Deny: "w"})
	if _, err := s.c.GuardPolicy(ctx, 20, compileForTest(t, 20, policy).Blob); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for _, p := range all {
			_ = p.Signal(ctx, syscall.SIGKILL) // one never ran
			p.Discard()
			if _, err := p.Wait(ctx); err != nil {
				t.Fatal(err)
			}
			if err := p.Forget(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.c.UnmountRoot(ctx, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := s.c.MountRoot(ctx, guestproto.MountRoot{Serial: "root0"}); err != nil {
			t.Fatal(err)
		}
		box, err := s.c.Create(ctx, create)
		if err == nil {
			err = box.Start(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		for run, want := range map[string]int{"exec /bin/tool": 0, "write /tmp/file": 0, "drop /tmp/x": 10, "write /etc/hosts": 10} {
			if got := s.run(t, ctx, box, run); got != want {
				t.Errorf("on the root mounted again: %s: exit %d, want %d", run, got, want)
			}
		}
		all = []*vm.Process{box}
	}
}

// run runs an attack in the container and gives its exit code.
func (s *sandbox) run(t *testing.T, ctx context.Context, box *vm.Process, attack string) int {
	t.Helper()
	return s.runAs(t, ctx, box, guestproto.Program{}, attack)
}

func (s *sandbox) runAs(t *testing.T, ctx context.Context, box *vm.Process, as guestproto.Program, attack string) int {
	t.Helper()
	as.Args = append([]string{"/attack"}, strings.Fields(attack)...)
	p, err := s.c.Exec(ctx, box, as)
	if err != nil {
		t.Fatal(err)
	}
	out, _ := io.ReadAll(p.Stdout())
	status, err := p.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %s", attack, bytes.TrimSpace(out))
	return status.Code
}
