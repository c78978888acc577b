package mesh

import (
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hauberk.dev/plan"
)

func pair(t testing.TB, large int64) (a, b *Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = NewConn(c.(*net.UnixConn), large)
		t.Cleanup(func() { c.Close() })
	}
	return ends[0], ends[1]
}

func files(t testing.TB, n int) (all []*os.File) {
	for range n {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		all = append(all, f)
	}
	return all
}

func TestRoundTrip(t *testing.T) {
	a, b := pair(t, 1<<20)
	box := &plan.Sandbox{Instance: "web-1", Address: netip.MustParseAddr("10.88.0.1"), Identity: "spiffe://t/ns/bank/sa/web"}
	big := &plan.Mesh{Generation: 7}
	for range 1000 {
		big.Services = append(big.Services, plan.Service{Name: strings.Repeat("s", 63), Namespace: "bank", Identity: strings.Repeat("i", 100)})
	}
	for _, c := range []struct {
		m Message
		n int
	}{
		{Message{Kind: KindHello, Seq: 1, Hello: &Hello{Version: 1, Process: 2}}, 0},
		{Message{Kind: KindAdd, Seq: 2, Sandbox: box}, 3},
		{Message{Kind: KindPlan, Seq: 3, Plan: big}, 0},
		{Message{Kind: KindSockets, Seq: 4, Instance: "web-1", Count: 64}, 0},
		{Message{Kind: KindAck, Seq: 4}, MaxSockets},
		{Message{Kind: KindAck, Seq: 5, Error: "no"}, 0},
		{Message{Kind: KindPublish, Seq: 6, Publish: &Publish{Ports: make([]PublishedPort, MaxFiles)}}, MaxFiles},
		{Message{Kind: KindPublish, Seq: 6, Publish: &Publish{Ports: []PublishedPort{}}}, 0},
	} {
		sent := make(chan error, 1)
		go func() { sent <- a.Send(&c.m, files(t, c.n)...) }()
		got, fs, err := b.Receive()
		if err != nil {
			t.Fatalf("%s: %v", c.m.Kind, err)
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		if len(fs) != c.n || !reflect.DeepEqual(got, &c.m) {
			t.Errorf("%s: %d files and %+v came out", c.m.Kind, len(fs), got)
		}
		closeAll(fs)
	}
	a.Close()
	if _, _, err := b.Receive(); err != io.EOF {
		t.Errorf("after close: %v, want EOF", err)
	}
}

func TestRefused(t *testing.T) {
	box := &plan.Sandbox{Instance: "x", Address: netip.MustParseAddr("10.88.0.1")}
	for name, c := range map[string]struct {
		m Message
		n int
	}{
		"unknown kind":         {Message{Kind: "x"}, 0},
		"no hello":             {Message{Kind: KindHello}, 0},
		"missing files":        {Message{Kind: KindAdd, Sandbox: box}, 2},
		"surplus files":        {Message{Kind: KindPing}, 1},
		"no sandbox":           {Message{Kind: KindAdd}, 3},
		"bad instance":         {Message{Kind: KindRemove, Instance: "a/b"}, 0},
		"long instance":        {Message{Kind: KindRemove, Instance: strings.Repeat("a", 300)}, 0},
		"too many sockets":     {Message{Kind: KindSockets, Instance: "x", Count: MaxSockets + 1}, 0},
		"negative sockets":     {Message{Kind: KindSockets, Instance: "x", Count: -1}, 0},
		"error outside an ack": {Message{Kind: KindPing, Error: "x"}, 0},
		"huge csr":             {Message{Kind: KindCSR, Instance: "x", CSR: make([]byte, 9<<10)}, 0},
	} {
		if err := c.m.Check(c.n); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for _, s := range []string{``, `{}x`, `{"kind":"ping","seq":1}{}`, `{"kind":"ping","more":1}`, `[]`, `{"seq":-1}`} {
		if _, err := Parse([]byte(s)); err == nil {
			t.Errorf("%q parsed", s)
		}
	}
}

// A message that claims to be in a file must be in sealed memory, not larger
// than taken, and the one announced.
func TestLargeRefused(t *testing.T) {
	plain, err := os.Create(filepath.Join(t.TempDir(), "plain"))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	huge, err := sealed(make([]byte, 2048))
	if err != nil {
		t.Fatal(err)
	}
	defer huge.Close()
	other, err := sealed([]byte(`{"kind":"ping","seq":9}`))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for name, f := range map[string]*os.File{"plain file": plain, "pipe": r, "too large": huge, "not the one announced": other} {
		a, b := pair(t, 1024)
		body, _ := json.Marshal(&Message{Kind: KindPing, Seq: 1, Large: true})
		if _, _, err := a.socket.WriteMsgUnix(body, unix.UnixRights(int(f.Fd())), nil); err != nil {
			t.Fatal(err)
		}
		if m, _, err := b.Receive(); err == nil {
			t.Errorf("%s: received %+v", name, m)
		}
	}
}

// Too many descriptors, or too many bytes, fail and leave none open.
func TestTruncated(t *testing.T) {
	before := openFiles(t)
	func() {
		a, b := pair(t, 0)
		defer a.Close()
		defer b.Close()
		fds := make([]int, MaxFiles+20)
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		for i := range fds {
			fds[i] = int(null.Fd())
		}
		if _, _, err := a.socket.WriteMsgUnix([]byte(`{"kind":"ping","seq":1}`), unix.UnixRights(fds...), nil); err != nil {
			t.Fatal(err)
		}
		if m, _, err := b.Receive(); err == nil {
			t.Errorf("received %+v with %d files", m, len(fds))
		}
		if _, err := a.socket.Write(make([]byte, MaxMessage+1)); err != nil {
			t.Fatal(err)
		}
		if m, _, err := b.Receive(); err == nil {
			t.Errorf("received %+v of too many bytes", m)
		}
	}()
	if after := openFiles(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func openFiles(t *testing.T) int {
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"kind":"ping","seq":1}`))
	f.Add([]byte(`{"kind":"add-sandbox","seq":2,"sandbox":{"instance":"web-1","address":"10.88.0.1","identity":"spiffe://t/ns/a/sa/b","service":"web","namespace":"a","egress":[{"prefix":"1.1.1.1/32","ports":[443]}]}}`))
	f.Add([]byte(`{"kind":"csr","seq":3,"instance":"a","csr":"AAAA"}`))
	f.Add([]byte(`{"kind":"event","seq":4,"event":{"kind":"AccessDenied","at":"2026-11-22T00:00:00Z","reason":"x"}}`))
	f.Add([]byte(`{"kind":"ack","seq":4,"certificate":{"chain":["AA=="],"roots":""}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		m, err := Parse(body)
		if err != nil {
			return
		}
		m.Check(0)
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatalf("parsed but does not print: %v", err)
		}
		if _, err := Parse(again); err != nil {
			t.Fatalf("%s: printed form does not parse: %v", again, err)
		}
	})
}

// A listener sent is one the other end may be accepting on already: it must
// not turn blocking there.
func TestSendKeepsMode(t *testing.T) {
	a, b := pair(t, 0)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := a.Send(&Message{Kind: KindGateway, Seq: 1}, f); err != nil {
		t.Fatal(err)
	}
	// Before it is received, as receiving would mend it.
	raw, err := ln.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var flags int
	cerr := raw.Control(func(fd uintptr) { flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0) })
	if cerr != nil || err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("after it was sent the listener is blocking (flags %#x, %v, %v)", flags, cerr, err)
	}
	_, got, err := b.Receive()
	closeAll(got)
	if err != nil {
		t.Error(err)
	}
}
