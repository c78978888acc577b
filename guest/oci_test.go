package guest_test

import (
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/vm"
)

// containerOutput runs a container to its end and gives what it printed.
func (g *guest) containerOutput(m guestproto.Create) (string, vm.ExitStatus) {
	g.Helper()
	p := g.start(m)
	b, err := io.ReadAll(p.Stdout())
	if err != nil {
		g.Fatal(err)
	}
	errs, _ := io.ReadAll(p.Stderr())
	status, err := p.Wait(g.ctx())
	if err != nil {
		g.Fatal(err)
	}
	if err := p.Forget(g.ctx()); err != nil {
		g.Error(err)
	}
	return string(b) + string(errs), status
}

// start creates and starts a container on root 3.
func (g *guest) start(m guestproto.Create) *vm.Process {
	g.Helper()
	m.Root = 3
	p, err := g.c.Create(g.ctx(), m)
	if err == nil {
		err = p.Start(g.ctx())
	}
	if err != nil {
		g.Fatal(err)
	}
	return p
}

// stop ends a container and forgets it.
func (g *guest) stop(p *vm.Process) {
	g.Helper()
	if err := p.SignalAll(g.ctx(), syscall.SIGKILL); err != nil {
		g.Error(err)
	}
	p.Discard()
	if _, err := p.Wait(g.ctx()); err != nil {
		g.Error(err)
	}
	if err := p.Forget(g.ctx()); err != nil {
		g.Error(err)
	}
}

// has checks that text has each of the lines, spaces aside.
func (g *guest) has(what, text string, lines ...string) {
	g.Helper()
	have := strings.Split(strings.TrimRight(text, "\n"), "\n")
	for i, l := range have {
		have[i] = strings.Join(strings.Fields(l), " ")
	}
	for _, want := range lines {
		if !slices.Contains(have, want) {
			g.Errorf("%s: %q lacks the line %q", what, text, want)
		}
	}
}

func sleeps(seconds string) guestproto.Program {
	return guestproto.Program{Args: []string{"sleep", seconds}}
}

func shell(command string) guestproto.Program {
	return guestproto.Program{Args: []string{"sh", "-c", command}}
}

// filter refuses one system call with an errno and allows the rest.
func filter(number, errno uint32) (b []byte) {
	for _, in := range [][4]uint32{
		{0x20, 0, 0, 0}, {0x15, 0, 1, number}, {0x06, 0, 0, 0x00050000 | errno}, {0x06, 0, 0, 0x7fff0000},
	} {
		b = binary.LittleEndian.AppendUint16(b, uint16(in[0]))
		b = append(b, byte(in[1]), byte(in[2]))
		b = binary.LittleEndian.AppendUint32(b, in[3])
	}
	return b
}

const status = "grep -E '^(NoNewPrivs|Seccomp|Cap...|Uid|Groups):' /proc/self/status"

// testPrograms looks at everything a program can be told, from inside it, both
// as a container's first process and as one more.
func testPrograms(t *testing.T, g *guest) {
	const netBind, chown = 1 << 10, 1
	sets := func(bounding, effective, permitted, inheritable, ambient uint64) guestproto.Rights {
		return guestproto.Rights{Given: true, Bounding: bounding, Effective: effective, Permitted: permitted, Inheritable: inheritable, Ambient: ambient}
	}
	for _, tt := range []struct {
		name    string
		program guestproto.Program
		command string
		want    []string
	}{
		{"defaults", guestproto.Program{}, status + "; umask; ulimit -n; cat /proc/self/oom_score_adj",
			[]string{"NoNewPrivs: 1", "Seccomp: 2", "CapEff: 00000000a00025fb", "0022", "1048576", "0"}},
		{"no rights", guestproto.Program{Rights: sets(0, 0, 0, 0, 0)}, status,
			[]string{"CapBnd: 0000000000000000", "CapEff: 0000000000000000", "CapPrm: 0000000000000000"}},
		{"bounding alone", guestproto.Program{Rights: sets(chown|netBind, chown, chown|netBind, 0, 0)}, status,
			[]string{"CapBnd: 0000000000000401", "CapEff: 0000000000000401", "CapPrm: 0000000000000401", "CapInh: 0000000000000000"}},
		{"inheritable", guestproto.Program{Rights: sets(chown|netBind, chown, chown, netBind, 0)}, status,
			[]string{"CapBnd: 0000000000000401", "CapInh: 0000000000000400"}},
		{"ambient of a user", guestproto.Program{UID: 7, GID: 8, Rights: sets(chown|netBind, chown|netBind, chown|netBind, netBind, netBind)}, status,
			[]string{"Uid: 7 7 7 7", "CapBnd: 0000000000000401", "CapEff: 0000000000000400", "CapPrm: 0000000000000400",
				"CapInh: 0000000000000400", "CapAmb: 0000000000000400"}},
		{"a user without", guestproto.Program{UID: 7, Rights: sets(chown, chown, chown, 0, 0)}, status,
			[]string{"CapBnd: 0000000000000001", "CapEff: 0000000000000000", "CapPrm: 0000000000000000"}},
		{"all there are", guestproto.Program{Rights: sets(1<<41-1, 1<<41-1, 1<<41-1, 0, 0)}, status,
			[]string{"CapBnd: 000001ffffffffff", "CapEff: 000001ffffffffff"}},
		{"new privileges", guestproto.Program{NewPrivileges: true}, status, []string{"NoNewPrivs: 0", "Seccomp: 2", "CapEff: 00000000a00025fb"}},
		{"no filter", guestproto.Program{Seccomp: guestproto.Seccomp{Mode: guestproto.SeccompNone}}, status, []string{"NoNewPrivs: 1", "Seccomp: 0"}},
		{"a filter", guestproto.Program{Seccomp: guestproto.Seccomp{Mode: guestproto.SeccompFilter, Filter: filter(syscall.SYS_MKDIR, 122)}},
			status + "; mkdir /home/no 2>&1", []string{"Seccomp: 2", "mkdir: can't create directory '/home/no': Disk quota exceeded"}},
		{"a filter and new privileges", guestproto.Program{NewPrivileges: true, UID: 7, Seccomp: guestproto.Seccomp{
			Mode: guestproto.SeccompFilter, Flags: 1 | 2 | 4, Filter: filter(syscall.SYS_MKDIR, 122)}},
			status + "; mkdir /tmp/no 2>&1", []string{"NoNewPrivs: 0", "Seccomp: 2", "mkdir: can't create directory '/tmp/no': Disk quota exceeded"}},
		{"limits", guestproto.Program{Rlimits: []guestproto.Rlimit{{Kind: 7, Soft: 100, Hard: 200}, {Kind: 4, Soft: 0, Hard: 1 << 20}, {Kind: 3, Soft: 1 << 20, Hard: guestproto.Unlimited}}},
			"grep -E 'open files|core|stack' /proc/self/limits",
			[]string{"Max open files 100 200 files", "Max core file size 0 1048576 bytes", "Max stack size 1048576 unlimited bytes"}},
		{"umask", guestproto.Program{UmaskGiven: true, Umask: 0o027}, "umask", []string{"0027"}},
		{"no umask", guestproto.Program{UmaskGiven: true}, "umask", []string{"0000"}},
		{"score", guestproto.Program{OOMScoreAdj: 321}, "cat /proc/self/oom_score_adj", []string{"321"}},
		{"negative score", guestproto.Program{OOMScoreAdj: -998}, "cat /proc/self/oom_score_adj", []string{"-998"}},
		{"groups and directory", guestproto.Program{UID: 7, GID: 8, Groups: []uint32{9, 10}, Cwd: "/made/for/it"}, status + "; pwd", []string{"Groups: 9 10", "/made/for/it"}},
	} {
		tt.program.Args = []string{"sh", "-c", tt.command}
		out, _ := g.containerOutput(guestproto.Create{Program: tt.program})
		g.has(tt.name, out, tt.want...)
		out, stderr, _ := g.runAs(tt.program)
		g.has("exec: "+tt.name, out+stderr, tt.want...)
	}
	// A filter may forbid everything but what the exec itself needs.
	killer := filter(syscall.SYS_EXECVE, 1)
	_, err := g.c.Exec(g.ctx(), g.root, guestproto.Program{Args: []string{"true"}, Seccomp: guestproto.Seccomp{Mode: guestproto.SeccompFilter, Filter: killer}})
	if !errors.Is(err, syscall.EPERM) {
		t.Errorf("an exec that its own filter forbids: %v", err)
	}
	for name, p := range map[string]guestproto.Program{
		"flags":  {Seccomp: guestproto.Seccomp{Mode: guestproto.SeccompFilter, Flags: 8, Filter: killer}},
		"filter": {Seccomp: guestproto.Seccomp{Mode: guestproto.SeccompFilter, Filter: make([]byte, 8)}},
		"limit":  {Rlimits: []guestproto.Rlimit{{Kind: 7, Soft: 2, Hard: 1}}},
		"rights": {Rights: sets(0, 1, 0, 0, 0)},
	} {
		p.Args = []string{"true"}
		if _, err := g.c.Exec(g.ctx(), g.root, p); !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.EPERM) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

const flagsClosed = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC

// mounts are an ordinary set of them, with more behind it.
func mounts(more ...guestproto.Mount) []guestproto.Mount {
	return append([]guestproto.Mount{
		{Target: "/proc", FS: "proc", Flags: flagsClosed},
		{Target: "/dev", FS: "tmpfs", Flags: syscall.MS_NOSUID, Data: "mode=755,size=64k"},
		{Target: "/dev/pts", FS: "devpts", Flags: syscall.MS_NOSUID | syscall.MS_NOEXEC, Data: "newinstance,ptmxmode=0666,mode=0620,gid=5"},
	}, more...)
}

// testContainers looks at everything a container can be told, from inside it.
func testContainers(t *testing.T, g *guest) {
	const ro, rec = syscall.MS_RDONLY, syscall.MS_REC
	for _, tt := range []struct {
		name    string
		create  guestproto.Create
		command string
		want    []string
	}{
		{"read-only root", guestproto.Create{ReadOnlyRoot: true}, "touch /x 2>&1; touch /dev/shm/y && echo yes",
			[]string{"touch: /x: Read-only file system", "yes"}},
		{"names", guestproto.Create{Hostname: "box", Domainname: "example.org"}, "hostname; cat /proc/sys/kernel/domainname", []string{"box", "example.org"}},
		{"cgroup", guestproto.Create{}, "cat /proc/self/cgroup", []string{"0::/"}},
		{"few mounts", guestproto.Create{Mounts: mounts()}, "ls /sys | wc -l; ls /dev; grep -c . /proc/self/mounts",
			[]string{"0", "null", "stdin", "ptmx", "5"}}, // root, proc, dev, pts, boot_id
		{"tmpfs", guestproto.Create{Mounts: mounts(guestproto.Mount{Target: "/a/b", FS: "tmpfs", Flags: flagsClosed, Data: "size=64k,mode=700"})},
			"grep ' /a/b ' /proc/mounts | grep -o 'rw,.*mode=700'; dd if=/dev/zero of=/a/b/x bs=1k count=65 2>&1 | grep -o 'No space.*'; stat -c %a /a/b; cp /bin/busybox /a/b/",
			[]string{"rw,nosuid,nodev,noexec,relatime,size=64k,mode=700", "No space left on device", "700"}},
		{"in order", guestproto.Create{Mounts: mounts(
			guestproto.Mount{Target: "/a", FS: "tmpfs"},
			guestproto.Mount{Kind: guestproto.MountBind, Target: "/a/b", Source: "/etc"},
			guestproto.Mount{Kind: guestproto.MountBind, Target: "/a/b/group", Source: "/etc/passwd", Flags: ro},
		)}, "head -n1 /a/b/group; echo x >> /a/b/group; echo x >> /a/b/passwd && tail -n1 /etc/passwd",
			[]string{"root:x:0:0:root:/root:/bin/sh", "sh: can't create /a/b/group: Read-only file system", "x"}},
		{"recursive", guestproto.Create{Mounts: mounts(
			guestproto.Mount{Target: "/a", FS: "tmpfs"}, guestproto.Mount{Target: "/a/b", FS: "tmpfs"},
			guestproto.Mount{Kind: guestproto.MountBind, Target: "/one", Source: "/a", Flags: ro | rec},
			guestproto.Mount{Kind: guestproto.MountBind, Target: "/all", Source: "/a", Flags: ro | rec, Recursive: ro},
			guestproto.Mount{Kind: guestproto.MountBind, Target: "/flat", Source: "/a"},
		)}, "touch /one/x 2>&1; touch /one/b/x && ls /a/b; touch /all/b/y 2>&1; ls /flat/b | wc -l",
			[]string{"touch: /one/x: Read-only file system", "x", "touch: /all/b/y: Read-only file system", "0"}},
		{"propagation", guestproto.Create{RootPropagation: syscall.MS_SHARED, Mounts: mounts(
			guestproto.Mount{Target: "/a", FS: "tmpfs", Propagation: syscall.MS_SHARED},
			guestproto.Mount{Target: "/b", FS: "tmpfs", Propagation: syscall.MS_UNBINDABLE},
			guestproto.Mount{Target: "/c", FS: "tmpfs"},
		)}, "for i in / /a /b /c; do grep \" $i rw\" /proc/self/mountinfo | grep -oE ' (shared|unbindable|-)' | head -n1 | sed s,^,$i:,; done",
			[]string{"/: shared", "/a: shared", "/b: unbindable", "/c: -"}},
		{"file as target", guestproto.Create{Mounts: mounts(guestproto.Mount{Kind: guestproto.MountBind, Source: "/etc/passwd", Target: "/new/dir/file"})},
			"head -n1 /new/dir/file", []string{"root:x:0:0:root:/root:/bin/sh"}},
		{"hidden and protected", guestproto.Create{Mounts: mounts(), Masked: []string{"/etc/passwd", "/home", "/nothing"}, ReadOnly: []string{"/etc", "/proc/sys", "/nothing"}},
			"wc -c < /etc/passwd; ls /home | wc -l; touch /etc/x 2>&1; echo 1 > /proc/sys/kernel/panic",
			[]string{"0", "touch: /etc/x: Read-only file system", "sh: can't create /proc/sys/kernel/panic: Read-only file system"}},
		{"sysctls", guestproto.Create{Sysctls: []guestproto.Setting{
			{Name: "net.ipv4.ip_unprivileged_port_start", Value: "80"}, {Name: "kernel.shm_rmid_forced", Value: "1"},
			{Name: "fs.mqueue.msg_max", Value: "20"}, {Name: "kernel/sem", Value: "250 32000 32 129"}, {Name: "kernel.msgmax", Value: "9000"},
		}}, "cd /proc/sys; cat net/ipv4/ip_unprivileged_port_start kernel/shm_rmid_forced fs/mqueue/msg_max kernel/sem kernel/msgmax",
			[]string{"80", "1", "20", "250 32000 32 129", "9000"}},
		{"devices", guestproto.Create{Devices: []guestproto.Device{
			{Path: "/dev/fuse", Kind: 'c', Major: 10, Minor: 229, Mode: 0o640, UID: 7, GID: 8},
			{Path: "/dev/net/tun", Kind: 'c', Major: 10, Minor: 200, Mode: 0o666},
			{Path: "/dev/disk", Kind: 'b', Serial: "root1", Mode: 0o600},
			{Path: "/dev/pipe", Kind: 'p', Mode: 0o622},
		}}, "stat -c '%n %F %a %u:%g %t:%T' /dev/fuse /dev/net/tun /dev/pipe; stat -c '%F %a' /dev/disk; dd if=/dev/disk bs=1 skip=1024 count=4 2>/dev/null | hexdump -C | head -n1",
			[]string{"/dev/fuse character special file 640 7:8 a:e5", "/dev/net/tun character special file 666 0:0 a:c8",
				"/dev/pipe fifo 622 0:0 0:0", "block special file 600", "00000000 e2 e1 f5 e0 |....|"}},
		{"no /proc", guestproto.Create{Mounts: []guestproto.Mount{{Target: "/a", FS: "tmpfs"}}}, "ls /proc | wc -l; ls /dev | wc -l", []string{"0"}},
		{"limits", guestproto.Create{Resources: guestproto.Resources{
			MemoryMax: 64 << 20, MemoryHigh: 48 << 20, MemoryLow: 8 << 20, CPUWeight: 200, CPUQuota: 50000, CPUPeriod: 200000,
			CPUs: "0", Nodes: "0", PidsMax: 33, Unified: []guestproto.Setting{{Name: "memory.oom.group", Value: "1"}},
		}}, "cd /sys/fs/cgroup; cat memory.max memory.high memory.low cpu.weight cpu.max cpuset.cpus cpuset.mems pids.max memory.oom.group",
			[]string{"67108864", "50331648", "8388608", "200", "50000 200000", "0", "33", "1"}},
	} {
		tt.create.Program = shell(tt.command + " 2>&1")
		tt.create.Program.Args[2] = "exec 2>&1; " + tt.command
		out, _ := g.containerOutput(tt.create)
		g.has(tt.name, out, tt.want...)
	}
	tty := shell("tty; echo said > /dev/console")
	tty.TTY = true
	out, _ := g.containerOutput(guestproto.Create{Mounts: mounts(), Program: tty})
	g.has("console", strings.ReplaceAll(out, "\r", ""), "/dev/pts/0", "said")
}

// testRefusedContainers asks for what would lead out of a container.
func testRefusedContainers(t *testing.T, g *guest) {
	settings := func(name, value string) []guestproto.Setting { return []guestproto.Setting{{Name: name, Value: value}} }
	one := func(m guestproto.Mount) guestproto.Create { return guestproto.Create{Mounts: mounts(m)} }
	for _, tt := range []struct {
		name string
		m    guestproto.Create
		want syscall.Errno
		text string
	}{
		{"kernel sysctl", guestproto.Create{Sysctls: settings("kernel.panic", "1")}, syscall.EPERM, `"kernel.panic"`},
		{"core pattern", guestproto.Create{Sysctls: settings("kernel.core_pattern", "|/bin/sh")}, syscall.EPERM, `"kernel.core_pattern"`},
		{"sysctl that climbs", guestproto.Create{Sysctls: settings("net/../kernel/panic", "1")}, syscall.EPERM, `"net/../kernel/panic"`},
		{"wrong value", guestproto.Create{Sysctls: settings("kernel.shmmax", "much")}, syscall.EINVAL, `"much"`},
		{"device of memory", guestproto.Create{Devices: []guestproto.Device{{Path: "/dev/mem", Kind: 'c', Major: 1, Minor: 1}}}, syscall.EPERM, `"/dev/mem"`},
		{"disk by number", guestproto.Create{Devices: []guestproto.Device{{Path: "/dev/x", Kind: 'b', Major: 254}}}, syscall.EPERM, `"/dev/x"`},
		{"unknown disk", guestproto.Create{Devices: []guestproto.Device{{Path: "/dev/x", Kind: 'b', Serial: "none"}}}, syscall.ENODEV, `"none"`},
		{"file system of the kernel", one(guestproto.Mount{Target: "/a", FS: "securityfs"}), syscall.ENODEV, `"securityfs"`},
		{"devtmpfs", one(guestproto.Mount{Target: "/a", FS: "devtmpfs"}), syscall.ENODEV, `"devtmpfs"`},
		{"target that climbs", one(guestproto.Mount{Target: "/a/../..", FS: "tmpfs"}), syscall.EINVAL, `"/a/../.."`},
		{"relative target", one(guestproto.Mount{Target: "a", FS: "tmpfs"}), syscall.EINVAL, `"a"`},
		{"missing source", one(guestproto.Mount{Kind: guestproto.MountBind, Target: "/a", Source: "/none"}), syscall.ENOENT, `"/none"`},
		{"target by way of /proc", one(guestproto.Mount{Target: "/proc/self/root/x", FS: "tmpfs"}), syscall.ELOOP, `"/proc/self/root/x"`},
		{"unknown directory", one(guestproto.Mount{Kind: guestproto.MountPod, Target: "/a", Source: "none"}), syscall.ENOENT, `"none"`},
		{"directory that climbs", one(guestproto.Mount{Kind: guestproto.MountPod, Target: "/a", Source: "../roots"}), syscall.EINVAL, `"../roots"`},
		{"unknown share", one(guestproto.Mount{Kind: guestproto.MountShare, Target: "/a", Source: "none/x"}), syscall.ENOENT, `"none"`},
		{"disk without its kind", one(guestproto.Mount{Kind: guestproto.MountDisk, Target: "/a", Source: "w0"}), syscall.ENODEV, "vd"},
		{"option", one(guestproto.Mount{Target: "/a", FS: "tmpfs", Data: "nonsense"}), syscall.EINVAL, `"/a"`},
		{"file over a directory", one(guestproto.Mount{Kind: guestproto.MountBind, Target: "/home", Source: "/etc/passwd"}), syscall.EINVAL, `"/home"`},
		{"cgroup file", guestproto.Create{Resources: guestproto.Resources{Unified: settings("cgroup.procs", "1")}}, syscall.EPERM, `"cgroup.procs"`},
		{"cgroup file that climbs", guestproto.Create{Resources: guestproto.Resources{Unified: settings("memory./../../x", "1")}}, syscall.EPERM, "x"},
		{"weight", guestproto.Create{Resources: guestproto.Resources{CPUWeight: 1 << 20}}, syscall.ERANGE, "cpu.weight"},
		{"pid namespace of nobody", guestproto.Create{PID: guestproto.PIDContainer, PIDOf: 99999}, syscall.ESRCH, "99999"},
		{"path to hide", guestproto.Create{Mounts: mounts(), Masked: []string{"x"}}, syscall.EINVAL, `"x"`},
	} {
		tt.m.Root, tt.m.Program = 3, shell("true")
		p, err := g.c.Create(g.ctx(), tt.m)
		var refused *vm.RefusedError
		if !errors.As(err, &refused) || refused.Errno != tt.want || !strings.Contains(refused.Text, tt.text) {
			t.Errorf("%s: got %v, want %v naming %s", tt.name, err, tt.want, tt.text)
		}
		if err == nil {
			g.stop(p)
		}
	}
}

// testPodNamespaces shows what containers of a pod share, and what not.
func testPodNamespaces(t *testing.T, g *guest) {
	one, two := g.start(guestproto.Create{Program: sleeps("1000")}), g.start(guestproto.Create{Program: sleeps("1000")})
	defer g.stop(one)
	defer g.stop(two)
	a, b := &guest{t, g.c, one, g.m}, &guest{t, g.c, two, g.m}
	for ns, shared := range map[string]bool{"net": true, "ipc": true, "uts": true, "pid": false, "mnt": false, "cgroup": false} {
		x, _, _ := a.run("readlink", "/proc/self/ns/"+ns)
		y, _, _ := b.run("readlink", "/proc/self/ns/"+ns)
		if (x == y) != shared || x == "" {
			t.Errorf("namespace %s: %q and %q", ns, x, y)
		}
	}
	a.run("touch", "/dev/mqueue/from-one")
	b.wants("ls /dev/mqueue", "from-one")
	b.run("rm", "/dev/mqueue/from-one")
}

// testPIDNamespaces goes through the modes of a PID namespace.
func testPIDNamespaces(t *testing.T, g *guest) {
	pod := guestproto.Create{PID: guestproto.PIDPod, Program: sleeps("1111")}
	one, two := g.start(pod), g.start(pod)
	a := &guest{t, g.c, one, g.m}
	a.wants("ps -o pid,args | grep -c '[s]leep 1111'", "2")
	a.wants("cat /proc/1/comm", "init")
	// What the reaper shows of itself is nothing.
	out, _, _ := a.runAs(guestproto.Program{Args: []string{"sh", "-c", "ls /proc/1/root/ /proc/1/fd/ 2>&1; kill -TERM 1; kill -KILL 1; sleep 0.1; cat /proc/1/comm"}})
	if strings.Contains(out, "modules") || !strings.HasSuffix(out, "init\n") {
		t.Errorf("the reaper shows %q", out)
	}
	all := guestproto.Rights{Given: true, Bounding: 1<<41 - 1, Effective: 1<<41 - 1, Permitted: 1<<41 - 1}
	out, _, _ = a.runAs(guestproto.Program{Args: []string{"sh", "-c", "ls -a /proc/1/root/ | wc -l; ls /proc/1/root/run 2>&1 | wc -l"}, Rights: all})
	if strings.Contains(out, "modules") {
		t.Errorf("the reaper shows root with all rights %q", out)
	}
	// An orphan ends without a trace.
	a.run("sh", "-c", "(sleep 0.05 &) ; exit 0")
	time.Sleep(300 * time.Millisecond)
	a.wants("ps -o stat,comm | grep -c '^Z'", "0")
	// With its first process a container goes, whatever it left behind.
	three := g.start(guestproto.Create{PID: guestproto.PIDPod, Program: shell("sleep 2222 & exit 4")})
	if status, err := three.Wait(g.ctx()); err != nil || status.Code != 4 {
		t.Errorf("got %+v, %v", status, err)
	}
	time.Sleep(100 * time.Millisecond)
	a.wants("ps -o args | grep -c '[s]leep 2222'", "0")
	three.Discard()
	if err := three.Forget(g.ctx()); err != nil {
		t.Error(err)
	}
	g.stop(two)
	a.wants("ps -o args | grep -c '[s]leep 1111'", "1")

	// In the namespace of another container.
	guest4 := g.start(guestproto.Create{PID: guestproto.PIDContainer, PIDOf: g.root.ID(), Program: sleeps("3333")})
	g.wants("ps -o args | grep -c '[s]leep 3333'", "1")
	g.stop(guest4)
	g.wants("ps -o args | grep -c '[s]leep 3333'", "0")
	g.stop(one)
}
