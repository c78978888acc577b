package balance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const second = Time(time.Second)

func up(s *Set) (names []string) {
	for _, h := range s.Hosts() {
		if h.Up() {
			names = append(names, h.name)
		}
	}
	return names
}

// A host is ejected at the nth failure in a row, each time for longer, until
// the greatest; and it is forgiven one ejection for each interval it is well.
func TestConsecutiveFailures(t *testing.T) {
	o := &Outlier{Failures: 3, Unreachable: 2, Ejection: 10 * time.Second, MaxEjection: 25 * time.Second, Interval: time.Hour, MaxEjected: 100}
	s := newSet(t, Policy{Balancer: RoundRobin, Outlier: o, Panic: 1}, endpoints(2))
	h := s.Hosts()[0]
	for _, c := range []struct {
		name string
		list []Outcome
		out  bool
	}{
		{"two failures", []Outcome{Failure, Failure}, false},
		{"a success between", []Outcome{Failure, Failure, Success, Failure, Failure}, false},
		{"who cancels says nothing", []Outcome{Failure, Cancelled, Failure, Cancelled}, false},
		{"reached between", []Outcome{Unreachable, Failure}, false},
		{"three failures", []Outcome{Failure, Failure, Failure}, true},
		{"unreachable twice", []Outcome{Unreachable, Unreachable}, true},
		{"of both kinds", []Outcome{Unreachable, Failure, Failure}, true},
	} {
		s := newSet(t, Policy{Outlier: o, Panic: 1}, endpoints(2))
		for _, outcome := range c.list {
			s.report(s.Hosts()[0], 1, time.Millisecond, outcome)
		}
		if out := !s.Hosts()[0].Up(); out != c.out {
			t.Errorf("%s: out %v", c.name, out)
		}
	}
	now := second
	for i, last := range []Time{10, 20, 25, 25} {
		fail(t, s, now, "e0")
		fail(t, s, now, "e0")
		if h.Up() {
			t.Fatalf("ejection %d did not happen", i)
		}
		if next(t, s, now+last*second-1, Request{}); h.Up() {
			t.Errorf("ejection %d is over before %d s", i, last)
		}
		now += last * second
		if next(t, s, now, Request{}); !h.Up() {
			t.Errorf("ejection %d is not over after %d s", i, last)
		}
	}
	// Three intervals are forgiven: the next is the second again.
	for range 3 {
		now += 3600 * second
		next(t, s, now, Request{})
	}
	fail(t, s, now, "e0")
	fail(t, s, now, "e0")
	next(t, s, now+19*second, Request{})
	if h.Up() {
		t.Error("forgiven more than one ejection for each interval")
	}
	if next(t, s, now+20*second, Request{}); !h.Up() {
		t.Error("not forgiven")
	}
}

func TestMaxEjected(t *testing.T) {
	for _, c := range []struct {
		hosts int
		most  uint32
		want  int
	}{{10, 30, 3}, {10, 5, 1}, {3, 10, 1}, {3, 100, 3}, {1, 10, 1}} {
		s := newSet(t, Policy{Outlier: &Outlier{Unreachable: 1, MaxEjected: c.most}}, endpoints(c.hosts))
		for i := range c.hosts {
			fail(t, s, 1, fmt.Sprintf("e%d", i))
		}
		if out := c.hosts - len(up(s)); out != c.want {
			t.Errorf("%d hosts, at most %d %%: %d are out, want %d", c.hosts, c.most, out, c.want)
		}
	}
}

// The one whose success rate is far below the others' is ejected at the end of
// the interval; not for few requests, nor among few hosts.
func TestSuccessRate(t *testing.T) {
	run := func(hosts, requests int, bad map[int]int) []string {
		s := newSet(t, Policy{Balancer: RoundRobin, Outlier: &Outlier{Deviations: 1.9, MaxEjected: 50}}, endpoints(hosts))
		for i, h := range s.Hosts() {
			for n := range requests {
				o := Success
				if n%100 < bad[i] {
					o = Failure
				}
				s.report(h, second, time.Millisecond, o)
			}
		}
		next(t, s, 10*second-1, Request{})
		if len(up(s)) != hosts {
			t.Error("ejected before the interval is over")
		}
		next(t, s, 10*second, Request{})
		return up(s)
	}
	for _, c := range []struct {
		hosts, requests int
		bad             map[int]int
		out             string
	}{
		{6, 200, map[int]int{0: 1, 1: 2, 4: 40}, "e4"},
		{6, 99, map[int]int{4: 100}, ""},
		{4, 200, map[int]int{2: 100}, ""},
		{6, 200, map[int]int{}, ""},
		{6, 200, map[int]int{0: 50, 1: 50, 2: 50, 3: 50, 4: 50, 5: 50}, ""},
	} {
		in := run(c.hosts, c.requests, c.bad)
		if out := c.hosts - len(in); out > 1 || (out == 1) != (c.out != "") || slices.Contains(in, c.out) {
			t.Errorf("%+v: left are %v", c, in)
		}
	}
}

// The thresholds of active checks, step by step.
func TestHealth(t *testing.T) {
	c := Check{Unhealthy: 3, Healthy: 2}
	for _, x := range []struct{ results, want string }{
		{"-", "-"}, {"+", "+"}, // the first is believed
		{"+--+--+---", "+++++++++-"},
		{"+----+-++", "+++-----+"},
		{"-+", "--"}, {"-++", "--+"}, {"-++-", "--++"},
	} {
		var h Health
		got := ""
		for _, r := range x.results {
			before := h.Unhealthy
			if changed := h.Record(&c, r == '+'); changed != (before != h.Unhealthy) {
				t.Errorf("%s: changed is %v", x.results, changed)
			}
			got += map[bool]string{true: "-", false: "+"}[h.Unhealthy]
		}
		if got != x.want {
			t.Errorf("results %s: believed %s, want %s", x.results, got, x.want)
		}
	}
	c = Check{Interval: 10 * time.Second, Jitter: 20}
	r := seeded()
	least, most := time.Hour, time.Duration(0)
	for range 1000 {
		w := c.wait(r())
		least, most = min(least, w), max(most, w)
	}
	if least < 10*time.Second || most > 12*time.Second || least > 10100*time.Millisecond || most < 11900*time.Millisecond {
		t.Errorf("waits of %v to %v", least, most)
	}
}

// Checks run by themselves, are not doubled, and follow the set.
func TestRunChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := NewClock()
		s := newSet(t, Policy{Balancer: RoundRobin, Check: &Check{Interval: 10 * time.Second, Timeout: time.Second, Unhealthy: 2, Healthy: 1}}, endpoints(3))
		var mu sync.Mutex
		ill, count := map[string]bool{}, map[string]int{}
		var open atomic.Int32
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.RunChecks(ctx, clock.Now, func(ctx context.Context, h *Host) error {
				mu.Lock()
				count[h.name]++
				bad := ill[h.name]
				mu.Unlock()
				if !bad {
					return nil
				}
				open.Add(1)
				defer open.Add(-1)
				<-ctx.Done()
				return ctx.Err()
			})
		}()
		time.Sleep(5 * time.Second)
		if len(up(s)) != 3 || count["e0"] != 1 {
			t.Fatalf("after 5 s: %v, %v", up(s), count)
		}
		mu.Lock()
		ill["e1"] = true
		mu.Unlock()
		time.Sleep(30 * time.Second)
		if got := up(s); slices.Contains(got, "e1") || len(got) != 2 {
			t.Errorf("up: %v", got)
		}
		for range 6 {
			if got := next(t, s, clock.Now(), Request{}); got == "e1" {
				t.Error("the unhealthy one was picked")
			}
		}
		mu.Lock()
		ill["e1"] = false
		mu.Unlock()
		time.Sleep(15 * time.Second)
		if got := up(s); len(got) != 3 {
			t.Errorf("after it is well again: %v", got)
		}
		// A new endpoint is checked at once.
		ill["e3"] = true
		if err := s.Replace(clock.Now(), endpoints(4)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(1100 * time.Millisecond)
		if slices.Contains(up(s), "e3") {
			t.Error("the first result of a new endpoint was not believed")
		}
		for name, n := range count {
			if most := 7; n > most {
				t.Errorf("%s was probed %d times in 51 s", name, n)
			}
		}
		cancel()
		<-done
		if open.Load() != 0 {
			t.Error("a probe outlived its run")
		}
	})
}

// A limit is never passed, and never refuses while there is room.
func TestBreakers(t *testing.T) {
	s := newSet(t, Policy{Limits: Limits{Requests: 5, Connections: 2}, EndpointLimits: Limits{Requests: 2, Pending: 1}}, endpoints(3))
	var open []Pick
	for i := range 5 {
		p, err := s.Pick(0, Request{})
		if err != nil {
			t.Fatalf("pick %d: %v", i, err)
		}
		open = append(open, p)
	}
	if _, err := s.Pick(0, Request{}); !errors.Is(err, ErrOverflow) || s.Refused(Requests) != 1 {
		t.Errorf("a sixth: %v, %d refused", err, s.Refused(Requests))
	}
	for _, h := range s.Hosts() {
		if h.Active() > 2 {
			t.Errorf("%s has %d", h.name, h.Active())
		}
	}
	open[0].Done(0, Success)
	if p, err := s.Pick(0, Request{}); err != nil {
		t.Errorf("after one has ended: %v", err)
	} else {
		p.Release()
	}
	s = newSet(t, Policy{Limits: Limits{Requests: 3}, EndpointLimits: Limits{Requests: 2}}, endpoints(2))
	for i, c := range []struct {
		name string
		err  error
	}{{"e1", nil}, {"e1", nil}, {"e1", ErrOverflow}, {"e2", ErrNoEndpoint}, {"e0", nil}, {"e0", ErrOverflow}} {
		if p, err := s.PickNamed(0, c.name); !errors.Is(err, c.err) || err == nil && p.Host().name != c.name {
			t.Errorf("named pick %d: %v", i, err)
		}
	}
	if s.Active() != 3 {
		t.Errorf("%d are under way", s.Active())
	}
	// One endpoint's limit, with all others tried.
	s = newSet(t, Policy{EndpointLimits: Limits{Requests: 1}}, endpoints(2))
	p, err := s.Pick(0, Request{})
	if err != nil {
		t.Fatal(err)
	}
	other := s.Hosts()[0]
	if other == p.Host() {
		other = s.Hosts()[1]
	}
	if _, err := s.Pick(0, Request{Tried: []*Host{other}}); !errors.Is(err, ErrOverflow) || s.Active() != 1 {
		t.Errorf("full or tried: %v, %d under way", err, s.Active())
	}
	s = newSet(t, Policy{Limits: Limits{Connections: 2}, EndpointLimits: Limits{Pending: 1}}, endpoints(1))
	h := s.Hosts()[0]
	first, second, third := s.Take(Connections), s.Take(Connections), s.Take(Connections)
	if !first || !second || third || !s.TakeAt(h, Pending) || s.TakeAt(h, Pending) || s.Open(Connections) != 2 {
		t.Error("limits of connections and of pending requests")
	}
	s.Give(Connections)
	s.GiveAt(h, Pending)
	if !s.Take(Connections) || !s.TakeAt(h, Pending) {
		t.Error("what is given back is not there")
	}
}

func TestLimitIsExactUnderConcurrency(t *testing.T) {
	var c counts
	var held, most, refusedWithRoom atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5000 {
				if c.take(Requests, 8) {
					n := held.Add(1)
					for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
					}
					held.Add(-1)
					c.give(Requests)
				} else {
					refusedWithRoom.Add(1) // eight goroutines of one each always have room
				}
			}
		})
	}
	wg.Wait()
	if most.Load() > 8 || refusedWithRoom.Load() != 0 || c.now[Requests].Load() != 0 {
		t.Errorf("most %d, refused %d, left %d", most.Load(), refusedWithRoom.Load(), c.now[Requests].Load())
	}
}

func TestRetryBudget(t *testing.T) {
	s := newSet(t, Policy{Retry: Retry{Tries: 3, Percent: 20, Floor: 3}, Limits: Limits{Retries: 10}}, endpoints(1))
	for _, c := range []struct{ active, want int }{{0, 3}, {15, 3}, {20, 4}, {45, 9}, {100, 10}} {
		var open []Pick
		for range c.active {
			p, err := s.Pick(0, Request{})
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, p)
		}
		n := 0
		for s.Retry() {
			n++
		}
		if n != c.want {
			t.Errorf("%d under way: %d retries, want %d", c.active, n, c.want)
		}
		for range n {
			s.EndRetry()
		}
		for _, p := range open {
			p.Release()
		}
	}
}

func TestBackoff(t *testing.T) {
	p, err := Policy{Retry: Retry{Tries: 5, Base: 10 * time.Millisecond, Max: 60 * time.Millisecond, PerTry: time.Second}}.Checked()
	if err != nil {
		t.Fatal(err)
	}
	r := seeded()
	for n, top := range map[int]time.Duration{1: 10, 2: 30, 3: 60, 10: 60, 64: 60, 1000: 60} {
		top *= time.Millisecond
		var most, sum time.Duration
		for range 2000 {
			w := p.Retry.Wait(n, r())
			if w < 0 || w > top {
				t.Fatalf("retry %d waits %v, at most %v", n, w, top)
			}
			most, sum = max(most, w), sum+w
		}
		if most < top*9/10 || sum/2000 < top*4/10 || sum/2000 > top*6/10 {
			t.Errorf("retry %d: most %v, mean %v of %v", n, most, sum/2000, top)
		}
	}
	for _, c := range []struct{ now, deadline, want Time }{{5, 0, 5 + second}, {5, second, second}, {5, 3 * second, 5 + second}} {
		if got := p.Retry.Until(c.now, c.deadline); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
	if got := (&Retry{}).Until(1, 7); got != 7 {
		t.Errorf("without a bound of its own: %d", got)
	}
}
