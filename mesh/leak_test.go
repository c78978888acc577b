//go:build !race

// Under the race detector sync.Pool forgets on purpose, and all takes ten times
// as long.

package mesh

import (
	"errors"
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

	"hauberk.dev/mesh/balance"
	"hauberk.dev/plan"
	"hauberk.dev/test/meshload"
)

// leakRequests is how many requests the leak test makes: 20,000, or what
// HAUBERK_TEST_REQUESTS says, such as a million.
func leakRequests(t *testing.T) int {
	n, err := strconv.Atoi(os.Getenv("HAUBERK_TEST_REQUESTS"))
	if os.Getenv("HAUBERK_TEST_REQUESTS") == "" {
		return 20_000
	}
	if err != nil || n < 1000 {
		t.Fatalf("HAUBERK_TEST_REQUESTS: %d, %v", n, err)
	}
	return n
}

// loadPorts are those of a service that is asked in every protocol.
var loadPorts = map[string]plan.Port{
	"http1": {Port: 8080, Protocol: "http"}, "http2": {Port: 8081, Protocol: "http"}, "grpc": {Port: 9090, Protocol: "grpc"},
	"bolt": {Port: 12200, Protocol: "bolt"}, "dubbo": {Port: 20880, Protocol: "dubbo"}, "tcp": {Port: 7000, Protocol: "tcp"},
}

// loadWorld is a caller and a service that answers in every protocol.
func loadWorld(t testing.TB, o Options) (w *world, web *box, l *meshload.Ledger) {
	w = newWorldOf(t, o)
	web = w.add("web", nil, nil, nil)
	var all []plan.Port
	for _, protocol := range meshload.Protocols {
		all = append(all, loadPorts[protocol])
	}
	shop := w.add("shop", all, anyone(), nil)
	w.apply()
	l = &meshload.Ledger{}
	for _, protocol := range meshload.Protocols {
		t.Cleanup(meshload.Serve(protocol, shop.listen(t, int(loadPorts[protocol].Port)), l))
	}
	return w, web, l
}

// dialLoad dials a protocol's port of the service.
func (w *world) dialLoad(from *box, protocol string) func() (net.Conn, error) {
	to := fmt.Sprintf("%s:%d", w.service("shop").Address, loadPorts[protocol].Port)
	return func() (net.Conn, error) { return from.dial("tcp4", to) }
}

// held is what a process holds.
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

// load makes n requests in all protocols, by two clients each; one in twenty is
// left at a random point, and one in fifty begins a connection anew.
func (w *world) load(t *testing.T, from *box, first uint64, n int) {
	t.Helper()
	const each = 2
	var next atomic.Uint64
	next.Store(first)
	var wg sync.WaitGroup
	for i, protocol := range meshload.Protocols {
		for j := range each {
			wg.Go(func() {
				c := meshload.New(protocol, w.dialLoad(from, protocol))
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

// quiet waits until nothing of the load is left: no flow, nothing held, and no
// more goroutines and descriptors than before.
func (w *world) quiet(before held) error {
	var now held
	var flows, waiting int
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		_, flows = w.proxy.registry.flows()
		waiting = int(w.proxy.held.Load())
		now = holds(w.t)
		// Sockets to guests are kept in stock, up to stockLow + stockFill each.
		if flows == 0 && waiting == 0 && now.goroutines <= before.goroutines+10 && now.descriptors <= before.descriptors+len(w.boxes)*(stockLow+stockFill) {
			return nil
		}
	}
	return fmt.Errorf("%d flows, %d bytes held; %+v, before %+v", flows, waiting, now, before)
}

// TestLeaks: after many requests, some of them left in the middle, nothing is
// kept: no goroutine, descriptor or memory, no count of what is open.
func TestLeaks(t *testing.T) {
	n := leakRequests(t)
	w, web, l := loadWorld(t, Options{})
	w.load(t, web, 0, 3000) // what is kept is kept from here on
	idle := held{goroutines: 1 << 20, descriptors: 1 << 20}
	if err := w.quiet(idle); err != nil {
		t.Fatal(err)
	}
	time.Sleep(lingerTime) // of clients that ended orderly
	before := holds(t)
	began := time.Now()
	w.load(t, web, 1_000_000_000, n)
	took := time.Since(began)
	if err := w.quiet(before); err != nil {
		buf := make([]byte, 1<<20)
		t.Errorf("%v\n%s", err, buf[:runtime.Stack(buf, true)])
	}
	after := holds(t)
	t.Logf("%d requests in %v: %+v before, %+v after", n, took.Round(time.Millisecond), before, after)
	if after.heap > before.heap+8<<20 {
		t.Errorf("the heap has grown from %d to %d bytes", before.heap, after.heap)
	}
	for _, sb := range w.proxy.sandboxes {
		for direction := range sb.open {
			if open := sb.open[direction].Load(); open != 0 {
				t.Errorf("%s counts %d open", sb.facts.Load().Instance, open)
			}
		}
	}
	if set := w.proxy.directory.Load().services["bank/shop"].set; set.Open(balance.Connections) != 0 {
		t.Errorf("the balancer counts %d open", set.Open(balance.Connections))
	}
	if l.Twice.Load() != 0 || l.Served.Load() < uint64(n)*9/10 {
		t.Errorf("%d served, %d of them twice", l.Served.Load(), l.Twice.Load())
	}
}

// TestBuffersComeBack: what is taken from a pool returns to it, however a
// connection ends. While nothing is collected, a pool makes what it misses.
func TestBuffersComeBack(t *testing.T) {
	var made atomic.Int64
	newBuffer, newFrame := buffers.New, frameBuffers.New
	buffers.New = func() any { made.Add(1); return newBuffer() }
	frameBuffers.New = func() any { made.Add(1); return newFrame() }
	w, web, _ := loadWorld(t, Options{})
	t.Cleanup(func() { // after the proxy has ended
		buffers.New, frameBuffers.New = newBuffer, newFrame
	})
	const aborts = 300
	runtime.GC() // twice: what other tests have left in the pool goes
	runtime.GC()
	round := func(protocol string) int64 {
		defer debug.SetGCPercent(debug.SetGCPercent(-1))
		begin := made.Load()
		c := meshload.New(protocol, w.dialLoad(web, protocol))
		defer c.Close()
		for i := range aborts {
			c.Abort(uint64(i), 3000, uint8(i))
			// Not many at once: those that are still served hold theirs rightly.
			for deadline := time.Now().Add(time.Minute); i%10 == 9 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
				if _, flows := w.proxy.registry.flows(); flows == 0 {
					break
				}
			}
		}
		return made.Load() - begin
	}
	for _, protocol := range []string{"tcp", "bolt", "dubbo", "http1"} {
		// What is lost is lost each time; on a busy machine many are out at once.
		n := round(protocol)
		for again := 0; n > aborts/4 && again < 4; again++ {
			n = min(n, round(protocol))
		}
		if n > aborts/4 {
			t.Errorf("%s: %d buffers made for %d connections", protocol, n, aborts)
		}
		if err := w.quiet(held{1 << 20, 1 << 20, 0}); err != nil {
			t.Error(errors.Join(errors.New(protocol), err))
		}
	}
	if made.Load() == 0 {
		t.Error("no buffer was made: nothing was counted")
	}
}
