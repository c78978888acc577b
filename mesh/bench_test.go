package mesh

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"hauberk.dev/plan"
)

// served answers each KiB with a KiB.
func served(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			b := make([]byte, 1024)
			for {
				if _, err := io.ReadFull(c, b); err != nil {
					return
				}
				if _, err := c.Write(b); err != nil {
					return
				}
			}
		}()
	}
}

// paced sends one KiB and awaits one KiB b.N times at 1,000 a second, timed
// from when each was due, and returns the round trips sorted.
func paced(b *testing.B, conns []net.Conn) []time.Duration {
	buf := make([]byte, 1024)
	took := make([]time.Duration, 0, b.N)
	b.ResetTimer()
	begin := time.Now()
	for i := range b.N {
		due := begin.Add(time.Duration(i) * time.Millisecond)
		time.Sleep(time.Until(due))
		sent := time.Now() // the timer's own lateness is not the mesh's
		c := conns[i%len(conns)]
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(sent))
	}
	slices.Sort(took)
	return took
}

func report(b *testing.B, prefix string, took []time.Duration) {
	for _, q := range []struct {
		name string
		at   int
	}{{"p50", len(took) / 2}, {"p99", len(took) * 99 / 100}} {
		b.ReportMetric(float64(took[q.at].Nanoseconds())/1000, prefix+q.name+"-us")
	}
}

// BenchmarkHop is the latency of a call of 1 KiB between two sandboxes at 1,000
// a second: straight from one namespace to the other, then through both proxies'
// halves with mutual TLS (both in this process). What the mesh adds is the
// difference. Use -benchtime 5000x.
func BenchmarkHop(b *testing.B) {
	w := newWorld(b)
	caller := w.add("a", nil, nil, nil)
	callee := w.add("b", []plan.Port{{Port: 9000, Protocol: "tcp"}, {Port: 8080, Protocol: "http"}}, anyone(), nil)
	w.apply()
	go served(callee.listen(b, 9000))
	awaitIdentity(b, w, "a-1")
	awaitIdentity(b, w, "b-1")
	b.Run("direct", func(b *testing.B) {
		// From the callee's own tap side: same guest, same link, no mesh.
		var conns []net.Conn
		for range 8 {
			var c net.Conn
			if err := callee.ns.Do(func() (err error) { c, err = net.Dial("tcp4", callee.Address.String()+":9000"); return err }); err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			conns = append(conns, c)
		}
		report(b, "", paced(b, conns))
	})
	b.Run("mesh", func(b *testing.B) {
		var conns []net.Conn
		for range 8 {
			c, err := caller.dial("tcp4", "10.99.0.2:9000")
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			if _, err := c.Write(make([]byte, 1024)); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, make([]byte, 1024)); err != nil {
				b.Fatal(err)
			}
			conns = append(conns, c)
		}
		report(b, "", paced(b, conns))
	})
}

// BenchmarkConnect is the time to open a connection through the mesh and get
// its first answer, over a warm HBONE connection.
func BenchmarkConnect(b *testing.B) {
	w := newWorld(b)
	caller := w.add("a", nil, nil, nil)
	callee := w.add("b", tcpPort, anyone(), nil)
	w.apply()
	go served(callee.listen(b, 9000))
	buf := make([]byte, 1024)
	for b.Loop() {
		c, err := caller.dial("tcp4", "10.99.0.2:9000")
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}

// BenchmarkThroughput moves bulk data one way through the mesh.
func BenchmarkThroughput(b *testing.B) {
	w := newWorld(b)
	caller := w.add("a", nil, nil, nil)
	callee := w.add("b", tcpPort, anyone(), nil)
	w.apply()
	ln := callee.listen(b, 9000)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		io.Copy(io.Discard, c)
		io.WriteString(c, "done")
		c.Close()
	}()
	c, err := caller.dial("tcp4", "10.99.0.2:9000")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	block := make([]byte, 256<<10)
	b.SetBytes(int64(len(block)))
	b.ResetTimer()
	for range b.N {
		if _, err := c.Write(block); err != nil {
			b.Fatal(err)
		}
	}
	c.(*net.TCPConn).CloseWrite()
	io.ReadAll(c)
}

// BenchmarkCut cuts half of the live connections, by instance.
func BenchmarkCut(b *testing.B) {
	for _, n := range []int{200, 2000} {
		b.Run(fmt.Sprintf("%dof%d", n/2, n), func(b *testing.B) {
			w := newWorldOf(b, Options{Connections: 4 * n})
			bad := w.add("bad", nil, nil, nil)
			good := w.add("good", nil, nil, nil)
			callee := w.add("b", tcpPort, anyone(), nil)
			w.apply()
			go served(callee.listen(b, 9000))
			var total time.Duration
			for i := range b.N {
				var conns []net.Conn
				for j := range n {
					from := bad
					if j%2 == 0 {
						from = good
					}
					c, err := from.dial("tcp4", "10.99.0.3:9000")
					if err != nil {
						b.Fatal(err)
					}
					conns = append(conns, c)
				}
				for _, c := range conns {
					if _, err := c.Write(make([]byte, 1024)); err != nil {
						b.Fatal(err)
					}
					if _, err := io.ReadFull(c, make([]byte, 1024)); err != nil {
						b.Fatal(err)
					}
				}
				begin := time.Now()
				r, err := w.link.Cut(context.Background(), plan.Epoch{Number: uint64(2*i + 1), Instances: []string{"bad-1"}})
				total += time.Since(begin)
				if err != nil || r.Connections != n {
					b.Fatalf("%+v, %v", r, err)
				}
				if _, err := w.link.Cut(context.Background(), plan.Epoch{Number: uint64(2*i + 2)}); err != nil {
					b.Fatal(err)
				}
				for _, c := range conns {
					c.Close()
				}
			}
			b.ReportMetric(float64(total.Microseconds())/1000/float64(b.N), "ms/cut")
		})
	}
}
