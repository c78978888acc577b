package balance

import (
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"time"
)

func TestPolicyChecked(t *testing.T) {
	for name, p := range map[string]Policy{
		"balancer":         {Balancer: "best"},
		"near":             {Near: "far"},
		"not prime":        {Balancer: Maglev, TableSize: 65_536},
		"table size":       {TableSize: maxTable + 1},
		"bound":            {Bound: 100},
		"overprovision":    {Overprovision: 99},
		"panic":            {Panic: 101},
		"aggression":       {Aggression: math.NaN()},
		"slow start":       {SlowStart: -1},
		"decay":            {Decay: time.Microsecond},
		"requests":         {Limits: Limits{Requests: -1}},
		"endpoint retries": {EndpointLimits: Limits{Retries: -1}},
		"tries":            {Retry: Retry{Tries: maxTries + 1}},
		"retry budget":     {Retry: Retry{Percent: 101}},
		"backoff":          {Retry: Retry{Base: time.Second, Max: time.Millisecond}},
		"ejection":         {Outlier: &Outlier{Ejection: time.Hour, MaxEjection: time.Minute}},
		"deviations":       {Outlier: &Outlier{Deviations: math.Inf(1)}},
		"check timeout":    {Check: &Check{Timeout: -1}},
		"check jitter":     {Check: &Check{Jitter: 101}},
	} {
		_, err := p.Checked()
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := New(p, seeded()); err == nil {
			t.Errorf("%s: a set was made", name)
		}
	}
	// All faults at once.
	_, err := Policy{Balancer: "x", Near: "y", Bound: 1}.Checked()
	for _, want := range []string{"balancer", "near", "bound"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in %v", want, err)
		}
	}
	if _, err := New(Policy{}, nil); err == nil {
		t.Error("without randomness")
	}
}

// Another policy takes effect on the set there is.
func TestApply(t *testing.T) {
	s := newSet(t, Policy{Balancer: RoundRobin, Outlier: &Outlier{Unreachable: 1, MaxEjected: 100}}, endpoints(3))
	fail(t, s, 0, "e1")
	if err := s.Apply(1, Policy{Balancer: "none"}); err == nil || s.Policy().Balancer != RoundRobin {
		t.Errorf("a bad policy: %v", err)
	}
	if err := s.Apply(1, Policy{Balancer: Maglev}); err != nil {
		t.Fatal(err)
	}
	if got := next(t, s, 1, Request{Hash: 5}); got != next(t, s, 1, Request{Hash: 5}) {
		t.Error("maglev is not in force")
	}
	if len(up(s)) != 3 {
		t.Error("an ejection outlived the policy that asks for it")
	}
	if err := s.Apply(2, Policy{Limits: Limits{Requests: 1}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pick(2, Request{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pick(2, Request{}); !errors.Is(err, ErrOverflow) {
		t.Errorf("the new limit: %v", err)
	}
}

// Whatever a policy and a set of endpoints say, they are refused, or picks work
// and end: never a panic, never a request left.
func FuzzPolicy(f *testing.F) {
	for _, p := range []Policy{
		{}, {Balancer: RoundRobin, SlowStart: time.Second, Aggression: .2}, {Balancer: Maglev, TableSize: 251, Bound: 101},
		{Balancer: RingHash, Bound: 200, Near: NearFirst, Locality: "a/b"}, {Balancer: PeakEWMA, Decay: time.Second},
		{Outlier: &Outlier{Failures: 1, Deviations: 1, MinRequests: 1, MinHosts: 2, Interval: time.Millisecond}, Panic: 100},
		{Limits: Limits{Requests: 1}, EndpointLimits: Limits{Requests: 1}, FailClosed: true},
	} {
		raw, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, []byte{3, 1, 2, 200, 0, 9}, int64(1_000_000))
	}
	f.Fuzz(func(t *testing.T, raw, ends []byte, step int64) {
		var p Policy
		if json.Unmarshal(raw, &p) != nil || len(ends) > 64 {
			return
		}
		p.TableSize = min(p.TableSize, 10_007) // time, not truth
		if p.TableSize == 0 {
			p.TableSize = 1009
		}
		s, err := New(p, seeded())
		if err != nil {
			return
		}
		all := endpoints(len(ends))
		for i, e := range ends {
			all[i].Weight, all[i].Priority = uint32(e)*257, e%3
			all[i].Locality = []string{"", "a/b", "a/c/d", "x"}[e%4]
		}
		if err := s.Replace(0, all); err != nil {
			t.Fatal(err)
		}
		now := Time(0)
		for i := range 64 {
			p, err := s.Pick(now, Request{Hash: s.random()})
			now += Time(step % int64(time.Hour))
			if err == nil {
				p.Done(now, Outcome(i%4))
			}
			if i == 32 {
				if err := s.Replace(now, all[:len(all)/2]); err != nil {
					t.Fatal(err)
				}
			}
		}
		if s.Active() != 0 {
			t.Errorf("%d are under way", s.Active())
		}
	})
}
