package guestproto

import (
	"bytes"
	"encoding/hex"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// message pairs a payload's writer with its reader.
type message struct {
	name  string
	value any
	write func(b []byte) []byte
	read  func(b []byte) (any, error)
	hex   string // of the payload: a change of it is a new version
}

func messages() []message {
	program := Program{
		Args: []string{"sh", "-c"}, Env: []string{"A=b"}, Cwd: "/w", User: "u", UID: 1, GID: 2,
		Groups: []uint32{3}, TTY: true, Rows: 4, Cols: 5,
		Rights: Rights{true, 1, 2, 3, 4, 5}, NewPrivileges: true, Rlimits: []Rlimit{{7, 8, 9}}, Umask: 0o77, UmaskGiven: true,
		OOMScoreAdj: -2, Seccomp: Seccomp{SeccompFilter, 6, []byte("\x06\x00\x00\x00\x00\x00\xff\x7f")},
	}
	programHex := "0200" + "020000007368" + "020000002d63" + "0100" + "03000000413d62" + "02002f77" + "010075" +
		"01000000" + "02000000" + "0100" + "03000000" + "01" + "0400" + "0500" +
		"01" + words(1, 2, 3, 4, 5) + "01" + "0100" + "07" + words(8, 9) + "3f000000" + "01" + "feffffff" +
		"02" + "06000000" + "08000000" + "060000000000ff7f"
	limits := Resources{1, 2, 3, 4, 5, 6, 7, "0-1", "0", 8, []Setting{{"a.b", "c"}}}
	limitsHex := words(1, 2, 3, 4, 5, 6, 7) + "0300302d31" + "010030" + "08000000" + "0100" + "0300612e62" + "010063"
	hello := HelloRequest{Version: 1, Nonce: [16]byte{1, 2}}
	helloReply := Hello{Version: 1, Release: "6.1", BootID: "b", Build: "c", Guard: GuardFailed, GuardText: "no", BootMicros: 7}
	reseed := Reseed{Entropy: [64]byte{9}, UnixNanos: -2, MachineID: "m", BootID: "b", Hostname: "h"}
	five, six := IPOf([]byte{10, 0, 0, 5}), IPOf([]byte{0xfd, 15: 5})
	network := Network{
		Interfaces: []Interface{{Device: [6]byte{2, 1}, Name: "eth0", MAC: [6]byte{2, 5}, MTU: 1400, LocalNet: true,
			Addresses: []Address{{Prefix{five, 24}, true}, {Prefix{six, 64}, false}}}},
		Routes: []Route{
			{Kind: RouteUnicast, Interface: "eth0", Destination: Prefix{IPOf(make([]byte, 4)), 0}, Gateway: IPOf([]byte{10, 0, 0, 1}),
				Source: five, Metric: 7, MTU: 1300, OnLink: true},
			{Kind: RouteBlackhole, Destination: Prefix{six, 128}, Scope: 253},
		},
		Neighbours: []Neighbour{{"eth0", five, [6]byte{2, 9}}},
	}
	interfaces := []InterfaceState{{Name: "eth0", MAC: [6]byte{2, 1}, MTU: 1500, Up: true,
		Addresses: []Address{{Prefix{five, 32}, false}}, Received: Traffic{1, 2, 3, 4}, Sent: Traffic{5, 6, 7, 8}}}
	const fiveHex, sixHex = "040a000005", "10fd" + "0000000000000000000000000000" + "05"
	const routesHex = "0200" +
		"01" + "040065746830" + "0400000000" + "00" + "040a000001" + fiveHex + "00" + "07000000" + "14050000" + "01" +
		"06" + "0000" + sixHex + "80" + "00" + "00" + "fd" + "00000000" + "00000000" + "00"
	mount := MountRoot{Root: 3, Serial: "root0", UpperBytes: 1 << 20, UpperSerial: "w0", UpperFS: "ext4"}
	mounted := MountedRoot{Overlay: 24, Lower: 254 << 20}
	create := Create{
		Root: 1, Hostname: "h", Domainname: "d", KeepLog: true, Resources: limits,
		Files: []File{{Path: "/f", Mode: 0o644, Data: []byte("x")}}, Program: program,
		Mounts:   []Mount{{MountDisk, "/t", "s", "f", "d", 1, 2, 3}},
		Masked:   []string{"/m"},
		ReadOnly: []string{"/r"},
		Devices:  []Device{{"/dev/x", 'c', 1, 2, "w0", 0o600, 3, 4}},
		Sysctls:  []Setting{{"n", "v"}}, ReadOnlyRoot: true, RootPropagation: 9, PID: PIDContainer, PIDOf: 5,
	}
	createHex := "01" + "010068" + "010064" + "01" + limitsHex + "0100" + "02002f66" + "a4010000" + "0100000078" + programHex +
		"0100" + "04" + "02002f74" + "010073" + "010066" + "010064" + "01000000" + "02000000" + "03000000" +
		"0100" + "020000002f6d" + "0100" + "020000002f72" +
		"0100" + "06002f6465762f78" + "63" + "01000000" + "02000000" + "02007730" + "80010000" + "03000000" + "04000000" +
		"0100" + "01006e" + "010076" + "01" + "09000000" + "02" + "05000000"
	update := Update{5, limits}
	freeze := Freeze{5, true}
	tasks := []Task{{1, 2, 3, 4, 5, "sh"}}
	unmount := UnmountRoot{3}
	dir := Dir{"d", 1, 2, 0o1777, 3, 4, "w1", "ext4"}
	name := Name{"vol~1"}
	pull := Pull{"d", "a/b"}
	push := Push{"d", "..1", true, true, []PushFile{{"a/b", 0o644, 1, 2, true, []byte("x")}}}
	copies := Copy{5, true, "/p"}
	exec := Exec{Container: 6, Program: program}
	id := ProcessID{5}
	signal := Signal{5, 9, true}
	resize := Resize{5, 24, 80}
	stdin := Stdin{5, []byte("in")}
	stats := Stats{
		1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
		[]ContainerStats{{14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38}},
		[]DirStats{{"d", 1, 2, 3}},
	}
	policy := GuardPolicy{7, []byte("blob")}
	list := []ProcessInfo{{1, 1, 60, PhaseExited, true, 137, 9}}
	credit := Credit{5, StreamStderr, 65536}
	refusal := Refusal{2, "no"}
	exit := Exit{5, 143, 15}
	output := Output{5, StreamStdout, []byte("out")}
	oom := OOM{5, 2}
	return []message{
		{"hello", hello, hello.Append, func(b []byte) (any, error) { return wrap(ParseHelloRequest(b)) },
			"010000000102" + strings.Repeat("00", 14) + strings.Repeat("ff", 32)},
		{"hello reply", helloReply, helloReply.Append, func(b []byte) (any, error) { return wrap(ParseHello(b)) },
			"01000000" + "0300362e31" + "010062" + "010063" + "02" + "02006e6f" + "0700000000000000"},
		{"reseed", reseed, reseed.Append, func(b []byte) (any, error) { return wrap(ParseReseed(b)) },
			"09" + strings.Repeat("00", 63) + "feffffffffffffff" + "01006d" + "010062" + "010068"},
		{"network", network, network.Append, func(b []byte) (any, error) { return wrap(ParseNetwork(b)) },
			"0100" + "020100000000" + "040065746830" + "020500000000" + "78050000" + "00" + "01" +
				"0200" + fiveHex + "18" + "01" + sixHex + "40" + "00" +
				routesHex + "0100" + "040065746830" + fiveHex + "020900000000"},
		{"interfaces reply", interfaces, func(b []byte) []byte { return AppendInterfaces(b, interfaces) },
			func(b []byte) (any, error) { return wrap(ParseInterfaces(b)) },
			"0100" + "040065746830" + "020100000000" + "dc050000" + "01" + "0100" + fiveHex + "20" + "00" +
				"0100000000000000" + "0200000000000000" + "0300000000000000" + "0400000000000000" +
				"0500000000000000" + "0600000000000000" + "0700000000000000" + "0800000000000000"},
		{"routes reply", network.Routes, func(b []byte) []byte { return AppendRoutes(b, network.Routes) },
			func(b []byte) (any, error) { return wrap(ParseRoutes(b)) }, routesHex},
		{"mount root", mount, mount.Append, func(b []byte) (any, error) { return wrap(ParseMountRoot(b)) },
			"03" + "0500726f6f7430" + "0000100000000000" + "02007730" + "040065787434"},
		{"mount root reply", mounted, mounted.Append, func(b []byte) (any, error) { return wrap(ParseMountedRoot(b)) },
			"18000000" + "0000e00f"},
		{"create", create, create.Append, func(b []byte) (any, error) { return wrap(ParseCreate(b)) },
			createHex},
		{"exec", exec, exec.Append, func(b []byte) (any, error) { return wrap(ParseExec(b)) }, "06000000" + programHex},
		{"start", id, id.Append, func(b []byte) (any, error) { return wrap(ParseProcessID(VerbStart, b)) }, "05000000"},
		{"signal", signal, signal.Append, func(b []byte) (any, error) { return wrap(ParseSignal(b)) }, "050000000901"},
		{"resize", resize, resize.Append, func(b []byte) (any, error) { return wrap(ParseResize(b)) }, "0500000018005000"},
		{"stdin", stdin, stdin.Append, func(b []byte) (any, error) { return wrap(ParseStdin(b)) }, "05000000696e"},
		{"stats reply", stats, stats.Append, func(b []byte) (any, error) { return wrap(ParseStats(b)) },
			words(1, 2, 3, 4, 5, 6, 7) + "08000000" + "09000000" + words(10, 11, 12, 13) + "0100" +
				"0e000000" + words(15, 16, 17, 18, 19, 20, 21, 22, 23, 24) + "19000000" + words(26, 27, 28, 29, 30, 31) + "20000000" +
				words(33, 34, 35, 36, 37, 38) + "0100" + "010064" + words(1, 2, 3)},
		{"update", update, update.Append, func(b []byte) (any, error) { return wrap(ParseUpdate(b)) }, "05000000" + limitsHex},
		{"freeze", freeze, freeze.Append, func(b []byte) (any, error) { return wrap(ParseFreeze(b)) }, "0500000001"},
		{"top reply", tasks, func(b []byte) []byte { return AppendTasks(b, tasks) }, func(b []byte) (any, error) { return wrap(ParseTasks(b)) },
			"0100" + "01000000" + "02000000" + "03000000" + words(4, 5) + "02007368"},
		{"unmount root", unmount, unmount.Append, func(b []byte) (any, error) { return wrap(ParseUnmountRoot(b)) }, "03"},
		{"make directory", dir, dir.Append, func(b []byte) (any, error) { return wrap(ParseDir(b)) },
			"010064" + words(1, 2) + "ff030000" + "03000000" + "04000000" + "02007731" + "040065787434"},
		{"mount share", name, name.Append, func(b []byte) (any, error) { return wrap(ParseName(VerbMountShare, b)) }, "0500766f6c7e31"},
		{"push", push, push.Append, func(b []byte) (any, error) { return wrap(ParsePush(b)) },
			"010064" + "03002e2e31" + "01" + "01" + "0100" + "0300612f62" + "a4010000" + "01000000" + "02000000" + "01" + "0100000078"},
		{"pull", pull, pull.Append, func(b []byte) (any, error) { return wrap(ParsePull(b)) }, "0100640300612f62"},
		{"copy", copies, copies.Append, func(b []byte) (any, error) { return wrap(ParseCopy(b)) }, "0500000001" + "02002f70"},
		{"guard policy", policy, policy.Append, func(b []byte) (any, error) { return wrap(ParseGuardPolicy(b)) },
			"0700000000000000" + "626c6f62"},
		{"processes reply", list, func(b []byte) []byte { return AppendProcesses(b, list) },
			func(b []byte) (any, error) { return wrap(ParseProcesses(b)) }, "0100" + "01000000" + "01000000" + "3c000000" + "03" + "01" + "89" + "09"},
		{"credit", credit, credit.Append, func(b []byte) (any, error) { return wrap(ParseCredit(b)) }, "05000000" + "02" + "00000100"},
		{"error reply", refusal, refusal.Append, func(b []byte) (any, error) { return wrap(ParseRefusal(b)) }, "02000000" + "02006e6f"},
		{"exit", exit, exit.Append, func(b []byte) (any, error) { return wrap(ParseExit(b)) }, "050000008f0f"},
		{"output", output, func(b []byte) []byte { return append(output.AppendPrefix(b), output.Data...) },
			func(b []byte) (any, error) { return wrap(ParseOutput(b)) }, "05000000" + "01" + "6f7574"},
		{"oom", oom, oom.Append, func(b []byte) (any, error) { return wrap(ParseOOM(b)) }, "05000000" + "02000000"},
	}
}

// words are 64-bit numbers as the wire has them.
func words(list ...uint64) string {
	var b []byte
	for _, v := range list {
		b = appendU64(b, v)
	}
	return hex.EncodeToString(b)
}

func wrap[T any](v T, err error) (any, error) { return v, err }

// TestMessages compares every payload with its bytes: they are the protocol.
func TestMessages(t *testing.T) {
	for _, m := range messages() {
		t.Run(m.name, func(t *testing.T) {
			b := m.write(nil)
			if got := hex.EncodeToString(b); got != m.hex {
				t.Errorf("wrote %s\n  want %s", got, m.hex)
			}
			got, err := m.read(b)
			if err != nil || !reflect.DeepEqual(got, m.value) {
				t.Errorf("read %+v, %v\nwant %+v", got, err, m.value)
			}
		})
	}
}

// TestCutMessages shows that a payload that ends early or late is refused, but
// for those whose last field is whatever is left.
func TestCutMessages(t *testing.T) {
	open := map[string]int{"stdin": 4, "guard policy": 8, "output": 5} // bytes before that field
	for _, m := range messages() {
		b := m.write(nil)
		for n := range b {
			if _, err := m.read(b[:n]); (err == nil) != (open[m.name] > 0 && n >= open[m.name]) {
				t.Errorf("%s cut to %d of %d bytes: %v", m.name, n, len(b), err)
			}
		}
		if _, err := m.read(append(b, 0)); err == nil && open[m.name] == 0 {
			t.Errorf("%s with a byte more: no error", m.name)
		}
	}
}

func TestRefused(t *testing.T) {
	long := bytes.Repeat([]byte{1}, MaxChunk+1)
	sh := []string{"sh"}
	for _, tt := range []struct {
		name, want string
		err        error
	}{
		{"prefix", "prefix", refusedNetwork(func(m *Network) { m.Interfaces[0].Addresses[0].Bits = 33 })},
		{"no address", "no address", refusedNetwork(func(m *Network) { m.Interfaces[0].Addresses[0].IP = IP{} })},
		{"odd address", "neither 4 nor 16", refusedNetwork(func(m *Network) { m.Interfaces[0].Addresses[0].IP.Length = 5 })},
		{"group's MAC", "group", refusedNetwork(func(m *Network) { m.Interfaces[0].MAC[0] = 1 })},
		{"path as name", "name", refusedNetwork(func(m *Network) { m.Interfaces[0].Name = "../all" })},
		{"dots as name", "name", refusedNetwork(func(m *Network) { m.Interfaces[0].Name = ".." })},
		{"no name", "name", refusedNetwork(func(m *Network) { m.Routes[0].Interface = "" })},
		{"long name", "name", refusedNetwork(func(m *Network) { m.Neighbours[0].Interface = "0123456789abcdef" })},
		{"families", "mixes", refusedNetwork(func(m *Network) { m.Routes[0].Gateway = IPOf(make([]byte, 16)) })},
		{"kind of route", "kind", refusedNetwork(func(m *Network) { m.Routes[1].Kind = 2 })},
		{"blackhole on a link", "nowhere", refusedNetwork(func(m *Network) { m.Routes[1].Interface = "eth0" })},
		{"no neighbour", "no address", refusedNetwork(func(m *Network) { m.Neighbours[0].IP = IP{} })},
		{"interfaces", "more interfaces", refusedNetwork(func(m *Network) { m.Interfaces = slices.Repeat(m.Interfaces, MaxInterfaces+1) })},
		{"addresses", "more addresses", refusedNetwork(func(m *Network) {
			m.Interfaces[0].Addresses = slices.Repeat(m.Interfaces[0].Addresses, MaxAddresses)
		})},
		{"routes", "more routes", refusedNetwork(func(m *Network) { m.Routes = slices.Repeat(m.Routes, MaxRoutes) })},
		{"neighbours", "more neighbours", refusedNetwork(func(m *Network) { m.Neighbours = slices.Repeat(m.Neighbours, MaxRoutes+1) })},
		{"root", "number", second(ParseMountRoot((&MountRoot{Root: MaxRoots}).Append(nil)))},
		{"no program", "no program", second(ParseExec((&Exec{}).Append(nil)))},
		{"signal", "signal", second(ParseSignal((&Signal{Number: 65}).Append(nil)))},
		{"long stdin", "chunk", second(ParseStdin((&Stdin{Data: long}).Append(nil)))},
		{"long output", "chunk", second(ParseOutput(append((&Output{Stream: 1}).AppendPrefix(nil), long...)))},
		{"stream", "stream", second(ParseOutput((&Output{Stream: 3}).AppendPrefix(nil)))},
		{"window", "window", second(ParseCredit((&Credit{Bytes: MaxWindow + 1}).Append(nil)))},
		{"guard state", "state", second(ParseHello((&Hello{Guard: 3}).Append(nil)))},
		{"phase", "phase", second(ParseProcesses(AppendProcesses(nil, []ProcessInfo{{Phase: 9}})))},
		{"table", "more processes", second(ParseProcesses(AppendProcesses(nil, make([]ProcessInfo, MaxProcesses+1))))},
		{"padding", "padding", second(ParseHelloRequest(make([]byte, 4+NonceSize+helloPad)))},
		{"bool", "neither", second(ParseSignal([]byte{0, 0, 0, 0, 9, 2}))},
		{"list", "list", second(ParseExec([]byte{0, 0, 0, 0, 0xff, 0xff, 1, 2, 3}))},
		{"rlimit", "resource limit", second(ParseExec((&Exec{Program: Program{Args: sh, Rlimits: []Rlimit{{16, 1, 1}}}}).Append(nil)))},
		{"umask", "umask", second(ParseExec((&Exec{Program: Program{Args: sh, Umask: 0o1000}}).Append(nil)))},
		{"seccomp mode", "seccomp", second(ParseExec((&Exec{Program: Program{Args: sh, Seccomp: Seccomp{Mode: 3}}}).Append(nil)))},
		{"empty filter", "seccomp", second(ParseExec((&Exec{Program: Program{Args: sh, Seccomp: Seccomp{Mode: SeccompFilter}}}).Append(nil)))},
		{"filter without mode", "seccomp", second(ParseExec((&Exec{Program: Program{Args: sh, Seccomp: Seccomp{Filter: long[:8]}}}).Append(nil)))},
		{"odd filter", "seccomp", second(ParseExec((&Exec{Program: Program{Args: sh, Seccomp: Seccomp{Mode: SeccompFilter, Filter: long[:9]}}}).Append(nil)))},
		{"long filter", "seccomp", second(ParseExec((&Exec{Program: Program{Args: sh, Seccomp: Seccomp{Mode: SeccompFilter, Filter: make([]byte, MaxFilter*8+8)}}}).Append(nil)))},
		{"mount kind", "mount", second(ParseCreate((&Create{Program: Program{Args: sh}, Mounts: []Mount{{Kind: 5}}}).Append(nil)))},
		{"device kind", "device", second(ParseCreate((&Create{Program: Program{Args: sh}, Devices: []Device{{Kind: 'u'}}}).Append(nil)))},
		{"pid mode", "PID", second(ParseCreate((&Create{Program: Program{Args: sh}, PID: 3}).Append(nil)))},
		{"pid of nobody", "PID", second(ParseCreate((&Create{Program: Program{Args: sh}, PID: PIDContainer}).Append(nil)))},
		{"pid of one too many", "PID", second(ParseCreate((&Create{Program: Program{Args: sh}, PIDOf: 1}).Append(nil)))},
		{"root to unmount", "number", second(ParseUnmountRoot([]byte{MaxRoots}))},
		{"dot", "name", second(ParseName(VerbRemoveDir, (&Name{"."}).Append(nil)))},
		{"hidden", "name", second(ParseName(VerbRemoveDir, (&Name{".a"}).Append(nil)))},
		{"slash", "name", second(ParseName(VerbRemoveDir, (&Name{"a/b"}).Append(nil)))},
		{"no name", "name", second(ParseName(VerbRemoveDir, (&Name{}).Append(nil)))},
		{"long name", "name", second(ParseName(VerbRemoveDir, (&Name{strings.Repeat("a", 129)}).Append(nil)))},
		{"dir's mode", "mode", second(ParseDir((&Dir{Name: "a", Mode: 0o10000}).Append(nil)))},
		{"stamp", "stamp", second(ParsePush((&Push{Dir: "a", Stamp: "a"}).Append(nil)))},
		{"stamp of two dots", "stamp", second(ParsePush((&Push{Dir: "a", Stamp: ".."}).Append(nil)))},
		{"stamp of the link", "stamp", second(ParsePush((&Push{Dir: "a", Stamp: "..data"}).Append(nil)))},
		{"stamp with a slash", "name", second(ParsePush((&Push{Dir: "a", Stamp: "../a"}).Append(nil)))},
		{"tasks", "more processes", second(ParseTasks(AppendTasks(nil, make([]Task, MaxTop+1))))},
		{"record", "early", ParseRecords([]byte{9, 0, 1}, func([]byte) {})},
	} {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("%s: got %v, want an error about %q", tt.name, tt.err, tt.want)
		}
	}
}

// refusedNetwork breaks a good network and gives what its parser says.
func refusedNetwork(spoil func(*Network)) error {
	for _, m := range messages() {
		if n, ok := m.value.(Network); ok {
			spoil(&n)
			return second(ParseNetwork(n.Append(nil)))
		}
	}
	return nil
}

// TestChecks shows that a check that keeps nothing finds what a reading finds.
func TestChecks(t *testing.T) {
	for _, m := range messages() {
		switch v := m.value.(type) {
		case Create:
			b := m.write(nil)
			got, err := CheckCreate(b)
			if err != nil || got.Root != v.Root || got.PIDOf != v.PIDOf || got.PID != v.PID || !got.Program.TTY ||
				!reflect.DeepEqual(got.Resources, v.Resources) || got.Mounts != nil || got.Hostname != "" {
				t.Errorf("checked %+v, %v", got, err)
			}
			for n := range b {
				if _, err := CheckCreate(b[:n]); err == nil {
					t.Errorf("create cut to %d bytes: no error", n)
				}
			}
		case Exec:
			b := m.write(nil)
			if got, err := CheckExec(b); err != nil || got.Container != v.Container || !got.Program.TTY || got.Program.Args != nil {
				t.Errorf("checked %+v, %v", got, err)
			}
			if n := testing.AllocsPerRun(100, func() { _, _ = CheckExec(b) }); n != 0 {
				t.Errorf("%v allocations", n)
			}
		}
	}
}

// TestPushPaths lets nothing be written outside a directory, nor over what a
// push with a stamp uses itself.
func TestPushPaths(t *testing.T) {
	for path, want := range map[string]bool{
		"a": true, "a/b": true, "a.b": true, ".a": true, "a/.b/c": true, strings.Repeat("a/", 15) + "a": true,
		"": false, "/": false, "/a": false, "a/": false, "a//b": false, ".": false, "..": false, "a/..": false, "a/../b": false,
		"a/./b": false, "..data": false, "..data/a": false, "...": false, "a\x00": false, strings.Repeat("a", 256): false,
		strings.Repeat("a/", 16) + "a": false, strings.Repeat(strings.Repeat("a", 254)+"/", 15) + strings.Repeat("b", 255) + "/": false,
	} {
		_, err := ParsePush((&Push{Dir: "d", Files: []PushFile{{Path: path}}}).Append(nil))
		if (err == nil) != want {
			t.Errorf("%.40q: %v", path, err)
		}
	}
}

// TestCopyHead goes through what an entry of a copy may say.
func TestCopyHead(t *testing.T) {
	for _, tt := range []struct {
		entry CopyEntry
		want  bool
	}{
		{CopyEntry{}, true},
		{CopyEntry{Kind: CopyDir, Mode: 0o1777, UID: 1, GID: 2, UnixNanos: -3, Path: "a"}, true},
		{CopyEntry{Kind: CopyRegular, Mode: 0o4755, Size: 1 << 40, Path: "a/b"}, true},
		{CopyEntry{Kind: CopySymlink, Path: "a", Link: "b"}, true},
		{CopyEntry{Kind: CopyLink, Path: "a", Link: "b"}, true},
		{CopyEntry{Path: "a"}, false},
		{CopyEntry{Kind: CopyDir}, false},
		{CopyEntry{Kind: CopyDir, Path: "a", Link: "b"}, false},
		{CopyEntry{Kind: CopyDir, Path: "a", Size: 1}, false},
		{CopyEntry{Kind: CopySymlink, Path: "a"}, false},
		{CopyEntry{Kind: CopyRegular, Path: "a", Size: 1<<62 + 1}, false},
		{CopyEntry{Kind: CopyRegular, Path: "a", Mode: 0o10000}, false},
		{CopyEntry{Kind: 5, Path: "a"}, false},
		{CopyEntry{Kind: CopyDir, Path: strings.Repeat("a", MaxCopyPath+1)}, false},
	} {
		b := tt.entry.Append(nil)
		got, path, link, err := ParseCopyHead(b[:CopyHead])
		if (err == nil) != tt.want {
			t.Errorf("%.100v: %v", tt.entry, err)
		}
		if err != nil {
			continue
		}
		got.Path, got.Link = string(b[CopyHead:CopyHead+path]), string(b[CopyHead+path:CopyHead+path+link])
		if got != tt.entry {
			t.Errorf("wrote %+v, read %+v", tt.entry, got)
		}
	}
}

func FuzzCopyHead(f *testing.F) {
	f.Add((&CopyEntry{Kind: CopySymlink, Mode: 0o777, UnixNanos: 5, Path: "a", Link: "b"}).Append(nil))
	f.Add((&CopyEntry{}).Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < CopyHead {
			return
		}
		m, path, link, err := ParseCopyHead(b[:CopyHead])
		if err != nil || len(b) != CopyHead+path+link {
			return
		}
		m.Path, m.Link = string(b[CopyHead:CopyHead+path]), string(b[CopyHead+path:])
		if again := m.Append(nil); !bytes.Equal(again, b) {
			t.Fatalf("%+v prints as %x, was %x", m, again, b)
		}
	})
}

func second[T any](_ T, err error) error { return err }

func TestHeader(t *testing.T) {
	b := Begin([]byte("before"), 0x01020304, VerbStats)
	b = append(b, "payload"...)
	End(b, len("before"))
	if got, want := hex.EncodeToString(b[6:]), "0c000000"+"04030201"+"0d"+hex.EncodeToString([]byte("payload")); got != want {
		t.Errorf("wrote %s, want %s", got, want)
	}
	h, err := ParseHeader(b[6:])
	if err != nil || h != (Header{12, 0x01020304, VerbStats}) || h.Payload() != 7 {
		t.Errorf("read %+v, %v", h, err)
	}
	for _, length := range []uint32{0, 4, MaxFrame + 1, 1<<32 - 1} {
		if _, err := ParseHeader(append(appendU32(nil, length), 0, 0, 0, 0, 1)); err == nil {
			t.Errorf("length %d: no error", length)
		}
	}
}

// TestVerbs holds the numbers fast: they are never used for anything else.
func TestVerbs(t *testing.T) {
	for v, want := range map[Verb]string{
		1: "hello", 2: "reseed", 3: "rescan", 4: "network", 5: "mount root", 6: "create", 7: "start", 8: "exec",
		9: "signal", 10: "resize", 11: "stdin", 12: "close stdin", 13: "stats", 14: "guard policy", 15: "guard status",
		16: "ping", 17: "shutdown", 18: "processes", 19: "attach", 20: "forget", 21: "logs", 22: "credit", 23: "interfaces", 24: "routes",
		25: "update", 26: "freeze", 27: "top", 28: "unmount root", 29: "make directory", 30: "remove directory", 31: "push",
		32: "mount share", 33: "copy", 34: "pull",
		0x80: "reply", 0x81: "error", 0xc0: "exit", 0xc1: "output", 0xc2: "guard events", 0xc3: "oom",
		0: "verb 0", 99: "verb 99", 255: "verb 255",
	} {
		if got := v.String(); got != want {
			t.Errorf("verb %d is %q, want %q", uint8(v), got, want)
		}
	}
}

// TestStaleHello shows that the end of a hello, taken for the start of a frame,
// is never a frame that is complete: an agent that was in the middle of an
// older one stalls or gives up, and does nothing.
func TestStaleHello(t *testing.T) {
	b := (&HelloRequest{Version: Version, Nonce: [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}}).Append(Begin(nil, 1, VerbHello))
	End(b, 0)
	for n := 1; n < len(b); n++ {
		rest := b[n:]
		if len(rest) < HeaderSize {
			continue
		}
		if h, err := ParseHeader(rest); err == nil && 4+int(h.Length) <= len(rest) {
			t.Errorf("cut at %d, %x is a whole frame: %+v", n, rest, h)
		}
	}
}

// TestAppendAllocatesNothing keeps the agent's hot path free of garbage.
func TestAppendAllocatesNothing(t *testing.T) {
	buf := make([]byte, 0, 4096)
	payload := (&Stdin{Process: 1, Data: []byte("input")}).Append(nil)
	credit := (&Credit{Process: 1, Stream: StreamStdout, Bytes: 100}).Append(nil)
	if n := testing.AllocsPerRun(100, func() {
		b := Begin(buf, 0, VerbOutput)
		m := Output{Process: 1, Stream: StreamStdout}
		b = append(m.AppendPrefix(b), "data"...)
		End(b, 0)
		if b = AppendRecord(b, payload); cap(b) != cap(buf) {
			t.Error("the buffer was left")
		}
		if _, err := ParseStdin(payload); err != nil {
			t.Error(err)
		}
		if _, err := ParseCredit(credit); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzFrame parses whatever comes as every message there is. What parses must
// print back to the same bytes.
func FuzzFrame(f *testing.F) {
	for i, m := range messages() {
		f.Add(uint8(i), m.write(nil))
	}
	all := messages()
	f.Fuzz(func(t *testing.T, which uint8, b []byte) {
		if len(b) >= HeaderSize {
			if h, err := ParseHeader(b); err == nil && (h.Payload() < 0 || h.Payload() > MaxPayload) {
				t.Fatalf("header %+v", h)
			}
		}
		_ = ParseRecords(b, func([]byte) {})
		m := all[int(which)%len(all)]
		v, err := m.read(b)
		if err != nil {
			return
		}
		if c, ok := v.(Create); ok {
			if got, err := CheckCreate(b); err != nil || got.Root != c.Root {
				t.Fatalf("the check says %+v, %v", got, err)
			}
		}
		if again := print(v); !bytes.Equal(again, b) {
			t.Fatalf("%s %+v prints as %x, was %x", m.name, v, again, b)
		}
	})
}

// print writes a message of any kind.
func print(v any) []byte {
	switch m := v.(type) {
	case HelloRequest:
		return m.Append(nil)
	case Hello:
		return m.Append(nil)
	case Reseed:
		return m.Append(nil)
	case Network:
		return m.Append(nil)
	case []InterfaceState:
		return AppendInterfaces(nil, m)
	case []Route:
		return AppendRoutes(nil, m)
	case MountRoot:
		return m.Append(nil)
	case MountedRoot:
		return m.Append(nil)
	case Create:
		return m.Append(nil)
	case Exec:
		return m.Append(nil)
	case ProcessID:
		return m.Append(nil)
	case Signal:
		return m.Append(nil)
	case Resize:
		return m.Append(nil)
	case Stdin:
		return m.Append(nil)
	case Stats:
		return m.Append(nil)
	case GuardPolicy:
		return m.Append(nil)
	case []ProcessInfo:
		return AppendProcesses(nil, m)
	case Credit:
		return m.Append(nil)
	case Refusal:
		return m.Append(nil)
	case Exit:
		return m.Append(nil)
	case Output:
		return append(m.AppendPrefix(nil), m.Data...)
	case OOM:
		return m.Append(nil)
	case Update:
		return m.Append(nil)
	case Freeze:
		return m.Append(nil)
	case []Task:
		return AppendTasks(nil, m)
	case UnmountRoot:
		return m.Append(nil)
	case Dir:
		return m.Append(nil)
	case Name:
		return m.Append(nil)
	case Pull:
		return m.Append(nil)
	case Push:
		return m.Append(nil)
	case Copy:
		return m.Append(nil)
	}
	panic("a message without a writer")
}
