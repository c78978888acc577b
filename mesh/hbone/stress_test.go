package hbone

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"hauberk.dev/mesh/h2frame"
)

// lazy is a connection whose owner may stop reading.
type lazy struct {
	net.Conn
	stopped chan struct{}
	closed  chan struct{}
	once    sync.Once
	write   chan struct{} // a lock that synctest can wait for
}

func newLazy(c net.Conn) *lazy {
	return &lazy{Conn: c, stopped: make(chan struct{}), closed: make(chan struct{}), write: make(chan struct{}, 1)}
}

func (l *lazy) Read(p []byte) (int, error) {
	select {
	case <-l.stopped:
		<-l.closed
		return 0, net.ErrClosed
	default:
		return l.Conn.Read(p)
	}
}

func (l *lazy) Write(p []byte) (int, error) {
	select {
	case l.write <- struct{}{}:
		defer func() { <-l.write }()
		return l.Conn.Write(p)
	case <-l.closed:
		return 0, net.ErrClosed
	}
}

func (l *lazy) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Conn.Close()
}

// ends joins two ends by what holds least: nothing, or a small socket buffer.
func ends(t *testing.T, kind string) (a, b net.Conn) {
	if strings.HasPrefix(kind, "pipe") {
		a, b = net.Pipe()
	} else {
		a, b = loop(t)
		for _, c := range []net.Conn{a, b} {
			c.(*net.TCPConn).SetReadBuffer(4 << 10)
			c.(*net.TCPConn).SetWriteBuffer(4 << 10)
		}
	}
	if strings.HasSuffix(kind, "tls") {
		return tls.Client(a, &tls.Config{InsecureSkipVerify: true}), tls.Server(b, serverConfig(t))
	}
	return a, b
}

// mischief is what a stream's server does.
func mischief(s *Stream, stop <-chan struct{}) {
	what, _, _ := strings.Cut(s.Authority, ":")
	switch what {
	case "refuse":
		s.Refuse(503, "no")
		return
	case "silent":
		<-stop
		return
	}
	s.Accept()
	switch what {
	case "echo":
		s.WriteTo(s)
		s.CloseWrite()
	case "source":
		s.Write(make([]byte, 700<<10))
		s.CloseWrite()
		io.Copy(io.Discard, s)
	case "cut":
		io.CopyN(io.Discard, s, 100<<10)
		s.Reset(h2frame.CodeConnect)
	case "deaf": // accepts and never reads
		s.Write(make([]byte, 300<<10))
		<-stop
	case "crossed": // both ways at once, neither waiting for the other
		var wg sync.WaitGroup
		wg.Go(func() { s.Write(make([]byte, 700<<10)); s.CloseWrite() })
		io.Copy(io.Discard, s)
		wg.Wait()
	}
}

var kinds = []string{"echo", "source", "cut", "deaf", "crossed", "refuse", "silent"}

// visit is what a stream's client does; it must end, however it ends.
func visit(c *Conn, i int, r *rand.Rand) error {
	what := kinds[i%len(kinds)]
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	s, err := c.Open(ctx, fmt.Sprintf("%s:%d", what, i+1))
	if err != nil {
		return nil
	}
	give := time.AfterFunc(time.Duration(100+r.IntN(700))*time.Millisecond, func() { s.Reset(h2frame.CodeCancel) })
	defer give.Stop()
	sent := bytes.Repeat([]byte{byte(i)}, r.IntN(600<<10))
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := s.Write(sent); err == nil {
			s.CloseWrite()
		}
	})
	var got bytes.Buffer
	if i%2 == 0 {
		_, err = s.WriteTo(&slow{&got, r.IntN(3)})
	} else {
		_, err = io.Copy(&got, struct{ io.Reader }{s})
	}
	wg.Wait()
	if what == "echo" && err == nil && !bytes.Equal(got.Bytes(), sent) {
		return fmt.Errorf("stream %d: an orderly end after %d of %d bytes", i, got.Len(), len(sent))
	}
	return nil
}

type slow struct {
	w     io.Writer
	every int
}

func (s *slow) Write(p []byte) (int, error) {
	time.Sleep(time.Duration(s.every) * 100 * time.Microsecond)
	return s.w.Write(p)
}

// within fails the test, with what everybody waits for, if f does not end.
func within(t *testing.T, d time.Duration, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(d):
		b := make([]byte, 1<<20)
		t.Fatalf("%s does not end:\n%s", what, b[:runtime.Stack(b, true)])
	}
}

// TestNothingHangs lets many streams do everything at once over connections
// that hold nothing, stops a peer from reading in the middle, and cuts: whatever
// was begun must end.
func TestNothingHangs(t *testing.T) {
	for _, kind := range []string{"pipe", "pipe-tls", "tcp", "tcp-tls"} {
		for _, end := range []string{"close", "peer stops reading", "peer goes", "raw cut"} {
			t.Run(kind+"/"+end, func(t *testing.T) {
				t.Parallel()
				a, b := ends(t, kind)
				peer := newLazy(b)
				stop := make(chan struct{})
				var served *Conn
				var wg, visits sync.WaitGroup
				attached := make(chan struct{})
				wg.Go(func() {
					Serve(peer, func(s *Stream) { mischief(s, stop) }, func(c *Conn) { served = c; close(attached) })
				})
				c, err := Client(a)
				if err != nil {
					t.Fatal(err)
				}
				<-attached
				for i := range 28 {
					r := rand.New(rand.NewPCG(uint64(i), 7))
					visits.Go(func() {
						for range 2 {
							if err := visit(c, i, r); err != nil {
								t.Error(err)
							}
						}
					})
				}
				time.Sleep(250 * time.Millisecond)
				switch end {
				case "close":
					within(t, 5*time.Second, "Close", func() { c.Close() })
				case "peer stops reading":
					close(peer.stopped)
					time.Sleep(100 * time.Millisecond)
					within(t, 5*time.Second, "Close", func() { c.Close() })
				case "peer goes":
					within(t, 5*time.Second, "Close", func() { served.Close() })
				case "raw cut":
					b.Close()
				}
				within(t, 10*time.Second, "a visit", visits.Wait)
				within(t, 5*time.Second, "Close", func() { c.Close(); served.Close() })
				close(stop)
				within(t, 10*time.Second, "Serve", wg.Wait)
			})
		}
	}
}

// TestStreamsEndThemselves is without any cut: what streams do to each other
// alone must not keep one from ending.
func TestStreamsEndThemselves(t *testing.T) {
	a, b := net.Pipe()
	stop := make(chan struct{})
	defer close(stop)
	go Serve(b, func(s *Stream) { mischief(s, stop) }, nil)
	c, err := Client(a)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var visits sync.WaitGroup
	for i := range 70 {
		visits.Go(func() {
			if err := visit(c, i, rand.New(rand.NewPCG(uint64(i), 9))); err != nil {
				t.Error(err)
			}
		})
	}
	within(t, 20*time.Second, "a visit", visits.Wait)
	if c.Err() != nil {
		t.Errorf("the connection ended: %v", c.Err())
	}
}

// TestSilentPeer: a peer that stops answering, with or without its socket still
// taking bytes, is given up after two pulses, and everybody who waits for it.
func TestSilentPeer(t *testing.T) {
	for name, busy := range map[string]bool{"idle": false, "while writing": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := net.Pipe()
				peer := newLazy(b)
				stop := make(chan struct{})
				var served *Conn
				go Serve(peer, func(s *Stream) { mischief(s, stop) }, func(c *Conn) { served = c })
				c, err := Client(newLazy(a))
				if err != nil {
					t.Fatal(err)
				}
				s, err := c.Open(t.Context(), "echo:1")
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Hour) // which it survives
				if c.Err() != nil {
					t.Fatalf("an idle connection ended: %v", c.Err())
				}
				close(peer.stopped)
				began := time.Now()
				if busy {
					_, err = s.Write(make([]byte, 1<<20))
				} else {
					_, err = s.Read(make([]byte, 1))
				}
				took := time.Since(began)
				synctest.Wait()
				// Which of the two gives up first is chance.
				if err == nil || took > 2*pulse || !errors.Is(c.Err(), errSilent) && !errors.Is(served.Err(), errSilent) {
					t.Errorf("ended after %v: %v (%v, %v)", took, err, c.Err(), served.Err())
				}
				close(stop)
				peer.Close()
				synctest.Wait()
			})
		})
	}
}

// TestCutIsNoEnd: a stream whose connection ends under it has not ended.
func TestCutIsNoEnd(t *testing.T) {
	a, b := loop(t)
	go Serve(b, func(s *Stream) { s.Accept(); s.Write([]byte("half")); b.Close() }, nil)
	c, err := Client(a)
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Open(t.Context(), "x:1")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(s); err == nil {
		t.Errorf("%q was taken for all", got)
	}
}

// TestOpenOnStuckConnection: Open keeps its deadline even if the connection
// takes no byte.
func TestOpenOnStuckConnection(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	go io.CopyN(io.Discard, b, int64(len(h2frame.Preface))+60)
	c, err := Client(a)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 3 {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		within(t, 5*time.Second, "Open", func() { _, err = c.Open(ctx, "x:1") })
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	}
}

func serverConfig(t *testing.T) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(cryptorand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
}
