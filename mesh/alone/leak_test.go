//go:build !race

// Under the race detector sync.Pool forgets on purpose, and all takes ten times
// as long.

package alone

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hauberk.dev/test/meshload"
)

// loadText is a configuration with a listener and a server for each protocol.
const loadText = `version: 1
listeners:
- {name: http1, address: '127.0.0.1:0'}
- {name: http2, address: '127.0.0.2:0', http2: only}
- {name: grpc, address: '127.0.0.3:0', http2: only}
- {name: bolt, address: '127.0.0.4:0', protocol: bolt, calls: [{upstream: bolt}]}
- {name: dubbo, address: '127.0.0.5:0', protocol: dubbo, calls: [{upstream: dubbo}]}
- {name: tcp, address: '127.0.0.6:0', protocol: tcp, upstream: tcp}
hosts:
- {names: ['*'], listeners: [http1], routes: [{prefix: /, upstream: http1}]}
- {names: ['*'], listeners: [http2], routes: [{prefix: /, upstream: http2}]}
- {names: ['*'], listeners: [grpc], routes: [{prefix: /, upstream: grpc}]}
upstreams:
`

// loadProxy serves every protocol, with a server behind each.
func loadProxy(t testing.TB) (*Proxy, *meshload.Ledger) {
	l, text := &meshload.Ledger{}, loadText
	words := map[string]string{"http1": "http", "http2": "http2", "grpc": "grpc", "bolt": "bolt", "dubbo": "dubbo", "tcp": "http"}
	for _, protocol := range meshload.Protocols {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(meshload.Serve(protocol, ln, l))
		text += fmt.Sprintf("- {name: %s, protocol: %s, endpoints: [{address: '%s'}]}\n", protocol, words[protocol], ln.Addr())
	}
	return serve(t, text), l
}

func (p *Proxy) dialLoad(protocol string) func() (net.Conn, error) {
	return func() (net.Conn, error) { return net.Dial("tcp", p.Address(protocol).String()) }
}

// leakRequests is how many requests the leak test makes: 20,000, or what
// HAUBERK_TEST_REQUESTS says, such as a million.
func leakRequests(t *testing.T) int {
	text := os.Getenv("HAUBERK_TEST_REQUESTS")
	if text == "" {
		return 20_000
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1000 {
		t.Fatalf("HAUBERK_TEST_REQUESTS: %d, %v", n, err)
	}
	return n
}

// load makes n requests in all protocols; one in twenty is left at a random point.
func (p *Proxy) load(t *testing.T, first uint64, n int) {
	t.Helper()
	const each = 2
	var next atomic.Uint64
	next.Store(first)
	var wg sync.WaitGroup
	for i, protocol := range meshload.Protocols {
		for j := range each {
			wg.Go(func() {
				c := meshload.New(protocol, p.dialLoad(protocol))
				defer c.Close()
				random := rand.New(rand.NewPCG(first, uint64(i*each+j)))
				for range n / each / len(meshload.Protocols) {
					id, size := next.Add(1), []int{0, 10, 1000, 10_000, 50_000}[random.IntN(5)]
					switch random.IntN(100) {
					case 0, 1, 2, 3, 4:
						c.Abort(id, size, uint8(random.IntN(256)))
						continue
					case 5, 6:
						c.Close()
					}
					if err := c.Ask(id, size); err != nil {
						t.Errorf("%s request %d of %d bytes: %v", protocol, id, size, err)
						return
					}
				}
			})
		}
	}
	wg.Wait()
}

type held struct {
	goroutines, descriptors int
	heap                    uint64
}

func holds(t testing.TB) held {
	t.Helper()
	runtime.GC()
	runtime.GC() // what pools hold lives through one
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return held{runtime.NumGoroutine(), len(all), m.HeapAlloc}
}

// quiet waits until no client is connected and no more is held than before.
// Connections to servers are kept for the next request: slack of them.
func (p *Proxy) quiet(t testing.TB, before held, slack int) {
	t.Helper()
	var now held
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		now = holds(t)
		if p.open.Load() == 0 && now.goroutines <= before.goroutines+3*slack && now.descriptors <= before.descriptors+2*slack {
			return
		}
	}
	buf := make([]byte, 1<<20)
	t.Errorf("%d connections open; %+v, before %+v\n%s", p.open.Load(), now, before, buf[:runtime.Stack(buf, true)])
}

// TestLeaks: after many requests, some of them left in the middle, nothing is
// kept but idle connections to servers.
func TestLeaks(t *testing.T) {
	n := leakRequests(t)
	p, l := loadProxy(t)
	p.load(t, 0, 3000) // what is kept is kept from here on
	p.quiet(t, held{1 << 20, 1 << 20, 0}, 0)
	before := holds(t)
	began := time.Now()
	p.load(t, 1_000_000_000, n)
	took := time.Since(began)
	p.quiet(t, before, 12) // a connection to a server for each client there was
	after := holds(t)
	t.Logf("%d requests in %v: %+v before, %+v after", n, took.Round(time.Millisecond), before, after)
	if after.heap > before.heap+8<<20 {
		t.Errorf("the heap has grown from %d to %d bytes", before.heap, after.heap)
	}
	if l.Twice.Load() != 0 || l.Served.Load() < uint64(n)*9/10 {
		t.Errorf("%d served, %d of them twice", l.Served.Load(), l.Twice.Load())
	}
}

// TestBlocksComeBack: a block that is taken from the pool returns to it, however
// a connection ends. While nothing is collected, the pool makes what it misses.
func TestBlocksComeBack(t *testing.T) {
	var made atomic.Int64
	newBlock := blocks.New
	t.Cleanup(func() { blocks.New = newBlock }) // after the proxy has ended
	blocks.New = func() any { made.Add(1); return newBlock() }
	p, _ := loadProxy(t)
	const aborts = 300
	runtime.GC() // twice: what other tests have left in the pool goes
	runtime.GC()
	for _, protocol := range []string{"http1", "tcp"} {
		percent := debug.SetGCPercent(-1)
		begin := made.Load()
		c := meshload.New(protocol, p.dialLoad(protocol))
		for i := range aborts {
			c.Abort(uint64(i), 3000, uint8(i))
		}
		c.Close()
		n := made.Load() - begin
		debug.SetGCPercent(percent)
		if n > aborts/4 {
			t.Errorf("%s: %d blocks made for %d connections", protocol, n, aborts)
		}
		p.quiet(t, held{1 << 20, 1 << 20, 0}, 0)
	}
	if made.Load() == 0 {
		t.Error("no block was made: nothing was counted")
	}
}
