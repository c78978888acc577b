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
	}
	const programHex = "0200" + "020000007368" + "020000002d63" + "0100" + "03000000413d62" + "02002f77" + "010075" +
		"01000000" + "02000000" + "0100" + "03000000" + "01" + "0400" + "0500"
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
	mount := MountRoot{Root: 3, Serial: "root0", UpperBytes: 1 << 20}
	mounted := MountedRoot{Overlay: 24, Lower: 254 << 20}
	create := Create{
		Root: 1, Hostname: "h", MemoryMax: 2, PidsMax: 3, KeepLog: true,
		Files: []File{{Path: "/f", Mode: 0o644, Data: []byte("x")}}, Program: program,
	}
	exec := Exec{Container: 6, Program: program}
	id := ProcessID{5}
	signal := Signal{5, 9, true}
	resize := Resize{5, 24, 80}
	stdin := Stdin{5, []byte("in")}
	stats := Stats{1, 2, 3, 4, 5, []ContainerStats{{6, 7, 8, 9, 10}}}
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
			"03" + "0500726f6f7430" + "0000100000000000"},
		{"mount root reply", mounted, mounted.Append, func(b []byte) (any, error) { return wrap(ParseMountedRoot(b)) },
			"18000000" + "0000e00f"},
		{"create", create, create.Append, func(b []byte) (any, error) { return wrap(ParseCreate(b)) },
			"01" + "010068" + "0200000000000000" + "03000000" + "01" + "0100" + "02002f66" + "a4010000" + "0100000078" + programHex},
		{"exec", exec, exec.Append, func(b []byte) (any, error) { return wrap(ParseExec(b)) }, "06000000" + programHex},
		{"start", id, id.Append, func(b []byte) (any, error) { return wrap(ParseProcessID(VerbStart, b)) }, "05000000"},
		{"signal", signal, signal.Append, func(b []byte) (any, error) { return wrap(ParseSignal(b)) }, "050000000901"},
		{"resize", resize, resize.Append, func(b []byte) (any, error) { return wrap(ParseResize(b)) }, "0500000018005000"},
		{"stdin", stdin, stdin.Append, func(b []byte) (any, error) { return wrap(ParseStdin(b)) }, "05000000696e"},
		{"stats reply", stats, stats.Append, func(b []byte) (any, error) { return wrap(ParseStats(b)) },
			"0100000000000000" + "0200000000000000" + "0300000000000000" + "0400000000000000" + "0500000000000000" + "0100" +
				"06000000" + "0700000000000000" + "0800000000000000" + "09000000" + "0a000000"},
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
	}
	panic("a message without a writer")
}
