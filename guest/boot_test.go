package guest_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/vm"
)

// TestGuest boots one machine and asks everything of its agent.
func TestGuest(t *testing.T) {
	m := boot(t, nil)
	g := &guest{T: t, c: m.dial(t, nil), m: m}
	var kills atomic.Uint32
	g.c.OutOfMemory(func(_, n uint32) { kills.Store(n) })
	g.root = g.prepare()

	t.Run("namespaces", g.with(testNamespaces))
	t.Run("network", g.with(testNetwork))
	t.Run("confinement", g.with(testConfinement))
	t.Run("users", g.with(testUsers))
	t.Run("exit codes", g.with(testExitCodes))
	t.Run("stdio", g.with(testStdio))
	t.Run("terminal", g.with(testTerminal))
	t.Run("refusals", g.with(testRefusals))
	t.Run("signals", g.with(testSignals))
	t.Run("slow reader", g.with(testSlowReader))
	t.Run("limits", g.with(func(t *testing.T, g *guest) { testLimits(t, g, &kills) }))
	t.Run("stats", g.with(testStats))
	t.Run("programs", g.with(testPrograms))
	t.Run("containers", g.with(testContainers))
	t.Run("refused containers", g.with(testRefusedContainers))
	t.Run("pod namespaces", g.with(testPodNamespaces))
	t.Run("pid namespaces", g.with(testPIDNamespaces))
	t.Run("directories", g.with(testDirectories))
	t.Run("pushes", g.with(testPushes))
	t.Run("share", g.with(testShare))
	t.Run("disks", g.with(testDisks))
	t.Run("copies", g.with(testCopies))
	t.Run("control", g.with(testControl))
	t.Run("cycles", g.with(testCycles))
	t.Run("full table", g.with(testFullTable))
	t.Run("sessions", g.with(func(t *testing.T, g *guest) { testSessions(t, g, m) }))

	c := m.dial(t, nil)
	if err := c.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	select {
	case <-m.ended:
	case <-time.After(time.Minute):
		t.Error("the machine runs on after its shutdown")
	}
}

// guest is a machine with a root mounted and a container that sleeps in it.
type guest struct {
	*testing.T
	c    *vm.Channel
	root *vm.Process
	m    *machine
}

func (g *guest) with(f func(*testing.T, *guest)) func(*testing.T) {
	return func(t *testing.T) { f(t, &guest{t, g.c, g.root, g.m}) }
}

func (g *guest) ctx() context.Context {
	ctx, cancel := context.WithTimeout(g.Context(), 60*time.Second)
	g.Cleanup(cancel)
	return ctx
}

const (
	bootID    = "01234567-89ab-4cde-8f01-23456789abcd"
	machineID = "00112233445566778899aabbccddeeff"
)

// prepare does what follows a clone, and starts the container.
func (g *guest) prepare() *vm.Process {
	ctx := g.ctx()
	must := func(err error) {
		g.Helper()
		if err != nil {
			g.Fatal(err)
		}
	}
	must(g.c.Ping(ctx))
	must(g.c.Rescan(ctx))
	now := time.Date(2031, 5, 4, 3, 2, 1, 0, time.UTC)
	must(g.c.Reseed(ctx, guestproto.Reseed{
		UnixNanos: now.UnixNano(), MachineID: machineID, BootID: bootID, Hostname: "node",
	}))
	must(g.c.Network(ctx, guestproto.SoleInterface(nicMAC, nicMAC, [4]byte{10, 88, 1, 2}, [4]byte{169, 254, 1, 1}, 1400)))
	mounted, err := g.c.MountRoot(ctx, guestproto.MountRoot{Root: 3, Serial: "root0", UpperBytes: 32 << 20})
	must(err)
	if mounted.Overlay == 0 || mounted.Overlay == mounted.Lower {
		g.Errorf("root is on devices %+v", mounted)
	}
	begun := time.Now()
	p, err := g.c.Create(ctx, guestproto.Create{
		Root: 3, Hostname: "box", Resources: guestproto.Resources{PidsMax: 200}, KeepLog: true,
		Files: []guestproto.File{
			{Path: "/etc/resolv.conf", Mode: 0o644, Data: []byte("nameserver 169.254.1.1\n")},
			{Path: "/etc/deep/er/hosts", Mode: 0o600, Data: []byte("127.0.0.1 localhost\n")},
		},
		Program: guestproto.Program{Args: []string{"sh", "-c", "while read line; do echo got $line; done; exec sleep 100000"}},
	})
	must(err)
	created := time.Now()
	must(p.Start(ctx))
	g.Logf("create %v, start %v", created.Sub(begun), time.Since(created))
	return p
}

// run runs a command in the container to its end.
func (g *guest) run(args ...string) (stdout, stderr string, status vm.ExitStatus) {
	g.Helper()
	return g.runAs(guestproto.Program{Args: args})
}

func (g *guest) runAs(program guestproto.Program) (stdout, stderr string, status vm.ExitStatus) {
	g.Helper()
	p, err := g.c.Exec(g.ctx(), g.root, program)
	if err != nil {
		g.Fatal(err)
	}
	errs := make(chan string)
	go func() {
		b, _ := io.ReadAll(p.Stderr())
		errs <- string(b)
	}()
	b, err := io.ReadAll(p.Stdout())
	if err != nil {
		g.Fatal(err)
	}
	stderr = <-errs
	if status, err = p.Wait(g.ctx()); err != nil {
		g.Fatal(err)
	}
	return string(b), stderr, status
}

// wants checks that a shell command prints lines; each must be among them.
func (g *guest) wants(command string, lines ...string) {
	g.Helper()
	out, stderr, _ := g.run("sh", "-c", command)
	have := strings.Split(strings.TrimRight(out, "\n"), "\n")
	for i, l := range have {
		have[i] = strings.Join(strings.Fields(l), " ")
	}
	for _, want := range lines {
		if !slices.Contains(have, want) {
			g.Errorf("%s: got %q, %q; it lacks %q", command, out, stderr, want)
		}
	}
}

func testNamespaces(t *testing.T, g *guest) {
	g.wants("hostname", "box")
	g.wants("cat /proc/sys/kernel/random/boot_id", bootID)
	g.wants("cat /etc/machine-id", machineID)
	g.wants("cat /etc/resolv.conf", "nameserver 169.254.1.1")
	g.wants("stat -c %a /etc/deep/er/hosts", "600")
	g.wants("date -u +%Y-%m-%dT%H", "2031-05-04T03")
	g.wants("ip addr show dev eth0 | grep -o 'inet .*'", "inet 10.88.1.2/32 scope global eth0")
	g.wants("ip link show dev eth0 | grep -o 'mtu [0-9]*'", "mtu 1400")
	g.wants("ip route", "default via 169.254.1.1 dev eth0 onlink", "169.254.1.1 dev eth0 scope link")
	g.wants("ip addr show dev lo | grep -o 'inet .*'", "inet 127.0.0.1/8 scope host lo")
	g.wants("echo $$ > /dev/null; cat /proc/1/comm", "sh") // the container's own PID 1
	g.wants("ls /sys/fs/cgroup | grep ^pids.max", "pids.max")
	g.wants("cat /proc/self/cgroup", "0::/")
	out, _, _ := g.run("ps", "-o", "pid,args")
	if strings.Contains(out, "init") || strings.Count(out, "\n") > 4 {
		t.Errorf("the container sees what is not its own:\n%s", out)
	}
}

func testConfinement(t *testing.T, g *guest) {
	g.wants("grep -E '^(NoNewPrivs|Seccomp|CapBnd|CapEff|CapInh|CapAmb):' /proc/self/status",
		"NoNewPrivs: 1", "Seccomp: 2", "CapBnd: 00000000a00025fb", "CapEff: 00000000a00025fb",
		"CapInh: 0000000000000000", "CapAmb: 0000000000000000")
	out, _, _ := g.run("ls", "/dev")
	want := "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
	if have := strings.Join(strings.Fields(out), " "); have != want {
		t.Errorf("/dev has %q, not %q", have, want)
	}
	for _, c := range []string{
		"mknod /tmp/vport c 248 1", "mknod /vport c 248 1", "mount -t tmpfs tmpfs /home", "echo 1 > /proc/sys/kernel/panic",
		"echo b > /proc/sysrq-trigger", "touch /sys/x", "hostname other", "cat /init", "cat /run/boot_id", "ls /modules",
		"echo 1 > /sys/fs/cgroup/pids.max", "dmesg -c", "kill -0 -- -2",
	} {
		if out, _, status := g.run("sh", "-c", c); status.Code == 0 {
			t.Errorf("%s: it went well: %q", c, out)
		}
	}
	g.wants("wc -c < /proc/kcore", "0")
	g.wants("wc -c < /proc/kallsyms", "0")
	g.wants("ls /sys/class/virtio-ports | wc -l", "0")
	g.wants("echo new > /home/file && cat /home/file", "new")
	if out, _, _ := g.run("ls", "/proc/self/fd"); len(strings.Fields(out)) != 4 {
		t.Errorf("a process has descriptors %q", out)
	}
}

func testUsers(t *testing.T, g *guest) {
	for _, tt := range []struct {
		program guestproto.Program
		want    string
	}{
		{guestproto.Program{}, "uid=0(root) gid=0(root)"},
		{guestproto.Program{UID: 7, GID: 8, Groups: []uint32{9, 10}}, "uid=7 gid=8 groups=9,10"},
		{guestproto.Program{User: "app"}, "uid=1000(app) gid=1001(app) groups=1002(extra)"},
		{guestproto.Program{User: "app:extra"}, "uid=1000(app) gid=1002(extra)"},
		{guestproto.Program{User: "1000"}, "uid=1000(app) gid=1001(app) groups=1002(extra)"},
		{guestproto.Program{User: "4711:12"}, "uid=4711 gid=12"},
	} {
		tt.program.Args = []string{"id"}
		out, _, _ := g.runAs(tt.program)
		if got := strings.TrimSpace(out); got != tt.want && got+" groups=0(root)" != tt.want {
			t.Errorf("%+v: got %q, want %q", tt.program, got, tt.want)
		}
	}
	out, _, _ := g.runAs(guestproto.Program{
		Args: []string{"sh", "-c", "pwd; env; echo x > /dev/stdout; grep CapEff /proc/self/status"},
		User: "app", Cwd: "/home/app", Env: []string{"A=b c"},
	})
	for _, want := range []string{"/home/app\n", "A=b c\n", "HOME=/home/app\n", "PATH=/usr/local/sbin:", "x\n", "CapEff:\t0000000000000000\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("app's environment %q lacks %q", out, want)
		}
	}
	if _, err := g.c.Exec(g.ctx(), g.root, guestproto.Program{Args: []string{"id"}, User: "nobody"}); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("user nobody: %v", err)
	}
}

func testExitCodes(t *testing.T, g *guest) {
	for _, tt := range []struct {
		command string
		want    vm.ExitStatus
	}{
		{"exit 0", vm.ExitStatus{}},
		{"exit 7", vm.ExitStatus{Code: 7}},
		{"exit 255", vm.ExitStatus{Code: 255}},
		{"kill -9 $$", vm.ExitStatus{Code: 137, Signal: syscall.SIGKILL}},
		{"kill -15 $$", vm.ExitStatus{Code: 143, Signal: syscall.SIGTERM}},
	} {
		if _, _, got := g.run("sh", "-c", tt.command); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.command, got, tt.want)
		}
	}
}

func testStdio(t *testing.T, g *guest) {
	out, stderr, _ := g.run("sh", "-c", "echo out; echo err >&2")
	if out != "out\n" || stderr != "err\n" {
		t.Errorf("got %q and %q", out, stderr)
	}
	p, err := g.c.Exec(g.ctx(), g.root, guestproto.Program{Args: []string{"cat"}})
	if err != nil {
		t.Fatal(err)
	}
	sent := make([]byte, 3<<20)
	for i := range sent {
		sent[i] = byte(i * 7 >> 3)
	}
	begun := time.Now()
	go func() {
		if _, err := p.WriteContext(g.ctx(), sent); err != nil {
			t.Error(err)
		}
		if err := p.CloseStdin(g.ctx()); err != nil {
			t.Error(err)
		}
	}()
	got, err := io.ReadAll(p.Stdout())
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("cat gave %d of %d bytes, or others: %v", len(got), len(sent), err)
	}
	t.Logf("3 MiB through cat and back in %v", time.Since(begun))
	if _, err := p.Write([]byte("more")); !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ESRCH) {
		t.Errorf("write after close: %v", err)
	}
}

func testTerminal(t *testing.T, g *guest) {
	p, err := g.c.Exec(g.ctx(), g.root, guestproto.Program{Args: []string{"sh"}, TTY: true, Rows: 30, Cols: 100, Env: []string{"PS1=$ "}})
	if err != nil {
		t.Fatal(err)
	}
	var said string
	hear := func(want string) {
		t.Helper()
		for b := make([]byte, 256); !strings.Contains(said, want); {
			n, err := p.Stdout().Read(b)
			if said += string(b[:n]); err != nil {
				t.Fatalf("the terminal said %q and %v; it lacks %q", said, err, want)
			}
		}
	}
	say := func(line string) {
		if _, err := p.WriteContext(g.ctx(), []byte(line+"\n")); err != nil {
			t.Fatal(err)
		}
	}
	say("tty; stty size")
	hear("/dev/pts/0\r\n")
	hear("30 100\r\n")
	if err := p.Resize(g.ctx(), 40, 132); err != nil {
		t.Error(err)
	}
	say("stty size; exit 3")
	hear("40 132\r\n")
	if status, err := p.Wait(g.ctx()); err != nil || status.Code != 3 {
		t.Errorf("got %+v, %v", status, err)
	}
	if b, err := io.ReadAll(p.Stderr()); len(b) > 0 || err != nil {
		t.Errorf("a terminal has errors apart: %q, %v", b, err)
	}
}

func testRefusals(t *testing.T, g *guest) {
	ctx := g.ctx()
	var refused *vm.RefusedError
	check := func(what string, err error, want syscall.Errno, text string) {
		t.Helper()
		if !errors.As(err, &refused) || refused.Errno != want || !strings.Contains(refused.Text, text) {
			t.Errorf("%s: got %v, want %v naming %q", what, err, want, text)
		}
	}
	exec := func(args ...string) error {
		_, err := g.c.Exec(ctx, g.root, guestproto.Program{Args: args})
		return err
	}
	check("missing program", exec("nothing"), syscall.ENOENT, `"nothing"`)
	check("directory", exec("/etc"), syscall.EACCES, `"/etc"`)
	check("not executable", exec("/etc/passwd"), syscall.EACCES, `"/etc/passwd"`)
	_, err := g.c.MountRoot(ctx, guestproto.MountRoot{Root: 4, Serial: "other"})
	check("missing disk", err, syscall.ENODEV, `"other"`)
	_, err = g.c.MountRoot(ctx, guestproto.MountRoot{Root: 3, Serial: "root0"})
	check("mounted root", err, syscall.EEXIST, "3")
	_, err = g.c.Create(ctx, guestproto.Create{Root: 5, Program: guestproto.Program{Args: []string{"sh"}}})
	check("missing root", err, syscall.ENOENT, "5")
	_, err = g.c.Create(ctx, guestproto.Create{Root: 3, Files: []guestproto.File{{Path: "relative"}}, Program: guestproto.Program{Args: []string{"sh"}}})
	check("relative file", err, syscall.EINVAL, `"relative"`)
	check("started twice", g.root.Start(ctx), syscall.EALREADY, "start")
	check("forget the living", g.root.Forget(ctx), syscall.EBUSY, "forget")
	check("resize a pipe", g.root.Resize(ctx, 1, 1), syscall.ENOTTY, "resize")
	check("wrong interface", g.c.Network(ctx, guestproto.SoleInterface([6]byte{2}, [6]byte{2}, [4]byte{10, 0, 0, 1}, [4]byte{10, 0, 0, 2}, 0)), syscall.ENODEV, "02:00:00:00:00:00")
	check("wrong boot id", g.c.Reseed(ctx, guestproto.Reseed{BootID: "x", UnixNanos: time.Now().UnixNano()}), syscall.EINVAL, `"x"`)

	p, err := g.c.Create(ctx, guestproto.Create{Root: 3, Program: guestproto.Program{Args: []string{"/missing"}}})
	if err != nil {
		t.Fatal(err)
	}
	check("start of a missing program", p.Start(ctx), syscall.ENOENT, `"/missing"`)
	if status, err := p.Wait(ctx); err != nil || status.Code != 127 {
		t.Errorf("got %+v, %v", status, err)
	}
	if err := p.Forget(ctx); err != nil {
		t.Error(err)
	}
}

func testSignals(t *testing.T, g *guest) {
	p, err := g.c.Exec(g.ctx(), g.root, guestproto.Program{Args: []string{"sh", "-c", "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.1; done"}})
	if err != nil {
		t.Fatal(err)
	}
	var ready [6]byte
	if _, err := io.ReadFull(p.Stdout(), ready[:]); err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(g.ctx(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if status, err := p.Wait(g.ctx()); err != nil || status.Code != 5 {
		t.Errorf("got %+v, %v", status, err)
	}
	if b, _ := io.ReadAll(p.Stdout()); string(b) != "caught\n" {
		t.Errorf("got %q", b)
	}
	// A container's processes all together, what they started included.
	begun := time.Now()
	c, err := g.c.Create(g.ctx(), guestproto.Create{Root: 3, Program: guestproto.Program{Args: []string{"sh", "-c", "sleep 1000 & sleep 1001 & wait"}}})
	if err != nil {
		t.Fatal(err)
	}
	created := time.Now()
	if err := c.Start(g.ctx()); err != nil {
		t.Fatal(err)
	}
	t.Logf("second container: create %v, start %v", created.Sub(begun), time.Since(created))
	if err := c.SignalAll(g.ctx(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if status, err := c.Wait(g.ctx()); err != nil || status.Signal != syscall.SIGKILL || status.Code != 137 {
		t.Errorf("got %+v, %v", status, err)
	}
	if err := c.Forget(g.ctx()); err != nil {
		t.Error(err)
	}
}

// testSlowReader leaves output unread: its writer must wait, and nobody else.
func testSlowReader(t *testing.T, g *guest) {
	p, err := g.c.Exec(g.ctx(), g.root, guestproto.Program{Args: []string{"dd", "if=/dev/zero", "bs=65536", "count=1024"}})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond)
	begun := time.Now()
	for range 50 {
		if err := g.c.Ping(g.ctx()); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("round trip beside a stopped stream: %v", time.Since(begun)/50)
	if out, _, _ := g.run("echo", "still here"); out != "still here\n" {
		t.Errorf("got %q", out)
	}
	ended, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if status, err := p.Wait(ended); err == nil {
		t.Errorf("dd ended though nobody read: %+v", status)
	}
	begun = time.Now()
	n, err := io.Copy(io.Discard, p.Stdout())
	if n != 64<<20 || err != nil {
		t.Errorf("got %d bytes, %v", n, err)
	}
	t.Logf("%.0f MB/s of output", float64(n)/1e6/time.Since(begun).Seconds())
	p.Discard()
	if status, err := p.Wait(g.ctx()); err != nil || status.Code != 0 {
		t.Errorf("got %+v, %v", status, err)
	}
}

func testLimits(t *testing.T, g *guest, kills *atomic.Uint32) {
	c, err := g.c.Create(g.ctx(), guestproto.Create{
		Root: 3, Resources: guestproto.Resources{PidsMax: 20, MemoryMax: 24 << 20}, Program: guestproto.Program{Args: []string{"sleep", "1000"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(g.ctx()); err != nil {
		t.Fatal(err)
	}
	inside := &guest{t, g.c, c, g.m}
	out, stderr, _ := inside.run("sh", "-c", "for i in $(seq 1 40); do sleep 3 & done; echo on")
	if !strings.Contains(stderr, "fork") {
		t.Errorf("40 processes fit where 20 may be: %q, %q", out, stderr)
	}
	if _, _, status := inside.run("tail", "/dev/zero"); status.Code != 137 {
		t.Errorf("a process with no end to its memory ended with %+v", status)
	}
	if kills.Load() == 0 {
		t.Error("an end was told before the kill for want of memory that made it")
	}
	s, err := g.c.Stats(g.ctx())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(s.Containers, func(s guestproto.ContainerStats) bool { return s.Process == c.ID() })
	if i < 0 || s.Containers[i].OOMKills == 0 || s.Containers[i].CPU == 0 || s.Containers[i].Pids == 0 {
		t.Errorf("got %+v", s)
	}
	if err := c.Signal(g.ctx(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(g.ctx()); err != nil {
		t.Fatal(err)
	}
}

// testFullTable asks for one process too many, and one that fits again.
func testFullTable(t *testing.T, g *guest) {
	var running []*vm.Process
	var err error
	for range guestproto.MaxProcesses + 1 {
		var p *vm.Process
		if p, err = g.c.Exec(g.ctx(), g.root, guestproto.Program{Args: []string{"sleep", "1000"}}); err != nil {
			break
		}
		running = append(running, p)
	}
	if !errors.Is(err, syscall.EAGAIN) || len(running) < guestproto.MaxProcesses/2 {
		t.Errorf("after %d processes: %v", len(running), err)
	}
	for _, p := range running {
		if err := p.Signal(g.ctx(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range running {
		if status, err := p.Wait(g.ctx()); err != nil || status.Code != 137 {
			t.Errorf("got %+v, %v", status, err)
		}
	}
	for i := 0; ; i++ {
		if _, err = g.c.Exec(g.ctx(), g.root, guestproto.Program{Args: []string{"true"}}); err == nil {
			break
		}
		if i == 100 {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func testStats(t *testing.T, g *guest) {
	s, err := g.c.Stats(g.ctx())
	if err != nil {
		t.Fatal(err)
	}
	// What an agent does all day leaves nothing behind.
	const calls = 2000
	for range calls {
		if err := g.c.Ping(g.ctx()); err != nil {
			t.Fatal(err)
		}
	}
	after, err := g.c.Stats(g.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if grown := int64(after.AgentPrivate) - int64(s.AgentPrivate); grown > 64<<10 {
		t.Errorf("%d calls cost the agent %d bytes", calls, grown)
	}
	t.Logf("agent: %d kB resident, %d kB private; guest: %d of %d kB available",
		s.AgentResident>>10, s.AgentPrivate>>10, s.MemoryAvailable>>10, s.MemoryTotal>>10)
	if s.AgentPrivate == 0 || s.AgentPrivate > 1<<20 {
		t.Errorf("the agent has %d kB of its own; it may have 1024", s.AgentPrivate>>10)
	}
}

// testSessions leaves and comes back, and comes with garbage in between.
func testSessions(t *testing.T, g *guest, m *machine) {
	if _, err := g.root.WriteContext(g.ctx(), []byte("one\n")); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 8)
	if _, err := io.ReadFull(g.root.Stdout(), line); err != nil || string(line) != "got one\n" {
		t.Fatalf("got %q, %v", line, err)
	}
	left, err := g.c.Exec(g.ctx(), g.root, guestproto.Program{Args: []string{"sh", "-c", "sleep 1; echo late; exit 9"}})
	if err != nil {
		t.Fatal(err)
	}
	g.c.Close()
	if _, err := left.Wait(g.ctx()); !errors.Is(err, vm.ErrClosed) {
		t.Errorf("wait on a closed channel: %v", err)
	}
	for _, garbage := range garbage() {
		conn, err := net.Dial("unix", m.socket)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(100 * time.Millisecond))
		conn.Write(garbage)
		io.Copy(io.Discard, conn)
		conn.Close()
	}
	time.Sleep(time.Second)

	c := m.dial(t, nil)
	list, err := c.Processes(g.ctx())
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range list {
		p, err := c.Attach(g.ctx(), info)
		if err != nil {
			t.Fatal(err)
		}
		switch info.Process {
		case g.root.ID():
			if _, err := p.WriteContext(g.ctx(), []byte("two\n")); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(p.Stdout(), line); err != nil || string(line) != "got two\n" {
				t.Errorf("got %q, %v", line, err)
			}
			if log, err := p.Logs(g.ctx()); err != nil || string(log) != "got one\ngot two\n" {
				t.Errorf("the log is %q, %v", log, err)
			}
		case left.ID():
			status, err := p.Wait(g.ctx())
			if err != nil || status.Code != 9 {
				t.Errorf("got %+v, %v", status, err)
			}
			if b, err := io.ReadAll(p.Stdout()); err != nil || string(b) != "late\n" {
				t.Errorf("got %q, %v", b, err)
			}
		default:
			p.Discard()
		}
	}
	c.Close()
}

// garbage is what a host that is broken or malicious might send.
func garbage() [][]byte {
	hello := guestproto.Begin(nil, 1, guestproto.VerbHello)
	hello = (&guestproto.HelloRequest{Version: guestproto.Version}).Append(hello)
	guestproto.End(hello, 0)
	frame := func(v guestproto.Verb, payload ...byte) []byte {
		b := append(guestproto.Begin(slices.Clone(hello), 2, v), payload...)
		guestproto.End(b, len(hello))
		return b
	}
	old := guestproto.Begin(nil, 1, guestproto.VerbHello)
	old = (&guestproto.HelloRequest{Version: 99}).Append(old)
	guestproto.End(old, 0)
	all := [][]byte{
		{}, {1}, bytes.Repeat([]byte{0xff}, 100<<10), bytes.Repeat([]byte{0}, 100<<10), hello[:20], old,
		binary.LittleEndian.AppendUint32(nil, guestproto.MaxFrame), frame(200, 1, 2, 3),
		append(slices.Clone(hello), hello[:30]...), frame(guestproto.VerbPing)[:len(hello)+3],
	}
	for v := guestproto.VerbReseed; v <= guestproto.VerbPull; v++ {
		if v != guestproto.VerbShutdown && v != guestproto.VerbRescan {
			all = append(all, frame(v, bytes.Repeat([]byte{0xfe}, 40)...))
		}
	}
	return all
}

// TestRefusedGreetings asks for what no agent knows, and for a version it does not
// speak.
func TestRefusedGreetings(t *testing.T) {
	m := boot(t, map[string][]byte{"guard.bundle": []byte("not a bundle")})
	m.dial(t, nil).Close()
	ask := func(version uint32, v guestproto.Verb) string {
		conn, err := net.Dial("unix", m.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		request := guestproto.HelloRequest{Version: version, Nonce: [16]byte{7, 7}}
		b := request.Append(guestproto.Begin(nil, 5, guestproto.VerbHello))
		guestproto.End(b, 0)
		start := len(b)
		b = guestproto.Begin(b, 6, v)
		guestproto.End(b, start)
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
		var nonce [16]byte
		if _, err := io.ReadFull(conn, nonce[:]); err != nil || nonce != request.Nonce {
			t.Fatalf("got %x, %v", nonce, err)
		}
		var said string
		for {
			var header [guestproto.HeaderSize]byte
			if _, err := io.ReadFull(conn, header[:]); err != nil {
				return said
			}
			h, err := guestproto.ParseHeader(header[:])
			if err != nil {
				t.Fatal(err)
			}
			payload := make([]byte, h.Payload())
			if _, err := io.ReadFull(conn, payload); err != nil {
				t.Fatal(err)
			}
			if h.Verb == guestproto.VerbError {
				r, err := guestproto.ParseRefusal(payload)
				return said + fmt.Sprint(h.ID, " ", syscall.Errno(r.Errno), " ", r.Text, err)
			}
			said += fmt.Sprint(h.ID, " ok; ")
		}
	}
	if got, want := ask(guestproto.Version, 77), "5 ok; 6 function not implemented answer verb 77: function not implemented<nil>"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := ask(99, guestproto.VerbPing), "5 protocol not supported serve protocol version 99: protocol not supported<nil>"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}

	// A bundle that cannot be attached: the agent speaks, and runs nothing.
	c, hello, err := vm.Dial(t.Context(), m.socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if hello.Guard != guestproto.GuardFailed || hello.GuardText == "" {
		t.Errorf("got %+v", hello)
	}
	if _, err := c.MountRoot(t.Context(), guestproto.MountRoot{Serial: "root0"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Create(t.Context(), guestproto.Create{Program: guestproto.Program{Args: []string{"sh"}}}); !errors.Is(err, syscall.EPERM) {
		t.Errorf("a container without the guard that should be there: %v", err)
	}
}
