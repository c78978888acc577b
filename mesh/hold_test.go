package mesh

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"hauberk.dev/mesh/handover"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/plan"
)

// hold holds all connections for a proxy of the same version.
func (p *Proxy) hold() (*handover.Load, error) { return p.holdAs(handover.Version) }

// restless holds all connections of the proxy and goes on with them, again and
// again, until stop: in this process by turns and in a proxy that takes its place.
func restless(t *testing.T, w *world, stop <-chan struct{}) (times int) {
	for {
		select {
		case <-stop:
			return times
		case <-time.After(time.Duration(1+rand.IntN(20)) * time.Millisecond):
		}
		load, err := w.proxy.hold()
		if err != nil {
			t.Error(err)
			return times
		}
		if err := w.proxy.back(load); err != nil {
			t.Error(err)
			return times
		}
		times++
	}
}

// No caller of any protocol notices that the proxy is held, whatever it is doing.
func TestHeldInEveryProtocol(t *testing.T) {
	t.Run("pairs", func(t *testing.T) { heldInEveryProtocol(t, "127.0.0.1:0", handover.Version) })
	t.Run("tcp", func(t *testing.T) { heldInEveryProtocol(t, everywhere, handover.Version) })
	t.Run("for an older version", func(t *testing.T) { heldInEveryProtocol(t, "127.0.0.1:0", firstOfPairs-1) })
}

func heldInEveryProtocol(t *testing.T, listen string, version int) {
	n, guests := 3*len(protocols), 2*len(protocols)
	w, bank, web := callWorldAt(t, n+guests, false, listen)
	c := newCallers(t, w, bank, web, n, guests)
	for range 10 {
		c.progress(1)
		load, err := w.proxy.holdAs(version)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.proxy.back(load); err != nil {
			t.Fatal(err)
		}
		agree(t, w, bank, web)
	}
	c.progress(5)
	if failed, resets := c.end(); failed != 0 || resets != 0 {
		t.Errorf("%d failed, %d reset", failed, resets)
	}
}

// A stream whose handler learns that all is held before its link does is not reset,
// and the link that it then freezes itself is not overlooked.
func TestHeldAheadOfItsLink(t *testing.T) {
	w, bank, web := callWorld(t, 10)
	awaitIdentity(t, w, bank.Instance)
	cred := w.ca.credential(t, web.Identity, time.Hour)
	raw, err := tls.DialWithDialer(&net.Dialer{Timeout: time.Minute}, "tcp", w.gateway.String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"},
		ServerName: serverName(bank.Address), Certificates: []tls.Certificate{cred.Certificate}})
	if err != nil {
		t.Fatal(err)
	}
	h, err := hbone.Client(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	open := func() error {
		_, err := h.Open(t.Context(), fmt.Sprintf("%s:9000", bank.Address))
		return err
	}
	if err := open(); err != nil { // so the link is there
		t.Fatal(err)
	}
	w.proxy.still.begin()
	opened := make(chan error, 1)
	go func() { opened <- open() }()
	for flows := 0; flows == 0; time.Sleep(time.Millisecond) {
		w.proxy.still.mu.Lock()
		flows = len(w.proxy.still.flows)
		w.proxy.still.mu.Unlock()
		select {
		case err := <-opened:
			t.Fatalf("opened while all is held: %v", err)
		default:
		}
	}
	load, err := w.proxy.hold()
	if err == nil {
		err = w.proxy.back(load)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

// Each byte of a TCP connection arrives, and then its end, however often the
// proxy is held.
func TestHeldConnectionsGoOn(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	api := w.add("api", []plan.Port{{Port: 9000, Protocol: "tcp"}, {Port: 8080, Protocol: "http"}}, anyone(), nil)
	w.apply()
	go serveEcho(api.listen(t, 9000))
	serveHTTPEcho(t, api.listen(t, 8080))
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() { echoTCP(t, web, uint64(i)) })
		clients.Go(func() { echoHTTP(t, web, i) })
	}
	stop, done := make(chan struct{}), make(chan int)
	go func() { done <- restless(t, w, stop) }()
	clients.Wait()
	close(stop)
	if t.Failed() {
		t.Logf("events: %+v", w.events)
	}
	if n := <-done; n < 5 {
		t.Errorf("held %d times only", n)
	} else {
		t.Logf("held %d times", n)
	}
}

func serveHTTPEcho(t *testing.T, ln net.Listener) {
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		if r.URL.Path == "/slow" {
			time.Sleep(30 * time.Millisecond)
		}
		io.Copy(w, r.Body)
	})}
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
}

func echoTCP(t *testing.T, from *box, seed uint64) {
	c, err := from.dial("tcp4", "10.99.0.2:9000")
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	want := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(want)
	go func() {
		for b := want; len(b) > 0; {
			n := min(len(b), 1+rand.IntN(40<<10))
			if _, err := c.Write(b[:n]); err != nil {
				t.Error(err)
				return
			}
			b = b[n:]
		}
		c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("tcp: %d bytes of %d came back, %v", len(got), len(want), err)
	}
}

// echoHTTP asks over one connection, with bodies in both framings.
func echoHTTP(t *testing.T, from *box, seed int) {
	c, err := from.dial("tcp4", "10.99.0.2:8080")
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	in := bufio.NewReader(c)
	for i := range 60 {
		body := strings.Repeat(fmt.Sprint(seed, i, " "), rand.IntN(20000))
		req, _ := http.NewRequest("POST", "http://api/"+[]string{"", "slow"}[i%2], nil)
		req.Body = io.NopCloser(&slowly{strings.NewReader(body)})
		if req.ContentLength = int64(len(body)); i%3 == 0 {
			req.ContentLength = -1
		}
		sent := make(chan error, 1)
		go func() { sent <- req.Write(c) }()
		res, err := http.ReadResponse(in, req)
		if err != nil {
			t.Errorf("http %d: %v", i, err)
			return
		}
		got, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != 200 || string(got) != body {
			t.Errorf("http %d: status %d, %d bytes of %d, %v: %.200q", i, res.StatusCode, len(got), len(body), err, got)
			return
		}
		if err := <-sent; err != nil {
			t.Errorf("http %d: %v", i, err)
			return
		}
	}
}

type slowly struct{ r io.Reader }

func (s *slowly) Read(p []byte) (int, error) {
	if rand.IntN(8) == 0 {
		time.Sleep(time.Millisecond)
	}
	return s.r.Read(p[:min(len(p), 1+rand.IntN(8<<10))])
}

// One connection that cannot go on is lost alone, and what it was is refused by
// another process, to which nothing may come that it does not understand.
func TestOneBadConnection(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	api := w.add("api", []plan.Port{{Port: 9000, Protocol: "tcp"}}, anyone(), nil)
	w.apply()
	go serveEcho(api.listen(t, 9000))
	good, bad := web.mustDial(t, "10.99.0.2:9000"), web.mustDial(t, "10.99.0.2:9000")
	for _, c := range []net.Conn{good, bad} {
		if err := roundTrip(c, "before"); err != nil {
			t.Fatal(err)
		}
	}
	load, err := w.proxy.hold()
	if err != nil {
		t.Fatal(err)
	}
	spoilt := 0
	for i := range load.Items {
		port := fmt.Sprintf(`:%d"`, addrPort(bad.LocalAddr()).Port())
		if item := &load.Items[i]; item.Kind == itemFlow && bytes.Contains(item.Body, []byte(port)) && bytes.Contains(item.Body, []byte(`"kind":"out"`)) {
			item.Body = bytes.Replace(item.Body, []byte(`"kind":"out"`), []byte(`"kind":"odd"`), 1)
			spoilt++
		}
	}
	if spoilt != 1 {
		t.Fatalf("%d flows are the one to spoil", spoilt)
	}
	if err := w.proxy.back(load); err != nil {
		t.Fatal(err)
	}
	if err := roundTrip(good, "after"); err != nil {
		t.Errorf("the other connection: %v", err)
	}
	if err := roundTrip(bad, "after"); err == nil {
		t.Error("what could not go on goes on")
	}
	if err := web.call("10.99.0.2:9000", "new"); err != nil {
		t.Errorf("a new connection: %v", err)
	}
}

// A request whose body is still on its way when the server has answered and left
// is held as what it is: over.
func TestHeldAfterAnEarlyAnswer(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	api := w.add("api", []plan.Port{{Port: 8080, Protocol: "http"}}, anyone(), nil)
	w.apply()
	go serveOnce(api.listen(t, 8080), "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	c := web.mustDial(t, "10.99.0.2:8080")
	io.WriteString(c, "POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 100\r\n\r\nsome")
	in := bufio.NewReader(c)
	res, err := http.ReadResponse(in, nil)
	if err != nil || res.StatusCode != 413 {
		t.Fatalf("%v, %v", res, err)
	}
	load, err := w.proxy.hold()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.proxy.back(load); err != nil {
		t.Fatal(err)
	}
	if _, err := in.ReadByte(); err != io.EOF {
		t.Errorf("after the last answer: %v", err)
	}
}

// serveOnce answers each connection's first bytes, and ends it.
func serveOnce(ln net.Listener, answer string) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			c.Read(make([]byte, 4096))
			io.WriteString(c, answer)
			c.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, c)
		}()
	}
}

// A refusal does not land in the middle of an answer that was half out when the
// connection was held.
func TestRefusalWaitsForTheRestOfAnAnswer(t *testing.T) {
	client, near := net.Pipe()
	server, far := net.Pipe()
	defer far.Close()
	judged := make(chan struct{})
	x := &rpcExchange{entry: &entry{}, client: pipeSide{near}, server: pipeSide{server}, protocol: "bolt", deep: func() bool { return true },
		maybe: func() bool { return true }, reserve: func(int) bool { return true }, judge: func(rpcCodec) (fault, string) { close(judged); return faultDenied, "no" }, malformed: func(error) {}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		x.run(&rpcState{Met: true, Replies: framesState{Left: 10}, Requests: framesState{Unread: boltCall(7, "svc", "get", false, "x")}})
	}()
	go func() {
		<-judged // its answer is next, if nothing holds it
		time.Sleep(50 * time.Millisecond)
		far.Write([]byte("0123456789"))
	}()
	got := make([]byte, 10+22)
	if _, err := io.ReadFull(client, got); err != nil || string(got[:10]) != "0123456789" {
		t.Errorf("the client gets %q, %v", got, err)
	}
	far.Close()
	client.Close()
	<-done
}

// pipeSide is a side of a net.Pipe.
type pipeSide struct{ net.Conn }

func (p pipeSide) CloseWrite() error { return nil }
func (p pipeSide) abort()            { p.Close() }
func (p pipeSide) finish()           { p.Close() }
