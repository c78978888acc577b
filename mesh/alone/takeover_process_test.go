package alone

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"hauberk.dev/internal/unixsock"
	"hauberk.dev/mesh/handover"
	"hauberk.dev/test/succession"
)

func TestMain(m *testing.M) { succession.Main(m, playProxy) }

// playProxy does what hauberk-mesh -c does.
func playProxy(ctx context.Context, part succession.Part) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("pid", os.Getpid())
	c, err := Load(filepath.Join(part.Dir, "proxy.yaml"))
	if err != nil {
		return err
	}
	path := filepath.Join(part.Dir, "next")
	if part.Dies > 0 {
		return dieOnTheWay(ctx, path, c, log, part)
	}
	var p *Proxy
	var door *net.UnixListener
	if !part.First {
		p, door, err = TakeOver(ctx, path, c, log)
	} else if door, err = unixsock.Listen(path); err == nil {
		p, err = Open(c, log)
	}
	if err != nil {
		return err
	}
	var words []string
	for _, l := range c.Listeners {
		words = append(words, l.Name, p.Address(l.Name).String())
	}
	fmt.Println(strings.Join(words, " "))
	given := make(chan error, 1)
	go func() { given <- p.GiveOver(ctx, door) }()
	err = p.Run(ctx)
	cancel()
	return errors.Join(err, <-given)
}

// dieOnTheWay takes over and is killed some time after it has begun to ask, but before
// it has answered.
func dieOnTheWay(ctx context.Context, path string, c *Config, log *slog.Logger, part succession.Part) error {
	p, err := prepare(c, log)
	if err != nil {
		return err
	}
	part.Doom()
	return handover.Take(ctx, path, func(load *handover.Load) (func(), error) {
		t, err := p.unpack(load)
		if err == nil {
			err = p.settleIn(t)
		}
		fmt.Fprintln(os.Stderr, "built", len(load.Items), err)
		select {} // until it is killed
	})
}

// beginSuccession starts the first proxy, and says where each listener is.
func beginSuccession(t *testing.T, dir, text string) (s *succession.Line, addresses map[string]string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "proxy.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s = succession.Start(t, dir)
	t.Cleanup(s.End)
	addresses = map[string]string{}
	for words := range slices.Chunk(strings.Fields(s.Serves), 2) {
		addresses[words[0]] = words[1]
	}
	return s, addresses
}

// callers ask all the time, each one request after the other, until they are told to
// stop or one fails.
type callers struct {
	t       *testing.T
	stop    chan struct{}
	all     sync.WaitGroup
	done    []*atomic.Int64 // of each
	names   []string
	failed  atomic.Int64
	counted atomic.Int64 // requests of HTTP
}

func (c *callers) add(name string, http bool, ask func(n int) error) {
	done := &atomic.Int64{}
	c.done, c.names = append(c.done, done), append(c.names, name)
	c.all.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-c.stop:
				return
			default:
			}
			if err := ask(n); err != nil {
				c.failed.Add(1)
				c.t.Errorf("%s: request %d: %v", name, n, err)
				return
			}
			done.Add(1)
			if http {
				c.counted.Add(1)
			}
		}
	})
}

// progress waits until each caller has got so many answers more.
func (c *callers) progress(n int64) {
	c.t.Helper()
	for i, d := range c.done {
		until := d.Load() + n
		waitFor(c.t, "progress of "+c.names[i], func() bool { return d.Load() >= until || c.failed.Load() > 0 })
	}
}

// asker is a client of HTTP/1 that forgives nothing: a connection may end only if the
// answer before has said so.
type asker struct {
	dial func() (net.Conn, error)
	conn net.Conn
	r    *bufio.Reader
	made int
}

func (a *asker) ask(n int) error {
	if a.conn == nil {
		c, err := a.dial()
		if err != nil {
			return err
		}
		a.conn, a.r = c, bufio.NewReader(c)
		a.made++
	}
	a.conn.SetDeadline(time.Now().Add(patience))
	body := strings.Repeat("x", n*97%3000)
	// In two pieces, for an upgrade to come between.
	head := fmt.Sprintf("POST /%d HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n", n, len(body))
	for _, piece := range []string{head[:n%len(head)], head[n%len(head):] + body} {
		if _, err := io.WriteString(a.conn, piece); err != nil {
			return err
		}
	}
	resp, err := http.ReadResponse(a.r, nil)
	if err != nil {
		return fmt.Errorf("connection %d: %w", a.made, err)
	}
	got, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 || string(got) != body {
		return fmt.Errorf("connection %d: status %d, %d bytes of %d, %v", a.made, resp.StatusCode, len(got), len(body), err)
	}
	if resp.Close {
		a.conn.Close()
		a.conn = nil
	}
	return nil
}

// TestSuccession has processes take each other's place while clients of all protocols
// ask without a pause; two of those that try are killed on the way. No request fails
// and no connection ends unannounced, counted by the clients.
func TestSuccession(t *testing.T) {
	dir, err := os.MkdirTemp("", "hk")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	certify(t, dir, "a", "h")
	twice := sync.Map{}
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		if id := r.Header.Get("X-Id"); id != "" {
			if _, again := twice.LoadOrStore(id, true); again {
				t.Errorf("%s was asked twice", id)
			}
		}
		b, _ := io.ReadAll(r.Body) // whole, before anything is answered
		w.Write(b)
	})
	rpc, udp := newRPCOrigin(t, "o", false), newEcho(t, "127.0.0.1:0", "u")
	s, addresses := beginSuccession(t, dir, fmt.Sprintf(`version: 1
admin: admin
limits: {drain_timeout: 1h, stop_timeout: 2s}
listeners:
- {name: web, address: '127.0.0.1:0'}
- {name: tls, address: '127.0.0.2:0', tls: {certificates: [{chain: a.pem, key: a.key}]}}
- {name: bytes, address: '127.0.0.3:0', protocol: tcp, upstream: bytes}
- {name: udp, address: '127.0.0.1:0', protocol: udp, upstream: udp}
- {name: rpc, address: '127.0.0.4:0', protocol: bolt, calls: [{service: com.*, upstream: rpc}]}
hosts:
- names: ['*']
  routes:
  - {name: grpc, prefix: /t.T, upstream: grpc}
  - {name: rest, prefix: /, upstream: up}
upstreams:
- {name: up, endpoints: [{address: %q}]}
- {name: grpc, protocol: grpc, endpoints: [{address: %q}]}
- {name: bytes, endpoints: [{address: %q}]}
- {name: udp, endpoints: [{address: %q}]}
- {name: rpc, protocol: bolt, endpoints: [%s]}
`, strings.TrimPrefix(up, "http://"), echoGRPC(t), echoTCP(t), udp.address(), endpointsOf(rpc)))
	c := &callers{t: t, stop: make(chan struct{})}
	c.begin(addresses)
	c.progress(3)
	turns := []bool{false, true, false, true, false}
	if v := os.Getenv("HAUBERK_TEST_UPGRADES"); v != "" { // more of them, for who has the time
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		turns = append(turns, make([]bool, n)...)
	}
	rand.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
	for i, dies := range turns {
		began := time.Now()
		if dies {
			s.Fail(20 * time.Millisecond)
		} else {
			s.Next()
		}
		t.Logf("%d: dies %v, %v; %d requests of HTTP", i+1, dies, time.Since(began).Round(time.Millisecond), c.counted.Load())
		c.progress(3)
	}
	close(c.stop)
	c.all.Wait()
	if n := c.failed.Load(); n > 0 {
		t.Errorf("%d clients failed", n)
	}
	sum := func() (n int64) {
		for line := range strings.Lines(adminGet(t, filepath.Join(dir, "admin"))) {
			if rest, ok := strings.CutPrefix(line, "hauberk_proxy_requests_total{route="); ok && strings.Contains(rest, `"2xx"`) && !strings.Contains(rest, "rpc/") {
				k, err := strconv.ParseInt(strings.Fields(rest)[1], 10, 64)
				if err != nil {
					t.Error(err)
				}
				n += k
			}
		}
		return n
	}
	waitFor(t, "count of all requests, by the last process", func() bool { return sum() == c.counted.Load() })
}

// begin starts the callers.
func (c *callers) begin(addresses map[string]string) {
	t := c.t
	relaxed := &tls.Config{InsecureSkipVerify: true, ServerName: "h"} // who serves is not what is tested
	for range 3 {
		plain := &asker{dial: func() (net.Conn, error) { return net.Dial("tcp", addresses["web"]) }}
		c.add("http/1", true, func(n int) error {
			if plain.made > 1 {
				return errors.New("a connection that could have moved was ended")
			}
			return plain.ask(n)
		})
		secure := &asker{dial: func() (net.Conn, error) { return tls.Dial("tcp", addresses["tls"], relaxed) }}
		c.add("https", true, secure.ask)
		c.add("tcp", false, newLines(t, addresses["bytes"]))
		c.add("bolt", false, newBolts(t, addresses["rpc"]))
		c.add("udp", false, newPings(t, addresses["udp"]))
	}
	tr := &http.Transport{TLSClientConfig: relaxed.Clone(), ForceAttemptHTTP2: true}
	t.Cleanup(tr.CloseIdleConnections)
	two := &http.Client{Transport: tr, Timeout: patience}
	conn, err := grpc.NewClient("passthrough:///"+addresses["tls"], grpc.WithTransportCredentials(credentials.NewTLS(relaxed.Clone())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	for i := range 3 {
		c.add("http/2", true, func(n int) error {
			body := strings.Repeat("x", n*97%3000)
			req, err := http.NewRequest("POST", "https://"+addresses["tls"]+"/", strings.NewReader(body))
			if err != nil {
				return err
			}
			req.Host = "h"
			req.Header.Set("X-Id", fmt.Sprint(i, ".", n))
			resp, err := two.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != 200 || string(got) != body || resp.ProtoMajor != 2 {
				return fmt.Errorf("%s, status %d, %d bytes of %d, %v", resp.Proto, resp.StatusCode, len(got), len(body), err)
			}
			return nil
		})
		c.add("grpc", true, func(n int) error { return talk(conn, 1+n%4) })
	}
}

// talk makes a call with so many messages each way.
func talk(conn *grpc.ClientConn, n int) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	st, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/t.T/Talk", grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	for i := range n {
		out, in := wrapperspb.String(fmt.Sprint("message ", i)), &wrapperspb.StringValue{}
		if err := st.SendMsg(out); err != nil && err != io.EOF {
			return err
		}
		if err := st.RecvMsg(in); err != nil {
			return fmt.Errorf("message %d: %w", i, err)
		}
		if in.Value != out.Value {
			return fmt.Errorf("message %d: %q", i, in.Value)
		}
	}
	if err := st.CloseSend(); err != nil {
		return err
	}
	if err := st.RecvMsg(&wrapperspb.StringValue{}); err != io.EOF {
		return fmt.Errorf("end: %w", err)
	}
	return nil
}

// echoGRPC answers each message with itself.
func echoGRPC(t *testing.T) string {
	t.Helper()
	if encoding.GetCodecV2("proto") == nil {
		t.Fatal("no codec")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, st grpc.ServerStream) error {
		for {
			m := &wrapperspb.StringValue{}
			if err := st.RecvMsg(m); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			if err := st.SendMsg(m); err != nil {
				return err
			}
		}
	}))
	go s.Serve(ln)
	t.Cleanup(s.Stop)
	return ln.Addr().String()
}

// newLines asks over one connection of TCP, for ever.
func newLines(t *testing.T, address string) func(int) error {
	conn := dialed(t, address)
	r, first := bufio.NewReader(conn), ""
	return func(n int) error {
		conn.SetDeadline(time.Now().Add(patience))
		line := strings.Repeat("y", 1+n*131%5000)
		if _, err := io.WriteString(conn, line+"\n"); err != nil {
			return err
		}
		got, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		number, text, _ := strings.Cut(strings.TrimSuffix(got, "\n"), ":")
		if first == "" {
			first = number
		}
		if number != first || text != line {
			return fmt.Errorf("connection %s, and before %s; %d bytes of %d", number, first, len(text), len(line))
		}
		return nil
	}
}

// newBolts calls over one connection, for ever.
func newBolts(t *testing.T, address string) func(int) error {
	conn := dialed(t, address)
	w := &wire{}
	r := &frameReader{conn: conn, wire: w, most: 1 << 20, patient: patience, held: &holding{most: maxRPCHeld}}
	return func(n int) error {
		conn.SetWriteDeadline(time.Now().Add(patience))
		b := callOf(false, 1+n, "com.test.S", "m")
		for _, piece := range [][]byte{b[:n%len(b)], b[n%len(b):]} {
			if _, err := conn.Write(piece); err != nil {
				return err
			}
		}
		frame, err := r.next(time.Now().Add(patience))
		if err != nil {
			return err
		}
		var f rpcFrame
		if err := w.read(frame, &f); err != nil || !f.ok || f.id != uint64(1+n) {
			return fmt.Errorf("call %d, ok %v, id %d: %v", 1+n, f.ok, f.id, err)
		}
		return nil
	}
}

// newPings asks over one session of UDP, and each question once.
func newPings(t *testing.T, address string) func(int) error {
	c := dialUDP(t, "", address)
	b := make([]byte, maxDatagram)
	return func(n int) error {
		c.SetDeadline(time.Now().Add(patience))
		text := fmt.Sprint("ping ", n)
		if _, err := c.Write([]byte(text)); err != nil {
			return err
		}
		k, err := c.Read(b)
		if err != nil {
			return err
		}
		if got := string(b[:k]); got != "u"+text {
			return fmt.Errorf("%q, want %q", got, text)
		}
		return nil
	}
}
