//go:build !race

// The load of these tests takes too long under the race detector.

package mesh

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/plan"
)

// A request is judged again when connecting to the server took its time: what
// became forbidden meanwhile does not reach the server, and is told so.
func TestJudgedAgainAfterSlowDial(t *testing.T) {
	for _, body := range []string{"", "body"} {
		far := &quietSide{ended: make(chan struct{})}
		near := &loop{in: bytes.NewReader(fmt.Appendf(nil, "POST /pay HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", len(body), body)), step: 1 << 10}
		var forbidden bool // a plan in between
		judged := 0
		x := &exchange{
			entry:  &entry{},
			client: near,
			dial:   func() (side, error) { forbidden = true; return far, nil },
			judge: func(h *http1.Head) (int, refusal) {
				if judged++; forbidden {
					return 403, refusal{Error: "access denied", Method: h.Method, Path: h.Target}
				}
				return 0, refusal{}
			},
			malformed: func(err error) { t.Error(err) },
		}
		x.run(nil)
		if judged != 2 || far.written.Load() != 0 {
			t.Errorf("judged %d times, and the server got %d bytes", judged, far.written.Load())
		}
		if got := near.out.String(); strings.Count(got, "HTTP/1.1 ") != 1 || !strings.HasPrefix(got, "HTTP/1.1 403 ") || !strings.Contains(got, `"/pay"`) {
			t.Errorf("the client was told %q", got)
		}
	}
}

// quietSide is a server that says nothing until it is ended.
type quietSide struct {
	written atomic.Int64
	ended   chan struct{}
	once    atomic.Bool
}

func (q *quietSide) Read([]byte) (int, error) { <-q.ended; return 0, net.ErrClosed }
func (q *quietSide) Write(b []byte) (int, error) {
	q.written.Add(int64(len(b)))
	return len(b), nil
}
func (q *quietSide) CloseWrite() error { return nil }
func (q *quietSide) abort() {
	if q.once.CompareAndSwap(false, true) {
		close(q.ended)
	}
}
func (q *quietSide) finish() { q.abort() }

// TestJitter: whatever the clock does between a certificate's check and the next
// question, the next time is in the future, and near.
func TestJitter(t *testing.T) {
	for _, d := range []time.Duration{-1 << 63, -time.Hour, -time.Nanosecond, 0, time.Nanosecond, time.Second, time.Hour} {
		for range 100 {
			got := jitter(d)
			if want := max(d, retryFirst); got < want*9/10 || got > want*11/10 {
				t.Fatalf("%v: %v", d, got)
			}
		}
	}
}

// TestPlansWhileServing: a plan that forbids nothing new is not noticed by who is
// served, however often it comes.
func TestPlansWhileServing(t *testing.T) {
	w, web, l := loadWorld(t, Options{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.load(t, web, 0, 6000)
	}()
	changes := 0
	for tick := time.NewTicker(10 * time.Millisecond); ; changes++ {
		select {
		case <-done:
			tick.Stop()
			if l.Twice.Load() != 0 || changes < 20 {
				t.Errorf("%d changes, %d requests served, %d twice", changes, l.Served.Load(), l.Twice.Load())
			}
			t.Logf("%d changes while %d requests were served", changes, l.Served.Load())
			return
		case <-tick.C:
		}
		s := w.service("shop")
		s.Allow = []plan.Rule{{Name: "open/all", From: []string{"*"}}, {Name: fmt.Sprintf("open/%d", changes), From: []string{spiffe("nobody")}}}
		s.Deny = []plan.Rule{{Name: "never", From: []string{spiffe("nobody")}}}
		w.plan.Generation++
		w.apply()
	}
}

// TestPortsRunOut: when no local port is left toward a guest, calls to it are
// refused with the reason, connections that are open and other guests go on, and
// all is well once ports are free.
func TestPortsRunOut(t *testing.T) {
	w := newWorld(t)
	web, b := w.add("web", nil, nil, nil), w.add("b", tcpPort, anyone(), nil)
	beside := w.add("beside", tcpPort, anyone(), nil)
	w.apply()
	go serveEcho(b.listen(t, 9000))
	go serveEcho(beside.listen(t, 9000))
	awaitIdentity(t, w, "b-1")
	const ports = 6
	if err := b.ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", fmt.Appendf(nil, "40000 %d", 40000+ports-1), 0o644)
	}); err != nil {
		t.Fatal(err)
	}
	var open []*net.TCPConn
	var last error
	for range 2 * ports {
		var c net.Conn
		if c, last = web.dial("tcp4", "10.99.0.2:9000"); last != nil {
			break
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		if last = roundTrip(c, "one"); last != nil {
			break
		}
		open = append(open, c.(*net.TCPConn))
	}
	if last == nil || len(open) == 0 || len(open) > ports {
		t.Fatalf("%d connections from %d ports, then: %v", len(open), ports, last)
	}
	w.awaitEvent(api.EventUnreachable, syscall.EADDRNOTAVAIL.Error())
	for i, c := range open {
		c.SetDeadline(time.Now().Add(time.Minute))
		if err := roundTrip(c, "two"); err != nil {
			t.Errorf("open connection %d: %v", i, err)
		}
	}
	if err := web.call("10.99.0.3:9000", "beside"); err != nil {
		t.Errorf("another guest: %v", err)
	}
	for _, c := range open {
		c.SetLinger(0) // a reset keeps no port
		c.Close()
	}
	err := errors.New("not called")
	for begin := time.Now(); time.Since(begin) < time.Minute && err != nil; time.Sleep(50 * time.Millisecond) {
		err = web.call("10.99.0.2:9000", "again")
	}
	if err != nil {
		t.Errorf("with free ports: %v", err)
	}
}
