package balance

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
)

// seeded is the same randomness each time, for one goroutine.
func seeded() func() uint64 { return rand.New(rand.NewPCG(7, 11)).Uint64 }

func endpoints(n int) []Endpoint {
	all := make([]Endpoint, n)
	for i := range all {
		all[i].Name = fmt.Sprintf("e%d", i)
	}
	return all
}

func weighted(weights ...uint32) []Endpoint {
	all := endpoints(len(weights))
	for i, w := range weights {
		all[i].Weight = w
	}
	return all
}

func newSet(t testing.TB, p Policy, all []Endpoint) *Set {
	t.Helper()
	s, err := New(p, seeded())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Replace(0, all); err != nil {
		t.Fatal(err)
	}
	return s
}

// next picks, and says the request is over.
func next(t testing.TB, s interface {
	Pick(Time, Request) (Pick, error)
}, now Time, r Request) string {
	t.Helper()
	p, err := s.Pick(now, r)
	if err != nil {
		t.Fatal(err)
	}
	p.Done(now, Success)
	return p.Host().name
}

// spread counts who gets n requests, each over before the next.
func spread(t testing.TB, s *Set, now Time, n int) map[string]int {
	t.Helper()
	got := map[string]int{}
	r := seeded()
	for range n {
		got[next(t, s, now, Request{Hash: r()})]++
	}
	return got
}

var balancers = []Balancer{LeastRequest, RoundRobin, Random, PeakEWMA, Maglev, RingHash}

// Every balancer spreads by weight. The tolerance is six standard deviations of
// a random draw, and for hashes what their tables differ by.
func TestSpread(t *testing.T) {
	const n = 60_000
	for _, weights := range [][]uint32{{1, 1, 1, 1, 1}, {1, 2, 3}, {100, 1}, {65535, 1, 1}} {
		for _, b := range balancers {
			if b == PeakEWMA || b == LeastRequest && len(weights) == 2 {
				continue // by latency, and always both of two: below
			}
			s := newSet(t, Policy{Balancer: b, Near: NearIgnored}, weighted(weights...))
			got := spread(t, s, 0, n)
			var sum float64
			for _, w := range weights {
				sum += float64(w)
			}
			for i, w := range weights {
				part := float64(w) / sum
				want, slack := part*n, 6*math.Sqrt(n*part*(1-part))+1
				if b == RingHash {
					slack += 0.12*want + 1 // few points for each endpoint
				}
				if b == Maglev {
					slack += 0.02*want + 2
				}
				if x := float64(got[fmt.Sprintf("e%d", i)]); math.Abs(x-want) > slack {
					t.Errorf("%s %v: e%d got %v of %d, want %.0f±%.0f", b, weights, i, x, n, want, slack)
				}
			}
		}
	}
}

// Round robin is even at every moment, and by weight it does not clump.
func TestRoundRobinIsSmooth(t *testing.T) {
	s := newSet(t, Policy{Balancer: RoundRobin}, endpoints(3))
	for i := range 9 {
		if got := next(t, s, 0, Request{}); got != fmt.Sprintf("e%d", i%3) {
			t.Errorf("pick %d is %s", i, got)
		}
	}
	s = newSet(t, Policy{Balancer: RoundRobin}, weighted(5, 1, 1))
	var order strings.Builder
	for range 700 {
		order.WriteString(next(t, s, 0, Request{})[1:])
	}
	if run := "0000000"; strings.Contains(order.String(), run) || strings.Contains(order.String(), "11") || strings.Contains(order.String(), "22") {
		t.Errorf("it clumps: %s", order.String()[:70])
	}
	for at := 0; at+70 <= order.Len(); at += 70 {
		if n := strings.Count(order.String()[at:at+70], "0"); n < 48 || n > 52 {
			t.Errorf("of picks %d to %d, %d are of the heavy one, want 50", at, at+70, n)
		}
	}
}

// Least request never gives the busier of two, and keeps unequal ones equally
// busy for their weight.
func TestLeastRequest(t *testing.T) {
	s := newSet(t, Policy{}, endpoints(2))
	for i := range 100 {
		if _, err := s.Pick(0, Request{}); err != nil {
			t.Fatal(err)
		}
		a, b := s.Hosts()[0].Active(), s.Hosts()[1].Active()
		if a-b > 1 || b-a > 1 {
			t.Fatalf("after %d picks %d and %d are under way", i+1, a, b)
		}
	}
	s = newSet(t, Policy{}, weighted(3, 1))
	for range 400 {
		if _, err := s.Pick(0, Request{}); err != nil {
			t.Fatal(err)
		}
	}
	if a := s.Hosts()[0].Active(); a < 298 || a > 302 {
		t.Errorf("%d of 400 are at the endpoint of weight 3 beside one of 1", a)
	}
	// Many, of which the power of two choices keeps the busiest near the rest.
	s = newSet(t, Policy{}, endpoints(100))
	for range 10_000 {
		if _, err := s.Pick(0, Request{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range s.Hosts() {
		if n := h.Active(); n < 94 || n > 106 {
			t.Errorf("%s has %d of 10,000 at 100 endpoints", h.name, n)
		}
	}
}

// The nearer of equals is preferred, and gets no more than one request before
// the others.
func TestNear(t *testing.T) {
	all := endpoints(3)
	all[0].Locality, all[1].Locality, all[2].Locality = "r/z/n1", "r/z/n2", "r/y/n3"
	s := newSet(t, Policy{Locality: "r/z/n1"}, all)
	if got := spread(t, s, 0, 3000); got["e0"] < 1850 || got["e0"] > 2150 || got["e1"] <= got["e2"] {
		t.Errorf("%v; the near one wins whenever it is drawn, two times of three", got)
	}
	for range 300 {
		if _, err := s.Pick(0, Request{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range s.Hosts() {
		if n := h.Active(); n < 98 || n > 102 {
			t.Errorf("%s has %d of 300", h.name, n)
		}
	}
	// First: by rank, and over the ranks as they fail.
	s = newSet(t, Policy{Balancer: Random, Near: NearFirst, Locality: "r/z/n1", Outlier: &Outlier{Unreachable: 1, MaxEjected: 100}}, all)
	if got := spread(t, s, 0, 100); got["e0"] != 100 {
		t.Errorf("%v, want the nearest only", got)
	}
	fail(t, s, 0, "e0")
	if got := spread(t, s, 0, 100); got["e1"] != 100 {
		t.Errorf("%v, want the next", got)
	}
	fail(t, s, 0, "e1")
	if got := spread(t, s, 0, 100); got["e2"] != 100 {
		t.Errorf("%v, want the last", got)
	}
}

// fail reports that a host was not reached.
func fail(t testing.TB, s *Set, now Time, name string) {
	t.Helper()
	for _, h := range s.Hosts() {
		if h.name == name {
			s.report(h, now, time.Millisecond, Unreachable)
			return
		}
	}
	t.Fatalf("no host %s", name)
}

// Load moves to the next priority as far as the first cannot take it: 140 per
// cent of its healthy share, as in the table of Envoy's documentation.
func TestPriorities(t *testing.T) {
	for _, c := range []struct{ healthy, want int }{{10, 100}, {8, 100}, {7, 98}, {5, 70}, {2, 28}, {0, 0}} {
		all := endpoints(20)
		for i := 10; i < 20; i++ {
			all[i].Priority = 1
		}
		s := newSet(t, Policy{Balancer: Random, Outlier: &Outlier{Unreachable: 1, MaxEjected: 100}}, all)
		for i := c.healthy; i < 10; i++ {
			fail(t, s, 0, fmt.Sprintf("e%d", i))
		}
		first := 0
		for name, n := range spread(t, s, 0, 20_000) {
			if len(name) == 2 {
				first += n
			}
		}
		if got := float64(first) / 200; math.Abs(got-float64(c.want)) > 2 {
			t.Errorf("%d of 10 healthy: %.1f %% go to the first priority, want %d", c.healthy, got, c.want)
		}
	}
}

// With too few healthy, all are used; FailClosed uses none but healthy ones.
func TestPanic(t *testing.T) {
	for _, c := range []struct {
		panics  uint32
		closed  bool
		failed  int
		used    int
		wantErr error
	}{
		{0, false, 5, 5, nil}, {0, false, 6, 10, nil}, {30, false, 7, 3, nil}, {1, false, 9, 1, nil},
		{1, false, 10, 10, nil}, {50, true, 9, 1, nil}, {50, true, 10, 0, ErrNoHealthy},
	} {
		s := newSet(t, Policy{Balancer: RoundRobin, Panic: c.panics, FailClosed: c.closed, Outlier: &Outlier{Unreachable: 1, MaxEjected: 100}}, endpoints(10))
		for i := range c.failed {
			fail(t, s, 0, fmt.Sprintf("e%d", i))
		}
		if _, err := s.Pick(0, Request{}); !errors.Is(err, c.wantErr) {
			t.Errorf("%+v: %v", c, err)
		}
		if c.wantErr == nil {
			if got := spread(t, s, 0, 100); len(got) != c.used {
				t.Errorf("%+v: used are %v", c, got)
			}
		}
	}
}

// What was tried is not picked again; those out of favour come last, and then
// there is nobody.
func TestTried(t *testing.T) {
	for _, b := range balancers {
		s := newSet(t, Policy{Balancer: b, Outlier: &Outlier{Unreachable: 1, MaxEjected: 100}}, endpoints(5))
		fail(t, s, 0, "e1")
		fail(t, s, 0, "e3")
		for range 50 {
			var tried []*Host
			for i := range 5 {
				p, err := s.Pick(0, Request{Hash: s.random(), Tried: tried})
				if err != nil {
					t.Fatalf("%s: try %d: %v", b, i, err)
				}
				if p.Host().Up() != (i < 3) {
					t.Errorf("%s: try %d is %s", b, i, p.Host().name)
				}
				tried = append(tried, p.Host())
				p.Release()
			}
			if _, err := s.Pick(0, Request{Tried: tried}); !errors.Is(err, ErrTried) {
				t.Errorf("%s: a sixth of five: %v", b, err)
			}
		}
		if n := s.Active(); n != 0 {
			t.Errorf("%s: %d are under way in the end", b, n)
		}
	}
	s := newSet(t, Policy{}, nil)
	if _, err := s.Pick(0, Request{}); !errors.Is(err, ErrNoEndpoint) {
		t.Errorf("nobody: %v", err)
	}
}

// What is known of an endpoint stays while it stays, and a while longer.
func TestReplaceKeepsState(t *testing.T) {
	s := newSet(t, Policy{Outlier: &Outlier{Unreachable: 1, MaxEjected: 100}}, endpoints(3))
	fail(t, s, 0, "e2")
	held, err := s.Pick(0, Request{})
	if err != nil {
		t.Fatal(err)
	}
	all := endpoints(4)
	all[0].Weight = 9
	if err := s.Replace(1, all); err != nil {
		t.Fatal(err)
	}
	hosts := s.Hosts()
	if hosts[2].Up() || held.Host().Active() != 1 || hosts[0].Endpoint().Weight != 9 {
		t.Errorf("forgotten: up %v, active %d", hosts[2].Up(), held.Host().Active())
	}
	if err := s.Replace(2, all[3:]); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if got := next(t, s, 2, Request{}); got != "e3" {
			t.Errorf("%s was picked after it left", got)
		}
	}
	if err := s.Replace(3, all); err != nil {
		t.Fatal(err)
	}
	if now := s.Hosts(); now[2] != hosts[2] || now[2].Up() || held.Host().Active() != 1 {
		t.Error("one that came back has forgotten its faults or its requests")
	}
	held.Done(4, Success)
	if held.Host().Active() != 0 || s.Active() != 0 {
		t.Error("the request is not over")
	}
	if err := s.Replace(5, all[:1]); err != nil {
		t.Fatal(err)
	}
	late := Time(5).Add(goneFor + 1)
	for range 2 { // what left too long ago is forgotten at the next change
		if err := s.Replace(late, all[:1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Replace(late, all); err != nil {
		t.Fatal(err)
	}
	if s.Hosts()[2] == hosts[2] {
		t.Error("a host is remembered for ever")
	}
	for name, bad := range map[string][]Endpoint{"no name": {{}}, "twice": {{Name: "a"}, {Name: "a"}}, "weight": {{Name: "a", Weight: MaxWeight + 1}}, "many": endpoints(MaxEndpoints + 1)} {
		if err := s.Replace(late, bad); err == nil || len(s.Hosts()) != 4 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSubset(t *testing.T) {
	all := endpoints(4)
	all[0].Labels = map[string]string{"version": "1", "zone": "a"}
	all[1].Labels = map[string]string{"version": "2", "zone": "a"}
	all[2].Labels = map[string]string{"version": "2", "zone": "b"}
	s := newSet(t, Policy{Balancer: RoundRobin}, all)
	two, err := s.Subset(0, map[string]string{"version": "2"}, false)
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if got := next(t, two, 0, Request{}); got != "e1" && got != "e2" {
			t.Errorf("%s has not the label", got)
		}
	}
	if again, _ := s.Subset(0, map[string]string{"version": "2"}, false); again != two {
		t.Error("the same subset twice")
	}
	three, err := s.Subset(0, map[string]string{"version": "3"}, false)
	if err != nil {
		t.Fatal(err)
	}
	anyOf, err := s.Subset(0, map[string]string{"version": "3"}, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := three.Pick(0, Request{}); !errors.Is(err, ErrNoEndpoint) || s.Active() != 0 {
		t.Errorf("an empty subset: %v, %d under way", err, s.Active())
	}
	next(t, anyOf, 0, Request{})
	all[3].Labels = map[string]string{"version": "3"}
	if err := s.Replace(0, all); err != nil {
		t.Fatal(err)
	}
	for _, g := range []*Subset{three, anyOf} {
		if got := next(t, g, 0, Request{}); got != "e3" {
			t.Errorf("%s, want the new e3", got)
		}
	}
	for i := range maxSubsets {
		_, err = s.Subset(0, map[string]string{"n": fmt.Sprint(i)}, false)
	}
	if err == nil {
		t.Error("subsets without end")
	}
}

// A new endpoint's share rises with time, in every balancer that draws.
func TestSlowStart(t *testing.T) {
	const window = 100 * time.Second
	for _, b := range []Balancer{RoundRobin, Random, LeastRequest} {
		s := newSet(t, Policy{Balancer: b, SlowStart: window, Near: NearIgnored}, endpoints(3))
		begin := Time(2 * window)
		if err := s.Replace(begin, endpoints(4)); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ at, part float64 }{{0.001, .1}, {.25, .25}, {.5, .5}, {.75, .75}, {1, 1}} {
			const n = 20_000
			want := c.part / (3 + c.part)
			got := float64(spread(t, s, begin.Add(time.Duration(c.at*float64(window))), n)["e3"]) / n
			if math.Abs(got-want) > 0.015 {
				t.Errorf("%s: at %v of the window %.3f, want %.3f", b, c.at, got, want)
			}
		}
	}
}

// Peak EWMA prefers the fast, punishes a peak at once, and asks the slow again
// after a while.
func TestPeakEWMA(t *testing.T) {
	s := newSet(t, Policy{Balancer: PeakEWMA}, endpoints(2))
	now, count := Time(0), map[string]int{}
	slow := "e1"
	request := func() {
		p, err := s.Pick(now, Request{})
		if err != nil {
			t.Fatal(err)
		}
		took := time.Millisecond
		if p.Host().name == slow {
			took = 50 * time.Millisecond
		}
		now = now.Add(took)
		p.Done(now, Success)
		count[p.Host().name]++
	}
	for range 2000 {
		request()
	}
	if count["e0"] < 1900 || count["e1"] == 0 {
		t.Errorf("fast and slow: %v", count)
	}
	slow, count = "e0", map[string]int{}
	for range 2000 {
		request()
	}
	if count["e1"] < 1500 {
		t.Errorf("after they changed places: %v", count)
	}
	// A failure is quick, and must not attract.
	var l latency
	l.set(0, 10*time.Millisecond)
	l.observe(Time(time.Second), time.Microsecond, 10*time.Second, true)
	if got := l.at(Time(time.Second), 10*time.Second); got < 9e6 {
		t.Errorf("a failure made the average %v", got)
	}
	l.observe(Time(2*time.Second), 3*time.Second, 10*time.Second, true)
	if got := l.at(Time(2*time.Second), 10*time.Second); got < 2.9e9 {
		t.Errorf("a failure after 3 s leaves an average of %v", got)
	}
	for at, want := range map[time.Duration]float64{2 * time.Second: 3e9, 12 * time.Second: 3e9 / math.E, 22 * time.Second: 3e9 / math.E / math.E} {
		if got := l.at(Time(at), 10*time.Second); math.Abs(got-want) > 0.01*want {
			t.Errorf("at %v %v, want %v", at, got, want)
		}
	}
}

// No pick allocates, and no lock is taken: it works while the lock is held.
func TestPickAllocatesNothing(t *testing.T) {
	for _, b := range balancers {
		p := Policy{Balancer: b, SlowStart: time.Hour, Outlier: &Outlier{Failures: 5}, Limits: Limits{Requests: 10}, EndpointLimits: Limits{Requests: 5}}
		if b == RingHash || b == Maglev {
			p.Bound = 125
		}
		s := newSet(t, p, weighted(1, 2, 3, 4))
		tried := s.Hosts()[:1]
		s.mu.Lock()
		if n := testing.AllocsPerRun(200, func() {
			p, err := s.Pick(1, Request{Hash: s.random(), Tried: tried})
			if err != nil {
				t.Fatal(err)
			}
			p.Done(2, Success)
		}); n != 0 {
			t.Errorf("%s: %v allocations", b, n)
		}
		s.mu.Unlock()
	}
}

// Endpoints come and go while picks go on: none that is gone is picked after
// Replace has returned, nothing is left under way.
func TestConcurrent(t *testing.T) {
	for _, b := range balancers {
		s, err := New(Policy{Balancer: b, TableSize: 251, Near: NearFirst, Outlier: &Outlier{Unreachable: 2, MaxEjected: 60, Interval: time.Millisecond, Ejection: time.Millisecond}, Limits: Limits{Requests: 64}}, rand.Uint64)
		if err != nil {
			t.Fatal(err)
		}
		clock := NewClock()
		if err := s.Replace(clock.Now(), endpoints(8)); err != nil {
			t.Fatal(err)
		}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					p, err := s.Pick(clock.Now(), Request{Hash: rand.Uint64()})
					if err != nil {
						t.Errorf("%s: %v", b, err)
						return
					}
					p.Done(clock.Now(), Outcome((i+g)%4))
				}
			})
		}
		all := endpoints(12)
		for i := range 300 {
			all[i%12].Weight = uint32(i % 7)
			all[i%12].Priority = uint8(i % 2)
			if err := s.Replace(clock.Now(), all[i%4:4+i%8+1]); err != nil {
				t.Error(err)
			}
		}
		close(stop)
		wg.Wait()
		if s.Active() != 0 {
			t.Errorf("%s: %d are under way", b, s.Active())
		}
		for _, h := range s.Hosts() {
			if h.Active() != 0 {
				t.Errorf("%s: %d are under way at %s", b, h.Active(), h.name)
			}
		}
	}
}
