package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"hauberk.dev/mesh/tls13"
	"hauberk.dev/mesh/wire"
)

const (
	parallel = 8
	asked    = 1 << 10 // bytes of a question; its answer has as many as it says
	largest  = 64 << 10
)

// leg is one way between two ends of this process.
type leg struct {
	name  string
	open  func() (a, b net.Conn, err error)
	conns [parallel]struct{ a, b net.Conn }
	took  []time.Duration
	spent time.Duration
}

// legs are those measured: bytes as they are, and the records that the mesh uses
// between its two sides.
func (w *world) legs() ([]*leg, error) {
	secure, err := newSecure()
	if err != nil {
		return nil, err
	}
	bare := func(open opener) func() (net.Conn, net.Conn, error) {
		return func() (net.Conn, net.Conn, error) { p, err := open(); return p.a, p.b, err }
	}
	return []*leg{
		{name: "loopback", open: bare(over(w.plain))},
		{name: "shortcut", open: bare(over(w.short))},
		{name: "Unix socket", open: bare(unixPair)},
		{name: "memory", open: memoryPair},
		{name: "TLS, loopback", open: secure.over(w.plain)},
		{name: "TLS, shortcut", open: secure.over(w.short)},
		{name: "TLS, memory", open: secure.inMemory},
	}, nil
}

func (l *leg) start() error {
	for i := range l.conns {
		c := &l.conns[i]
		var err error
		if c.a, c.b, err = l.open(); err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
		go answer(c.b) // ends with the connection
		for range 50 {
			if err := call(c.a, make([]byte, largest), largest>>uint(i)); err != nil {
				return fmt.Errorf("%s: %w", l.name, err)
			}
		}
	}
	return nil
}

func (l *leg) Close() {
	for _, c := range l.conns {
		if c.a != nil {
			c.a.Close()
			c.b.Close()
		}
	}
}

// answer gives as many bytes as each question says.
func answer(c net.Conn) {
	question, b := make([]byte, asked), make([]byte, largest)
	for {
		if _, err := io.ReadFull(c, question); err != nil {
			return
		}
		if _, err := c.Write(b[:min(largest, binary.BigEndian.Uint32(question))]); err != nil {
			return
		}
	}
}

func call(c net.Conn, b []byte, n int) error {
	c.SetDeadline(time.Now().Add(5 * time.Second))
	binary.BigEndian.PutUint32(b, uint32(n))
	if _, err := c.Write(b[:asked]); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b[:n])
	return err
}

// turn asks for a while, a thousand a second or as many as go through.
func (l *leg) turn(ctx context.Context, length time.Duration, rate, n int) error {
	before, err := processorTime()
	if err != nil {
		return err
	}
	began := time.Now()
	var wg sync.WaitGroup
	faults, took := make([]error, parallel), make([][]time.Duration, parallel)
	for i := range l.conns {
		wg.Go(func() { took[i], faults[i] = ask(ctx, l.conns[i].a, began, i, length, rate, n) })
	}
	wg.Wait()
	after, err := processorTime()
	l.spent += after - before
	l.took = append(l.took, slices.Concat(took...)...)
	if err := errors.Join(append(faults, err, context.Cause(ctx))...); err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	return nil
}

func ask(ctx context.Context, c net.Conn, began time.Time, place int, length time.Duration, rate, n int) (took []time.Duration, err error) {
	b, end, due := make([]byte, largest), began.Add(length), began
	each := time.Duration(0)
	if rate > 0 {
		each = parallel * time.Second / time.Duration(rate)
		due = due.Add(each * time.Duration(place) / parallel)
	}
	for ctx.Err() == nil {
		if rate > 0 {
			time.Sleep(time.Until(due)) // the lateness of a timer is nobody's
			due = due.Add(each)
		}
		now := time.Now()
		if now.After(end) {
			return took, nil
		}
		if err := call(c, b, n); err != nil {
			return took, err
		}
		took = append(took, time.Since(now))
	}
	return took, nil
}

func (l *leg) print(out io.Writer, beside *leg) {
	slices.Sort(l.took)
	if len(l.took) == 0 {
		fmt.Fprintf(out, "  %s\tnothing was answered\n", l.name)
		return
	}
	us := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
	each := func(l *leg) float64 { return us(l.spent) / float64(max(1, len(l.took))) }
	fmt.Fprintf(out, "  %s\t%.1f\t%.1f\t%.1f\t(%.2fx)\t%d\n", l.name, us(l.took[len(l.took)/2]), us(l.took[len(l.took)*99/100]), each(l), each(l)/each(beside), len(l.took))
}

// processorTime is what this process has used: both ends, and the kernel for them.
func processorTime() (time.Duration, error) {
	var u syscall.Rusage
	err := syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
}

// secure makes connections of two ends that both show a certificate.
type secure struct{ server, client *tls.Config }

func newSecure() (*secure, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"far"}}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &k.PublicKey, k)
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(c)
	shown := []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: k}}
	return &secure{
		server: &tls.Config{MinVersion: tls.VersionTLS13, Certificates: shown, ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true},
		client: &tls.Config{MinVersion: tls.VersionTLS13, Certificates: shown, RootCAs: pool, ServerName: "far"},
	}, nil
}

func (s *secure) over(ln net.Listener) func() (net.Conn, net.Conn, error) {
	return func() (a, b net.Conn, err error) {
		p, err := over(ln)()
		if err != nil {
			return nil, nil, err
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		var far *tls13.Conn
		var farErr error
		var wg sync.WaitGroup
		wg.Go(func() { far, farErr = tls13.Server(ctx, wire.New(p.b.(*net.TCPConn)), s.server) })
		near, err := tls13.Client(ctx, wire.New(p.a.(*net.TCPConn)), s.client)
		wg.Wait()
		return near, far, errors.Join(err, farErr)
	}
}

// inMemory has the records of crypto/tls, as those of the mesh stand on TCP.
func (s *secure) inMemory() (a, b net.Conn, err error) {
	x, y, _ := memoryPair()
	near, far := tls.Client(x, s.client), tls.Server(y, s.server)
	go far.Handshake() // its error is the other end's
	return near, far, near.Handshake()
}
