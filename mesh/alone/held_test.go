package alone

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
)

// Clients that do not read hold no more of large answers than all may.
func TestUnreadAnswers(t *testing.T) {
	const large = 1 << 20
	held := &holding{most: 3*large + 100}
	var all []*outbox
	var ends []net.Conn
	full := 0
	for range 5 {
		near, far := net.Pipe() // nobody reads
		o := newOutbox(near, held)
		go o.run(time.Hour)
		all, ends = append(all, o), append(ends, far)
		switch err := o.add(make([]byte, large)); err {
		case nil:
		case errHeld:
			full++
		default:
			t.Fatal(err)
		}
		if err := o.add([]byte("small")); err != nil {
			t.Error(err)
		}
		if n := held.n.Load(); n > held.most {
			t.Errorf("%d bytes held", n)
		}
	}
	if full != 2 {
		t.Errorf("%d of 5 were not taken", full)
	}
	ends[0].SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(ends[0], make([]byte, large+5)); err != nil { // one of them reads
		t.Error(err)
	}
	waitFor(t, "room for what was read", func() bool { return held.n.Load() < 2*large+100 })
	if err := all[4].add(make([]byte, large)); err != nil {
		t.Error(err)
	}
	for i, o := range all {
		o.close()
		<-o.done
		ends[i].Close()
	}
	if n := held.n.Load(); n != 0 {
		t.Errorf("%d bytes are held for nobody", n)
	}
}

// Small answers that nobody reads are no way around that.
func TestUnreadSmallAnswers(t *testing.T) {
	const boxes, size = 10, 1 << 10
	held := &holding{most: 4 << 20}
	var all []*outbox
	for range boxes {
		near, far := net.Pipe()
		defer far.Close()
		o := newOutbox(near, held)
		go o.run(time.Hour)
		all = append(all, o)
	}
	taken, frame := 0, make([]byte, size)
	for i := range 20_000 {
		switch err := all[i%boxes].add(frame); err {
		case nil:
			taken += size
		case errHeld, errUnread:
		default:
			t.Fatal(err)
		}
		if n := held.n.Load(); n > held.most {
			t.Fatalf("%d bytes held", n)
		}
	}
	if most := int(held.most) + boxes*2*blockSize; taken < int(held.most) || taken > most {
		t.Errorf("%d bytes wait; at most %d may", taken, most)
	}
	for _, o := range all {
		o.close()
		<-o.done
	}
	if n := held.n.Load(); n != 0 {
		t.Errorf("%d bytes are held for nobody", n)
	}
}

// A client whose answer is one too many is told so, and gives back what it held.
func TestUnreadCalls(t *testing.T) {
	o := newRPCOrigin(t, strings.Repeat("o", 40<<10), false) // which it answers with
	c, err := Parse("proxy.yaml", t.TempDir(), []byte(rpcConfig("bolt", "  - {upstream: up}", "up", endpointsOf(o))))
	if err != nil {
		t.Fatal(err)
	}
	p, err := Open(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.answers.most = 60 << 10 // the answer as it comes, and no other
	run(t, p)
	x := newRPCTester(t, p, "rpc", false)
	x.send(callOf(false, 1, "com.test.S", "m"))
	if f := x.next(); f.id != 1 || f.bolt.Status != bolt.Busy {
		t.Errorf("%+v", f)
	}
	if o.calls.Load() != 1 {
		t.Error("the call did not reach its server")
	}
	waitFor(t, "end of what is held", func() bool { return p.answers.n.Load() == 0 })
}

// run runs a proxy to the end of the test.
func run(t testing.TB, p *Proxy) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// Clients of IPv4 are told apart also where their addresses come as IPv6.
func TestRateMapped(t *testing.T) {
	l := newLimiter(&Rate{Requests: 1, Per: Duration(time.Hour), Burst: 1, By: "client"})
	for address, want := range map[string]bool{"::ffff:192.0.2.1": true, "::ffff:192.0.2.2": true} {
		if ok, _ := l.allow(netip.MustParseAddr(address), time.Now()); ok != want {
			t.Errorf("%s: %v", address, ok)
		}
	}
	if ok, _ := l.allow(netip.MustParseAddr("192.0.2.1"), time.Now()); ok {
		t.Error("one address is two clients")
	}
}

// Connections in use when authorities change serve no other request.
func TestTrustChangesInUse(t *testing.T) {
	dir := t.TempDir()
	certify(t, dir, "a", "up.example")
	certify(t, dir, "b", "up.example")
	pair, err := tls.LoadX509KeyPair(dir+"/a.pem", dir+"/a.key")
	if err != nil {
		t.Fatal(err)
	}
	begun, end := make(chan struct{}), make(chan struct{})
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(begun)
			<-end
		}
	}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	s.StartTLS()
	t.Cleanup(s.Close)
	trust := func(file string) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "ca"), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	trust("a.pem")
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamOf(strings.TrimPrefix(s.URL, "https://")), "  tls: {name: up.example, ca: '"+dir+"/ca'}"))
	status := make(chan int, 1)
	go func() {
		resp, err := clientOne(t).Get("http://" + p.Address("web").String() + "/slow")
		if err != nil {
			t.Error(err)
			status <- 0
			return
		}
		resp.Body.Close()
		status <- resp.StatusCode
	}()
	<-begun
	trust("b.pem")
	u := p.world.Load().upstreams["up"]
	if !u.tls.refresh(p.log) {
		t.Log("the proxy was first to see it")
	}
	u.renew()
	close(end)
	if got := <-status; got != 200 {
		t.Errorf("under way: %d", got)
	}
	waitFor(t, "end of the request", func() bool { return u.endpoints[0].active.Load() == 0 })
	if resp, _ := get(t, p, "GET", "/", nil, nil); resp.StatusCode != 503 {
		t.Errorf("%d from a server that is not trusted any more", resp.StatusCode)
	}
}

// drained is a connection that many share.
type drained struct{ gone bool }

func (d *drained) takes() bool           { return !d.gone }
func (d *drained) load() (int, int)      { return 0, 1 }
func (d *drained) drain()                { d.gone = true }
func (d *drained) unused(time.Time) bool { return false }

// A connection that is being made while the rules change is not used.
func TestSharedRenewed(t *testing.T) {
	var x shared[*drained]
	var made []*drained
	c, _, err := x.get(context.Background(), 2, func() (*drained, error) {
		d := new(drained)
		if made = append(made, d); len(made) == 1 {
			x.renew()
		}
		return d, nil
	})
	if err != nil || len(made) != 2 || c != made[1] || c.gone || !made[0].gone || len(x.conns) != 1 {
		t.Errorf("%v of %v, %v", c, made, err)
	}
}

// An answer to HEAD over HTTP/2 that says no length says none.
func TestHeadWithoutLength(t *testing.T) {
	up := originTwo(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "HEAD" {
			return
		}
		w.Header().Set("X-Head", "yes")
		w.(http.Flusher).Flush()
	})
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamTwo(up)))
	if resp, _ := get(t, p, "HEAD", "/", nil, nil); resp.Header.Get("X-Head") != "yes" || resp.Header["Content-Length"] != nil {
		t.Errorf("%v", resp.Header)
	}
	if resp, _ := get(t, p, "GET", "/", nil, nil); resp.ContentLength != 0 {
		t.Errorf("%v", resp.Header)
	}
}

// writer tells what is written to it.
type writer func(p []byte)

func (w writer) Write(p []byte) (int, error) { w(p); return len(p), nil }

// Trailers that come after a body that has told its length are at hand when its last
// byte is passed on.
func TestTrailersAfterLength(t *testing.T) {
	s, a, srv := uploader(&timed{read: ended0}, &timed{})
	s.two, srv.two = new(asking), new(call)
	s.req.Framing, s.req.Length = http1.Length, 4
	s.body.Start(http1.Length, 4)
	s.in.take()
	s.in.end = copy(s.in.b[:], "body")
	wrote := 0
	s.up.w = writer(func(p []byte) {
		if wrote += len(p); len(srv.two.after) != 1 {
			t.Errorf("%q is passed on before what ends it", p)
		}
	})
	go s.two.Trailers([]http2.Field{{Name: "x-after", Value: "after"}})
	if err := s.passBody(a, srv); err != nil || wrote != 4 {
		t.Errorf("%d bytes, %v", wrote, err)
	}
}

// A call that finds no room is told that there is none.
func TestCallOverflow(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	s, _, _ := uploader(&timed{Conn: near, read: ended0}, &timed{})
	s.p = &Proxy{}
	s.l = &listener{}
	s.callFailed(fmt.Errorf("call: %w", balance.ErrOverflow))
	if s.status != 503 {
		t.Errorf("%d", s.status)
	}
}
