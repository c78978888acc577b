package tls13

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"hauberk.dev/mesh/wire"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The trace of RFC 8448 section 3: keys of its secrets, and its records.
func TestTrace(t *testing.T) {
	su, err := suiteOf(tls.TLS_AES_128_GCM_SHA256)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, secret, key, iv string }{
		{"client", "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5", "17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9"},
		{"server", "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643", "9f02283b6c9c07efc26bb9f2ac92e356", "cf782b88dd83549aadf1e984"},
	} {
		key, err1 := su.expand(unhex(t, c.secret), "key", 16)
		iv, err2 := su.expand(unhex(t, c.secret), "iv", nonceLen)
		if err1 != nil || err2 != nil || hex.EncodeToString(key) != c.key || hex.EncodeToString(iv) != c.iv {
			t.Errorf("%s: key %x iv %x, %v %v", c.name, key, iv, err1, err2)
		}
	}
	var h half
	if err := h.key(su, unhex(t, "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5")); err != nil {
		t.Fatal(err)
	}
	text := make([]byte, 50)
	for i := range text {
		text[i] = byte(i)
	}
	got, err := h.seal(make([]byte, 0, 256), kindData, text)
	want := unhex(t, "1703030043 a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2977014bd1e3deae63aeebb21694915e4")
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("data:\n%x, want\n%x, %v", got, want, err)
	}
	// close_notify of the client is its next record.
	got, err = h.seal(make([]byte, 0, 256), kindAlert, []byte{1, 0})
	want = unhex(t, "1703030013 c9872760655666b74d7ff1153efd6db6d0b0e3")
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("close_notify:\n%x, want\n%x, %v", got, want, err)
	}
}

// Handshakes of ours with crypto/tls, in both roles, and with ourselves.
func TestHandshake(t *testing.T) {
	p := paper(t)
	chosen := &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return p.server(), nil }}
	for name, cfg := range map[string]*tls.Config{"plain": p.server(), "chosen": chosen} {
		t.Run("server/"+name, func(t *testing.T) {
			a, b := sockets(t)
			done := shakeBeside(t, Server, b, cfg)
			c := tls.Client(a, p.client())
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			m := <-done
			if m.err != nil {
				t.Fatal(m.err)
			}
			checkFacts(t, m.c)
			converse(t, c, m.c)
		})
	}
	t.Run("client", func(t *testing.T) {
		a, b := sockets(t)
		done := shakeBeside(t, Client, a, p.client())
		c := tls.Server(b, p.server()) // which gives out tickets
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		m := <-done
		if m.err != nil {
			t.Fatal(m.err)
		}
		checkFacts(t, m.c)
		converse(t, c, m.c)
	})
	t.Run("both", func(t *testing.T) {
		a, b := sockets(t)
		done := shakeBeside(t, Client, a, p.client())
		server := <-shakeBeside(t, Server, b, p.server())
		client := <-done
		if err := errors.Join(server.err, client.err); err != nil {
			t.Fatal(err)
		}
		converse(t, client.c, server.c)
	})
}

func checkFacts(t *testing.T, c *Conn) {
	t.Helper()
	for range 2 { // before and after a move
		cs := c.ConnectionState()
		if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != "h2" || !cs.HandshakeComplete || cs.CurveID != tls.X25519MLKEM768 ||
			len(cs.PeerCertificates) != 1 || c.PeerCertificate().Subject.CommonName != "peer" {
			t.Errorf("facts: %+v", cs)
		}
		b, err := json.Marshal(c.State())
		var s State
		if err := errors.Join(err, json.Unmarshal(b, &s)); err != nil {
			t.Fatal(err)
		}
		if c, err = Resume(c.wire, s, c.client); err != nil {
			t.Fatal(err)
		}
	}
}

// converse sends sizes around every edge both ways, then ends a's half, and
// then b's.
func converse(t *testing.T, a net.Conn, b *Conn) {
	t.Helper()
	var sent []byte
	for _, n := range []int{1, 2, maxPlain - 1, maxPlain, maxPlain + 1, 4*maxPlain + 1, 9 * maxPlain, 3} {
		chunk := make([]byte, n)
		for i := range chunk {
			chunk[i] = byte(n + i*7)
		}
		sent = append(sent, chunk...)
	}
	for _, way := range []struct{ from, to net.Conn }{{a, b}, {b, a}} {
		go func() {
			for rest := sent; len(rest) > 0; {
				n := min(len(rest), 5*maxPlain+11)
				if _, err := way.from.Write(rest[:n]); err != nil {
					t.Error(err)
					return
				}
				rest = rest[n:]
			}
			way.from.(interface{ CloseWrite() error }).CloseWrite()
		}()
		got, err := io.ReadAll(way.to)
		if err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%d bytes, want %d; %v", len(got), len(sent), err)
		}
	}
	if _, err := b.Write([]byte("x")); !errors.Is(err, errEnded) {
		t.Errorf("write after the end: %v", err)
	}
	a.Close()
	b.Close()
}

func TestHandshakeFails(t *testing.T) {
	p, stranger := paper(t), paper(t)
	a, b := sockets(t)
	done := shakeBeside(t, Server, b, p.server())
	c := tls.Client(a, stranger.client())
	c.Handshake()
	if m := <-done; m.err == nil {
		t.Error("a handshake with a stranger was a success")
	}
	old, far := sockets(t)
	go func() {
		cfg := p.client()
		cfg.MaxVersion = tls.VersionTLS12
		tls.Client(old, cfg).Handshake()
	}()
	if m := <-shakeBeside(t, Server, far, p.server()); m.err == nil {
		t.Error("TLS 1.2 was a success")
	}
}

// A client whose certificate is refused learns it from the record layer.
func TestCertificateRefused(t *testing.T) {
	p, stranger := paper(t), paper(t)
	a, b := sockets(t)
	go tls.Server(b, p.server()).Handshake() // the socket stays open: a reset would overtake the alert
	cfg := p.client()
	cfg.Certificates = []tls.Certificate{stranger.cert}
	m := <-shakeBeside(t, Client, a, cfg)
	if m.err != nil {
		t.Fatal(m.err)
	}
	_, err := m.c.Read(make([]byte, 1))
	var alert tls.AlertError
	if !errors.As(err, &alert) {
		t.Errorf("the client learns: %v", err)
	}
}

// Two ends of each suite speak to each other, with key updates of both all the
// while.
func TestSuites(t *testing.T) {
	for _, id := range suites {
		t.Run(tls.CipherSuiteName(id), func(t *testing.T) {
			client, server := pair(t, id)
			client.rekeyed, server.rekeyed = 3, 5
			converse(t, client, server)
			if !bytes.Equal(client.out.secret(), server.in.secret()) || !bytes.Equal(client.in.secret(), server.out.secret()) {
				t.Error("the ends have gone different ways")
			}
			if bytes.Equal(client.out.secret(), bytes.Repeat([]byte{'c'}, len(client.out.secret()))) {
				t.Error("no key was updated")
			}
		})
	}
}

// A connection is frozen, put into JSON and taken up again at random instants,
// on both sides, while both send and key updates go to and fro; no byte is lost,
// doubled or changed, and the ends are as they were sent.
func TestMoved(t *testing.T) {
	const size = 6 << 20
	for i, id := range suites {
		t.Run(tls.CipherSuiteName(id), func(t *testing.T) {
			client, server := pair(t, id)
			var all sync.WaitGroup
			var last [2]*Conn
			for k, c := range []*Conn{client, server} {
				c.rekeyed = 50
				seed := uint64(i*2 + k)
				all.Go(func() { last[k] = restless(t, c, seed, seed^1, size) })
			}
			all.Wait()
			for _, c := range last {
				c.Close()
			}
		})
	}
}

// restless sends a stream and expects another on a connection that it moves all
// the time.
func restless(t *testing.T, c *Conn, mine, theirs uint64, size int) *Conn {
	pick := rand.New(rand.NewPCG(mine, 99))
	out, in := stream(mine, size), stream(theirs, size)
	w, r := &progress{left: out}, &progress{left: in}
	moves := 0
	for !w.done || !r.done {
		var users sync.WaitGroup
		var left atomic.Int64
		left.Store(int64(1 + pick.IntN(48<<10)))
		tired := func(n int) {
			if left.Add(int64(-n)) <= 0 {
				c.Freeze()
			}
		}
		users.Go(func() { w.write(c, tired) })
		users.Go(func() { r.read(c, tired) })
		users.Wait() // one of them freezes it, wherever the other is then
		for _, err := range []error{w.err, r.err} {
			if err != nil {
				t.Error(err)
				c.wire.Abort()
				return c
			}
		}
		c.Freeze()
		c = moved(t, c)
		c.rekeyed = 50
		moves++
	}
	if moves < 50 {
		t.Errorf("moved %d times only", moves)
	}
	return c
}

func stream(seed uint64, n int) []byte {
	var key [32]byte
	key[0] = byte(seed)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

// TestSecretsAreNotShown prints whatever holds secrets in every way there is.
func TestSecretsAreNotShown(t *testing.T) {
	client, server := pair(t, tls.TLS_AES_128_GCM_SHA256)
	server.Write([]byte("0123456789"))
	client.Read(make([]byte, 1))
	s := client.State()
	var log bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(h).Info("x", "state", s, "conn", client)
	}
	type holder struct {
		State  State
		own    State
		secret func() []byte
	}
	for _, v := range []any{s, &s, client, holder{s, s, client.in.secret}, &holder{s, s, client.in.secret}, map[string]State{"x": s}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&log, verb+"\n", v)
		}
	}
	fmt.Fprintf(&log, "%v %+v %#v", struct{ c *Conn }{client}, &client.in, client.in)
	shown := log.String()
	secret := strings.Repeat("s", 32)
	for _, form := range []string{secret, hex.EncodeToString([]byte(secret)), "115 115 115", "0x73, 0x73", "c3Nzc3Nz", "123456789"} {
		if strings.Contains(shown, form) {
			t.Errorf("shown as %s in\n%s", form, shown)
		}
	}
	if !strings.Contains(shown, hidden) || !strings.Contains(shown, "tls13 127.0.0.1:") {
		t.Errorf("nothing was printed: %s", shown)
	}
	out, err := json.Marshal(s)
	if err != nil || !bytes.Contains(out, []byte("c3Nzc3Nz")) {
		t.Errorf("the hand-over has no secret: %s, %v", out, err)
	}
	s.Forget()
	if out, _ = json.Marshal(s); bytes.Contains(out, []byte("c3Nzc3Nz")) {
		t.Error("a secret outlives Forget")
	}
}

// What a frozen connection is given to send is sent once it thaws, the end too.
func TestFrozenWrites(t *testing.T) {
	client, server := pair(t, tls.TLS_CHACHA20_POLY1305_SHA256)
	client.Freeze()
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, wire.ErrFrozen) {
		t.Errorf("read: %v", err)
	}
	if _, err := client.Write([]byte("kept")); err != nil {
		t.Fatal(err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	client = moved(t, client)
	if got, err := io.ReadAll(server); err != nil || string(got) != "kept" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := client.Write([]byte("x")); !errors.Is(err, errEnded) {
		t.Errorf("write after the end: %v", err)
	}
	server.Write([]byte("answer"))
	server.Close()
	if got, err := io.ReadAll(client); err != nil || string(got) != "answer" {
		t.Errorf("%q, %v", got, err)
	}
}
