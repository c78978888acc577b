package link

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/internal/unixsock"
	"hauberk.dev/plan"
)

// proxy plays the other end, as badly as a test wants.
func proxy(t *testing.T, handle Handler) (path string, session func() *Session) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "mesh.sock")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan *Session, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := ln.AcceptUnix()
		if err != nil {
			return
		}
		s := NewSession(api.NewConn(c, 1<<20), handle, 0)
		got <- s
		s.Run(ctx)
	}()
	t.Cleanup(func() { ln.Close(); cancel(); <-done })
	return path, func() *Session { return <-got }
}

// polite answers everything with nothing, but hello properly.
func polite(_ context.Context, m *api.Message, files []*os.File) (*api.Message, []*os.File, error) {
	closeAll(files)
	if m.Kind == api.KindHello {
		return &api.Message{Hello: &api.Hello{Version: api.Version, Process: 1}}, nil, nil
	}
	return nil, nil, nil
}

func csr(t *testing.T, uris ...string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r := &x509.CertificateRequest{}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		r.URIs = append(r.URIs, u)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func null(t *testing.T) *os.File {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// A proxy in an attacker's hands gets nothing for instances it was not given,
// nothing for malformed requests, and cannot give the node orders.
func TestHostileProxy(t *testing.T) {
	path, session := proxy(t, polite)
	var signed atomic.Int32
	l, err := Dial(context.Background(), path, Handlers{
		Sign: func(context.Context, string, []byte) ([][]byte, []byte, error) {
			signed.Add(1)
			return [][]byte{{1}}, []byte("roots"), nil
		},
		Sockets: func(_ string, n int) (files []*os.File, err error) {
			return slices.Repeat([]*os.File{null(t)}, n)[:1], nil
		},
		Event: func(api.Event) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := session()
	ctx := context.Background()
	f := null(t)
	box := plan.Sandbox{Instance: "mine", Address: netip.MustParseAddr("10.88.0.1")}
	if err := l.AddSandbox(ctx, box, f, f, f); err != nil {
		t.Fatal(err)
	}
	good := csr(t, "spiffe://t/ns/a/sa/b")
	tampered := slices.Clone(good)
	tampered[len(tampered)-1] ^= 1
	for name, m := range map[string]*api.Message{
		"another's certificate": {Kind: api.KindCSR, Instance: "other", CSR: good},
		"another's sockets":     {Kind: api.KindSockets, Instance: "other", Count: 1},
		"garbage for a CSR":     {Kind: api.KindCSR, Instance: "mine", CSR: []byte("garbage")},
		"a tampered CSR":        {Kind: api.KindCSR, Instance: "mine", CSR: tampered},
		"a CSR without name":    {Kind: api.KindCSR, Instance: "mine", CSR: csr(t)},
		"a CSR with two":        {Kind: api.KindCSR, Instance: "mine", CSR: csr(t, "spiffe://t/ns/a/sa/b", "spiffe://t/ns/a/sa/c")},
		"an order":              {Kind: api.KindRemove, Instance: "mine"},
	} {
		_, files, err := s.Call(ctx, m)
		closeAll(files)
		var refused *RefusedError
		if !errors.As(err, &refused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if signed.Load() != 0 {
		t.Errorf("%d requests reached the signer", signed.Load())
	}
	reply, _, err := s.Call(ctx, &api.Message{Kind: api.KindCSR, Instance: "mine", CSR: good})
	if err != nil || signed.Load() != 1 || reply.Certificate == nil || reply.Certificate.Roots != "roots" {
		t.Errorf("a good request: %+v, %v", reply, err)
	}
	if err := l.RemoveSandbox(ctx, "mine"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Call(ctx, &api.Message{Kind: api.KindCSR, Instance: "mine", CSR: good}); err == nil {
		t.Error("a removed instance got a certificate")
	}
	// Bytes that are no message end the link.
	if err := s.conn.Send(&api.Message{Kind: api.KindAck, Seq: 99}); err != nil {
		t.Error(err) // an answer nobody waits for is ignored
	}
	if err := l.Ping(ctx); err != nil {
		t.Error(err)
	}
}

// TestEventsAreBounded: a proxy's words cost the node little, however many they are.
func TestEventsAreBounded(t *testing.T) {
	path, session := proxy(t, polite)
	events := make(chan api.Event, 1)
	l, err := Dial(t.Context(), path, Handlers{
		Sign:    func(context.Context, string, []byte) ([][]byte, []byte, error) { return nil, nil, nil },
		Sockets: func(string, int) ([]*os.File, error) { return nil, nil }, Event: func(e api.Event) { events <- e }})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, long := session(), strings.Repeat("x", 1<<20)
	if _, _, err := s.Call(t.Context(), &api.Message{Kind: api.KindEvent, Event: &api.Event{Kind: "k", Peer: long, Source: long, Destination: long, Service: long, Rule: long, Reason: long}}); err != nil {
		t.Fatal(err)
	}
	if text, err := json.Marshal(<-events); err != nil || len(text) > 6*maxWords+256 {
		t.Errorf("an event of %d bytes, %v", len(text), err)
	}
	for _, e := range []api.Event{{Kind: api.EventKind(long)}, {Kind: "k", Instance: long}, {Kind: "k", Offender: long}} {
		if _, _, err := s.Call(t.Context(), &api.Message{Kind: api.KindEvent, Event: &e}); err == nil {
			t.Errorf("taken: %.100v", e)
		}
	}
}

// Answers that make no sense are errors.
func TestBadAnswers(t *testing.T) {
	path, _ := proxy(t, polite)
	l, err := Dial(context.Background(), path, Handlers{
		Sign:    func(context.Context, string, []byte) ([][]byte, []byte, error) { return nil, nil, nil },
		Sockets: func(string, int) ([]*os.File, error) { return nil, nil }, Event: func(api.Event) {}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx := context.Background()
	if _, err := l.Cut(ctx, plan.Epoch{Number: 3}); err == nil {
		t.Error("no receipt was taken for one")
	}
	if _, err := l.Stats(ctx); err == nil {
		t.Error("no stats were taken for some")
	}
	if err := l.SetGateway(ctx, nil); err == nil {
		t.Error("a missing file was sent")
	}
	if _, err := Dial(ctx, path, Handlers{}); err == nil {
		t.Error("dialled without handlers")
	}
	if _, err := Dial(ctx, path+"x", l.handlers); err == nil {
		t.Error("dialled nothing")
	}
}

// The other side's end fails calls that wait, at once.
func TestEnd(t *testing.T) {
	hang := make(chan struct{})
	path, session := proxy(t, func(ctx context.Context, m *api.Message, files []*os.File) (*api.Message, []*os.File, error) {
		if m.Kind == api.KindPing {
			<-hang
		}
		return polite(ctx, m, files)
	})
	l, err := Dial(context.Background(), path, Handlers{
		Sign:    func(context.Context, string, []byte) ([][]byte, []byte, error) { return nil, nil, nil },
		Sockets: func(string, int) ([]*os.File, error) { return nil, nil }, Event: func(api.Event) {}})
	if err != nil {
		t.Fatal(err)
	}
	s := session()
	failed := make(chan error, 1)
	go func() { failed <- l.Ping(context.Background()) }()
	time.Sleep(10 * time.Millisecond)
	s.conn.Close()
	close(hang)
	select {
	case err := <-failed:
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the call hangs")
	}
	<-l.Done()
	if err := l.Ping(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	l.Close()
}

func TestVersion(t *testing.T) {
	path, _ := proxy(t, func(_ context.Context, m *api.Message, _ []*os.File) (*api.Message, []*os.File, error) {
		return &api.Message{Hello: &api.Hello{Version: api.Version + 1}}, nil, nil
	})
	_, err := Dial(context.Background(), path, Handlers{
		Sign:    func(context.Context, string, []byte) ([][]byte, []byte, error) { return nil, nil, nil },
		Sockets: func(string, int) ([]*os.File, error) { return nil, nil }, Event: func(api.Event) {}})
	if err == nil || !strings.Contains(err.Error(), "another version") {
		t.Errorf("%v", err)
	}
}

// What a newer peer asks is answered with an error, with files or
// without, and the session goes on. An answer that is not understood ends it, as
// whoever waits for it would go on waiting.
func TestUnknownRequests(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		ends[i].SetDeadline(time.Now().Add(time.Minute))
		t.Cleanup(func() { c.Close() })
	}
	ended := make(chan error, 1)
	go func() { ended <- NewSession(api.NewConn(ends[0], 1<<20), polite, 0).Run(t.Context()) }()
	asker := api.NewConn(ends[1], 0)
	for i, c := range []struct {
		ask, refused string
		file         bool
	}{
		{`{"kind":"newer","seq":1}`, "unknown kind", false},
		{`{"kind":"newer","seq":2,"more":[1]}`, "unknown field", false},
		{`{"kind":"newer","seq":3}`, "unknown kind", true},
		{`{"kind":"hello","seq":4,"hello":{"version":1,"process":2,"more":3}}`, "unknown field", false},
		{`{"kind":"ping","seq":5}`, "", false},
	} {
		var files []*os.File
		if c.file {
			files = append(files, null(t))
		}
		if err := unixsock.Send(ends[1], []byte(c.ask), files...); err != nil {
			t.Fatal(err)
		}
		m, _, err := asker.Receive()
		if err != nil || m.Kind != api.KindAck || m.Seq != uint64(i+1) || (m.Error == "") != (c.refused == "") || !strings.Contains(m.Error, c.refused) {
			t.Fatalf("%s: answered %+v, %v", c.ask, m, err)
		}
	}
	if _, err := ends[1].Write([]byte(`{"kind":"ack","seq":5,"more":1}`)); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "unknown field") {
		t.Errorf("ended by %v", err)
	}
}
