package mesh

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	pb "google.golang.org/grpc/interop/grpc_testing"

	"hauberk.dev/id"
	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/plan"
)

var callerPorts = []plan.Port{{Port: 9000, Protocol: "tcp"}, {Port: 8080, Protocol: "http"}, {Port: 9090, Protocol: "grpc"},
	{Port: 12200, Protocol: "bolt"}, {Port: 20880, Protocol: "dubbo"}}

// callers are clients that must not notice an upgrade: connections to the
// gateway, each with a stream to a port of one guest, on which requests are
// always under way. Every fault is counted, at the client.
type callers struct {
	t    testing.TB
	w    *world
	to   *box
	from *box
	cred id.Credential
	// over tells them to end what they have begun, and no more.
	over chan struct{}
	// slow is what an answer takes at most, so that many are always awaited and
	// the machine is not all taken.
	slow int // in ms
	wg   sync.WaitGroup

	open    atomic.Int64 // connections
	flight  atomic.Int64 // requests and streams under way
	answers sync.Map     // protocol -> *atomic.Int64
	bytes   atomic.Int64

	mu     sync.Mutex
	faults map[string]int
	failed int // requests and streams
	resets int // connections
}

// protocols are what callers speak; a connection of each kind in turn.
var protocols = []struct {
	name string
	port uint16
	run  func(*callers, *rand.Rand, *caller) error
}{
	{"tcp", 9000, (*callers).tcp},
	{"http", 8080, (*callers).http},
	{"grpc", 9090, (*callers).grpc},
	{"bolt", 12200, (*callers).bolt},
	{"dubbo", 20880, (*callers).dubbo},
	{"http long", 8080, (*callers).httpLong},
	{"grpc long", 9090, (*callers).grpcLong},
}

// caller is a stream of the gateway, or a connection of a guest.
type caller struct {
	io.ReadWriter
	end       func() error // of our half
	reset     func()
	own, peer net.Addr
	count     *atomic.Int64
}

func (c *caller) CloseWrite() error                { return c.end() }
func (c *caller) Close() error                     { c.reset(); return nil }
func (c *caller) LocalAddr() net.Addr              { return c.own }
func (c *caller) RemoteAddr() net.Addr             { return c.peer }
func (c *caller) SetDeadline(time.Time) error      { return nil }
func (c *caller) SetReadDeadline(time.Time) error  { return nil }
func (c *caller) SetWriteDeadline(time.Time) error { return nil }

// newCallers opens n connections to a guest that serves every protocol, and as
// many of another guest as guests says, which go through the proxy on their way
// out too.
func newCallers(t testing.TB, w *world, to, from *box, n, guests int) *callers {
	t.Helper()
	awaitIdentity(t, w, to.Instance)
	c := &callers{t: t, w: w, to: to, from: from, cred: w.ca.credential(t, from.Identity, time.Hour), over: make(chan struct{}), slow: slowness(n + guests), faults: map[string]int{}}
	var opening sync.WaitGroup
	door := make(chan struct{}, 16)
	for i := range n + guests {
		opening.Add(1)
		c.wg.Go(func() { c.call(i, i >= n, door, opening.Done) })
	}
	opening.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return c
}

// call opens a connection and uses it until all is over.
func (c *callers) call(i int, guest bool, door chan struct{}, opened func()) {
	p := protocols[i%len(protocols)]
	n, _ := c.answers.LoadOrStore(p.name, new(atomic.Int64))
	door <- struct{}{}
	var s *caller
	var err error
	fault := func() error { return nil }
	if guest {
		s, err = c.dialGuest(p.port)
	} else {
		s, fault, err = c.dialGateway(p.port)
	}
	<-door
	if err != nil {
		c.t.Errorf("open %s: %v", p.name, err)
		opened()
		return
	}
	defer s.reset()
	s.count = n.(*atomic.Int64)
	c.open.Add(1)
	opened()
	err = p.run(c, rand.New(rand.NewPCG(uint64(i), 1)), s)
	c.open.Add(-1)
	if err = errors.Join(err, fault()); err != nil {
		c.fault(p.name, err, fault() != nil)
	}
}

func (c *callers) dialGuest(port uint16) (*caller, error) {
	conn, err := c.from.dial("tcp4", fmt.Sprintf("%s:%d", c.w.service("bank").Address, port))
	if err != nil {
		return nil, err
	}
	tcp := conn.(*net.TCPConn)
	return &caller{ReadWriter: tcp, end: tcp.CloseWrite, reset: func() { tcp.Close() }, own: tcp.LocalAddr(), peer: tcp.RemoteAddr()}, nil
}

// dialGateway opens a stream on a connection of its own. fault tells why that
// has ended, if it has.
func (c *callers) dialGateway(port uint16) (s *caller, fault func() error, err error) {
	raw, err := tls.DialWithDialer(&net.Dialer{Timeout: time.Minute}, "tcp", c.w.gateway.String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"},
		ServerName: serverName(c.to.Address), Certificates: []tls.Certificate{c.cred.Certificate}})
	if err != nil {
		return nil, nil, err
	}
	h, err := hbone.Client(raw)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream, err := h.Open(ctx, fmt.Sprintf("%s:%d", c.to.Address, port))
	if err != nil {
		h.Close()
		return nil, nil, err
	}
	return &caller{ReadWriter: stream, end: stream.CloseWrite, reset: func() { h.Close() }, own: raw.LocalAddr(), peer: raw.RemoteAddr()}, func() error {
		if err := h.Err(); err != hbone.ErrClosed { // which is our own doing
			return err
		}
		return nil
	}, nil
}

// fault counts a failed request or stream, and the connection if it is gone.
func (c *callers) fault(protocol string, err error, gone bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failed++
	var reset *hbone.ResetError
	// gRPC says it in words alone.
	if gone || errors.As(err, &reset) || strings.Contains(err.Error(), syscall.ECONNRESET.Error()) || strings.Contains(err.Error(), lost) || strings.Contains(err.Error(), "reset by the peer") {
		c.resets++
	}
	c.faults[fmt.Sprintf("%s: %v", protocol, err)]++
}

// end lets the callers end in order and tells what they counted.
func (c *callers) end() (failed, resets int) {
	c.t.Helper()
	close(c.over)
	done := make(chan struct{})
	go func() { c.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		b := make([]byte, 1<<20)
		c.t.Errorf("%d callers wait for ever:\n%s", c.open.Load(), b[:runtime.Stack(b, true)])
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	said := 0
	for what, n := range c.faults {
		if said++; said <= 10 {
			c.t.Logf("%d times %s", n, what)
		}
	}
	return c.failed, c.resets
}

// progress waits until every protocol has had so many more answers.
func (c *callers) progress(more int64) {
	c.t.Helper()
	counts := func() map[any]int64 {
		m := map[any]int64{}
		c.answers.Range(func(k, v any) bool { m[k] = v.(*atomic.Int64).Load(); return true })
		return m
	}
	before := counts()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		behind := 0
		now := counts()
		for k, n := range before {
			if now[k] < n+more {
				behind++
			}
		}
		switch {
		case behind == 0:
			return
		case time.Now().After(end):
			c.t.Errorf("nothing goes on: %v, then %v", before, now)
			return
		}
	}
}

func (c *callers) isOver() bool {
	select {
	case <-c.over:
		return true
	default:
		return false
	}
}

// answered counts an answer.
func (c *callers) answered(s *caller, bytes int) {
	s.count.Add(1)
	c.bytes.Add(int64(bytes))
}

// pattern fills b with what stands at an offset of a stream.
func pattern(b []byte, at int) {
	for i := range b {
		b[i] = byte((at+i)>>8) ^ byte(at+i)
	}
}

func checkPattern(b []byte, at int) error {
	want := make([]byte, len(b))
	pattern(want, at)
	if !bytes.Equal(b, want) {
		return fmt.Errorf("other bytes than were sent, near byte %d", at)
	}
	return nil
}

// tcp sends and reads the echo at the same time, all the time, and at last ends
// its half and reads to the end.
func (c *callers) tcp(r *rand.Rand, s *caller) error {
	c.flight.Add(1)
	defer c.flight.Add(-1)
	sent := make(chan int, 1)
	const most = 200 << 10 // under way
	var at, got atomic.Int64
	room := make(chan struct{}, 1)
	var werr error
	go func() {
		defer func() { sent <- int(at.Load()) }()
		for !c.isOver() {
			if at.Load()-got.Load() > most {
				select {
				case <-room:
				case <-c.over:
				}
				continue
			}
			b := make([]byte, 1+r.IntN(20<<10))
			pattern(b, int(at.Load()))
			if _, werr = s.Write(b); werr != nil {
				return
			}
			at.Add(int64(len(b)))
			time.Sleep(time.Duration(r.IntN(c.slow)) * time.Millisecond)
		}
		werr = s.CloseWrite()
	}()
	b := make([]byte, 32<<10)
	for {
		n, err := s.Read(b)
		if perr := checkPattern(b[:n], int(got.Load())); perr != nil {
			return perr
		}
		got.Add(int64(n))
		select {
		case room <- struct{}{}:
		default:
		}
		if n > 0 {
			c.answered(s, n)
		}
		if err == io.EOF {
			if all := <-sent; werr != nil || all != int(got.Load()) {
				return fmt.Errorf("the end after %d of %d bytes: %v", got.Load(), all, werr)
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// http sends requests whose answers are what they carry.
func (c *callers) http(r *rand.Rand, s *caller) error {
	in := bufio.NewReader(s)
	for !c.isOver() {
		if err := c.post(r, s, in); err != nil {
			return err
		}
	}
	return s.CloseWrite()
}

func (c *callers) post(r *rand.Rand, s *caller, in *bufio.Reader) error {
	c.flight.Add(1)
	defer c.flight.Add(-1)
	body := make([]byte, r.IntN(50<<10))
	pattern(body, 0)
	req, err := http.NewRequest("POST", fmt.Sprintf("http://bank/echo?ms=%d", r.IntN(c.slow)), bytes.NewReader(body))
	if err != nil {
		return err
	}
	if r.IntN(2) == 0 {
		req.ContentLength, req.Body = -1, io.NopCloser(&dripping{bytes.NewReader(body), 3000})
	}
	if err := req.Write(s); err != nil {
		return fmt.Errorf("send request: %w", err)
	}
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	got, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 || !bytes.Equal(got, body) {
		return fmt.Errorf("%s with %d of %d bytes: %w", resp.Status, len(got), len(body), err)
	}
	c.answered(s, len(got))
	return nil
}

// dripping gives a body in pieces, with a pause before the last.
type dripping struct {
	r     *bytes.Reader
	piece int
}

func (d *dripping) Read(p []byte) (int, error) {
	if d.r.Len() > 0 && d.r.Len() <= d.piece {
		time.Sleep(5 * time.Millisecond)
	}
	return d.r.Read(p[:min(len(p), d.piece)])
}

// httpLong reads answers that take their time.
func (c *callers) httpLong(r *rand.Rand, s *caller) error {
	in := bufio.NewReader(s)
	for !c.isOver() {
		c.flight.Add(1)
		pieces := 1 + r.IntN(40)
		req, err := http.NewRequest("GET", fmt.Sprintf("http://bank/drip?pieces=%d&ms=%d", pieces, 1+c.slow/10), nil)
		if err != nil {
			return err
		}
		if err := req.Write(s); err != nil {
			return fmt.Errorf("send request: %w", err)
		}
		resp, err := http.ReadResponse(in, req)
		if err != nil {
			return fmt.Errorf("read answer: %w", err)
		}
		got, err := io.ReadAll(resp.Body)
		if err == nil && (resp.StatusCode != 200 || len(got) != pieces*dripSize) {
			err = fmt.Errorf("%s with %d of %d bytes", resp.Status, len(got), pieces*dripSize)
		}
		if err = errors.Join(err, checkPattern(got, 0)); err != nil {
			return err
		}
		c.answered(s, len(got))
		c.flight.Add(-1)
	}
	return s.CloseWrite()
}

const lost = "the connection was lost"

// client is a client of gRPC on a stream there is.
func (s *caller) client() (*grpc.ClientConn, pb.TestServiceClient, error) {
	var once atomic.Bool
	cc, err := grpc.NewClient("passthrough:///bank", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if once.Swap(true) {
				return nil, errors.New(lost)
			}
			return s, nil
		}))
	return cc, pb.NewTestServiceClient(cc), err
}

// grpc has some calls under way at once.
func (c *callers) grpc(r *rand.Rand, s *caller) error {
	cc, client, err := s.client()
	if err != nil {
		return err
	}
	defer cc.Close()
	const atOnce = 3
	errs := make(chan error, atOnce)
	for range atOnce {
		r := rand.New(rand.NewPCG(r.Uint64(), 1))
		go func() {
			for !c.isOver() {
				if err := c.unary(r, s, client); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range atOnce {
		err = errors.Join(err, <-errs)
	}
	return err
}

func (c *callers) unary(r *rand.Rand, s *caller, client pb.TestServiceClient) error {
	c.flight.Add(1)
	defer c.flight.Add(-1)
	body := make([]byte, 2+r.IntN(20<<10))
	pattern(body, 0)
	binary.BigEndian.PutUint16(body, uint16(r.IntN(c.slow)))
	resp, err := client.UnaryCall(context.Background(), &pb.SimpleRequest{Payload: &pb.Payload{Body: body}})
	if err == nil && !bytes.Equal(resp.GetPayload().GetBody(), body) {
		err = errors.New("other bytes than were sent")
	}
	if err == nil {
		c.answered(s, len(body))
	}
	return err
}

// grpcLong has one call that streams both ways all the time.
func (c *callers) grpcLong(r *rand.Rand, s *caller) error {
	cc, client, err := s.client()
	if err != nil {
		return err
	}
	defer cc.Close()
	c.flight.Add(1)
	defer c.flight.Add(-1)
	stream, err := client.FullDuplexCall(context.Background())
	if err != nil {
		return err
	}
	ahead := make(chan []byte, 8)
	sent := make(chan error, 1)
	go func() {
		defer close(ahead)
		for !c.isOver() {
			body := make([]byte, r.IntN(10<<10))
			pattern(body, len(body))
			ahead <- body
			if err := stream.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{Body: body}}); err != nil {
				sent <- err
				return
			}
			time.Sleep(time.Duration(r.IntN(c.slow)) * time.Millisecond)
		}
		sent <- stream.CloseSend()
	}()
	for want := range ahead {
		got, err := stream.Recv()
		if err == nil && !bytes.Equal(got.GetPayload().GetBody(), want) {
			err = errors.New("other bytes than were sent")
		}
		if err != nil {
			go func() {
				for range ahead {
				}
			}()
			return err
		}
		c.answered(s, len(want))
	}
	if err := <-sent; err != nil {
		return err
	}
	if _, err := stream.Recv(); err != io.EOF {
		return fmt.Errorf("the end of a long stream: %w", err)
	}
	return nil
}

// bolt has some requests under way at once, answered in any order.
func (c *callers) bolt(r *rand.Rand, s *caller) error {
	return c.rpc(r, s, func(id uint32, size int) []byte {
		return boltCall(id, sofaService, "get", id%2 == 0, string(bytes.Repeat([]byte{0x90}, size)))
	}, func() (uint64, error) {
		f, err := readBolt(s)
		if err == nil && f.Status != bolt.OK {
			err = fmt.Errorf("status %d: %.200q", f.Status, f.Content)
		}
		return uint64(f.ID), err
	})
}

func (c *callers) dubbo(r *rand.Rand, s *caller) error {
	return c.rpc(r, s, func(id uint32, _ int) []byte { return dubboCall(uint64(id), "org.bank.Ledger", "", "get") }, func() (uint64, error) {
		f, err := readDubbo(s)
		if err == nil && f.Status != dubbo.OK {
			err = fmt.Errorf("status %d", f.Status)
		}
		return f.ID, err
	})
}

func (c *callers) rpc(r *rand.Rand, s *caller, call func(id uint32, size int) []byte, read func() (uint64, error)) error {
	const atOnce = 6
	under := map[uint64]bool{}
	id := uint32(0)
	for {
		for len(under) < atOnce && !c.isOver() {
			id++
			under[uint64(id)] = true
			c.flight.Add(1)
			size := 0
			if r.IntN(4) == 0 {
				size = r.IntN(30 << 10)
			}
			b := call(id, size)
			cut := r.IntN(len(b)) // a request in two pieces
			if _, err := s.Write(b[:cut]); err != nil {
				return err
			}
			if r.IntN(4) == 0 {
				time.Sleep(time.Duration(r.IntN(5)) * time.Millisecond)
			}
			if _, err := s.Write(b[cut:]); err != nil {
				return err
			}
		}
		if len(under) == 0 {
			return s.CloseWrite()
		}
		got, err := read()
		if err == nil && !under[got] {
			err = fmt.Errorf("an answer to %d, which was not asked or is answered", got)
		}
		if err != nil {
			return err
		}
		delete(under, got)
		c.flight.Add(-1)
		c.answered(s, 1)
	}
}

const dripSize = 2000

func slowness(callers int) int { return max(20, callers) }

// millis is the time a request says it is to take.
func millis(r *http.Request) time.Duration {
	ms := 0
	fmt.Sscan(r.URL.Query().Get("ms"), &ms)
	return time.Duration(ms) * time.Millisecond
}

// serveCallers serves in the guest all that callers call.
func serveCallers(t testing.TB, b *box, slow int) {
	go serveEcho(b.listen(t, 9000))
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			w.WriteHeader(400)
			return
		}
		time.Sleep(millis(r))
		w.Write(body)
	})
	mux.HandleFunc("/drip", func(w http.ResponseWriter, r *http.Request) {
		pieces := 0
		fmt.Sscan(r.URL.Query().Get("pieces"), &pieces)
		piece := make([]byte, dripSize)
		for i := range pieces {
			pattern(piece, i*dripSize)
			w.Write(piece)
			w.(http.Flusher).Flush()
			time.Sleep(millis(r))
		}
	})
	web := &http.Server{Handler: mux}
	go web.Serve(b.listen(t, 8080))
	t.Cleanup(func() { web.Close() })
	srv := grpc.NewServer()
	pb.RegisterTestServiceServer(srv, slowBank{&bankServer{cancelled: make(chan struct{}, 10000)}})
	go srv.Serve(b.listen(t, 9090))
	t.Cleanup(srv.Stop)
	go serveLate(b.listen(t, 12200), slow, func(r io.Reader) ([]byte, error) {
		f, err := readBolt(r)
		if err != nil {
			return nil, err
		}
		return bolt.AppendError(nil, &f, bolt.OK, "done"), nil
	})
	go serveLate(b.listen(t, 20880), slow, func(r io.Reader) ([]byte, error) {
		f, err := readDubbo(r)
		if err != nil {
			return nil, err
		}
		return dubbo.AppendError(nil, &f, dubbo.OK, "done"), nil
	})
}

// slowBank takes the time it is asked to.
type slowBank struct{ *bankServer }

func (b slowBank) UnaryCall(ctx context.Context, r *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	time.Sleep(time.Duration(binary.BigEndian.Uint16(r.GetPayload().GetBody())) * time.Millisecond)
	return b.bankServer.UnaryCall(ctx, r)
}

// serveLate answers requests each in its time, in pieces.
func serveLate(ln net.Listener, slow int, one func(io.Reader) ([]byte, error)) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			var answers sync.WaitGroup
			defer func() { answers.Wait(); c.Close() }()
			var mu sync.Mutex
			in := bufio.NewReader(c)
			for {
				b, err := one(in)
				if err != nil {
					return
				}
				answers.Go(func() {
					time.Sleep(time.Duration(rand.IntN(slow)) * time.Millisecond)
					mu.Lock()
					defer mu.Unlock()
					c.Write(b[:len(b)/2])
					c.Write(b[len(b)/2:])
				})
			}
		}()
	}
}

// callWorld is a world with a guest for n callers, and one that calls too.
func callWorld(t testing.TB, n int) (w *world, bank, web *box) { return callWorldOf(t, n, false) }

func callWorldOf(t testing.TB, n int, process bool) (w *world, bank, web *box) {
	t.Helper()
	return callWorldAt(t, n, process, "127.0.0.1:0")
}

func callWorldAt(t testing.TB, n int, process bool, listen string) (w *world, bank, web *box) {
	t.Helper()
	w = newWorldAt(t, Options{Connections: n + 100}, process, listen)
	web = w.add("web", nil, nil, nil)
	bank = w.add("bank", callerPorts, anyone(), nil)
	w.apply()
	serveCallers(t, bank, slowness(n))
	return w, bank, web
}

// TestCallers: without an upgrade nothing fails, and what is cut is counted.
func TestCallers(t *testing.T) {
	n, guests := 3*len(protocols), len(protocols)
	w, bank, web := callWorld(t, n+guests)
	c := newCallers(t, w, bank, web, n, guests)
	c.progress(10)
	t.Logf("%d connections, %d requests and streams under way", c.open.Load(), c.flight.Load())
	if failed, resets := c.end(); failed != 0 || resets != 0 {
		t.Errorf("%d failed, %d reset", failed, resets)
	}
	c = newCallers(t, w, bank, web, n, guests)
	c.progress(1)
	if _, err := w.link.Cut(context.Background(), plan.Epoch{Number: 1, Instances: []string{"bank-1"}}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); c.open.Load() > 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	// Some clients get to read an end before the reset.
	if failed, resets := c.end(); failed != n+guests || resets < (n+guests)/2 {
		t.Errorf("all of %d is cut, but only %d failed and %d were reset", n+guests, failed, resets)
	}
}
