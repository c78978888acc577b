package balance

import (
	"fmt"
	"slices"
	"testing"
)

// owners is who has each of n keys.
func owners(t testing.TB, s *Set, n int) []string {
	t.Helper()
	all := make([]string, n)
	for i := range all {
		all[i] = next(t, s, 0, Request{Hash: Hash(fmt.Sprint("key ", i))})
	}
	return all
}

func moved(a, b []string) (n int) {
	for i := range a {
		if a[i] != b[i] {
			n++
		}
	}
	return n
}

// A key stays where it is: through another order of the endpoints, and when one
// leaves or is ejected, but for the keys of that one (the ring) and few others
// (Maglev: the paper's section 5.3 finds some 1 % at this size).
func TestHashDisruption(t *testing.T) {
	const n, keys = 50, 20_000
	for _, b := range []Balancer{Maglev, RingHash} {
		p := Policy{Balancer: b, Outlier: &Outlier{Unreachable: 1, MaxEjected: 100}}
		s := newSet(t, p, endpoints(n))
		before := owners(t, s, keys)
		shuffled := endpoints(n)
		slices.Reverse(shuffled)
		if got := moved(before, owners(t, newSet(t, p, shuffled), keys)); got != 0 {
			t.Errorf("%s: %d keys depend on the order of the endpoints", b, got)
		}
		own := 0
		for _, o := range before {
			if o == "e7" {
				own++
			}
		}
		if own < keys/n/2 || own > keys/n*2 {
			t.Errorf("%s: e7 has %d of %d keys", b, own, keys)
		}
		// Ejected: its keys move, no others.
		fail(t, s, 0, "e7")
		if got := moved(before, owners(t, s, keys)); got != own {
			t.Errorf("%s: %d keys moved with the %d of the ejected", b, got, own)
		}
		// Those that move go to all others, not to one neighbour.
		to := map[string]int{}
		for i, o := range owners(t, s, keys) {
			if before[i] == "e7" {
				to[o]++
			}
		}
		for name, k := range to {
			if k > own/3 {
				t.Errorf("%s: %s takes %d of the %d keys of the ejected", b, name, k, own)
			}
		}
		// Gone.
		if err := s.Replace(0, slices.Delete(endpoints(n), 7, 8)); err != nil {
			t.Fatal(err)
		}
		more := moved(before, owners(t, s, keys)) - own
		if b == RingHash && more != 0 || more > keys*3/100 {
			t.Errorf("%s: %d keys of others moved when one left", b, more)
		}
		t.Logf("%s: one of %d leaves: its %d keys move, and %d of the other %d", b, n, own, more, keys-own)
	}
}

// The table is full and fair, whatever the number and weight of endpoints.
func TestMaglevTable(t *testing.T) {
	for _, n := range []int{1, 2, 3, 10, 250} {
		s := newSet(t, Policy{Balancer: Maglev}, endpoints(n))
		table := s.all.tiers[0].table
		count := make([]int, n)
		for _, i := range table {
			count[i]++ // panics on a slot nobody has
		}
		if most, least := slices.Max(count), slices.Min(count); most-least > 1 {
			t.Errorf("%d endpoints have %d to %d slots", n, least, most)
		}
	}
}

// One hash for everything must not kill one endpoint.
func TestBoundedLoad(t *testing.T) {
	for _, b := range []Balancer{Maglev, RingHash} {
		s := newSet(t, Policy{Balancer: b, Bound: 125}, endpoints(10))
		for range 1000 {
			if _, err := s.Pick(0, Request{Hash: 42}); err != nil {
				t.Fatal(err)
			}
		}
		total := int64(0)
		for _, h := range s.Hosts() {
			total += h.Active()
			if h.Active() > 125 {
				t.Errorf("%s: %s has %d of 1000", b, h.name, h.Active())
			}
		}
		if total != 1000 {
			t.Errorf("%s: %d are under way", b, total)
		}
	}
}

func BenchmarkPick(b *testing.B) {
	for _, kind := range balancers {
		b.Run(string(kind), func(b *testing.B) {
			s := newSet(b, Policy{Balancer: kind}, endpoints(100))
			b.ReportAllocs()
			for b.Loop() {
				p, err := s.Pick(1, Request{Hash: s.random()})
				if err != nil {
					b.Fatal(err)
				}
				p.Done(2, Success)
			}
		})
	}
}
