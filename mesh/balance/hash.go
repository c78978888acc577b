package balance

import (
	"cmp"
	"math/bits"
	"slices"
	"sort"
)

// Hash is a hash of what requests have in common. All proxies agree on it: it is
// FNV-1a with a last mixing step.
func Hash(s string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return mix(h)
}

// mix spreads every bit over all (the last step of splitmix64).
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// DefaultTable is the size of Maglev's table, a prime, and about that of the
// ring. The paper uses it too; a hundred endpoints differ by one per cent then.
const DefaultTable = 65_537

// maglev makes the lookup table of Maglev (Eisenbud et al., "Maglev: a fast and
// reliable software network load balancer", NSDI 2016, section 3.4): each host
// claims free slots in an order of its own, in turn; by weight as Envoy does.
// The order of members does not matter.
func maglev(members []member, size int) []uint16 {
	const free = 1<<16 - 1
	type claim struct {
		index          uint16
		at, skip       uint64
		weight, target uint64
	}
	m := uint64(size)
	claims := make([]claim, len(members))
	var most uint64
	for i, o := range byName(members) {
		h := Hash(members[o].host.name)
		claims[i] = claim{index: uint16(o), at: h % m, skip: mix(h)%(m-1) + 1, weight: uint64(members[o].weight)}
		most = max(most, claims[i].weight)
	}
	table := make([]uint16, size)
	for i := range table {
		table[i] = free
	}
	filled := 0
	for round := uint64(1); filled < size; round++ {
		for i := range claims {
			c := &claims[i]
			if round*c.weight < c.target {
				continue
			}
			c.target += most
			for table[c.at] != free {
				c.at = (c.at + c.skip) % m
			}
			table[c.at] = c.index
			if filled++; filled == size {
				break
			}
		}
	}
	return table
}

// byName are the indexes of members in the order of their names.
func byName(members []member) []int {
	order := make([]int, len(members))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(members[a].host.name, members[b].host.name) })
	return order
}

// point is one place of a host on the ring.
type point struct {
	hash  uint64
	index uint16
}

const (
	minPoints = 32 // on the ring, per host of average weight
	maxRing   = 1 << 20
)

// ring makes a hash ring (Karger et al., "Consistent hashing and random trees",
// 1997; Envoy: "Ring hash"), where a host has points in proportion to its weight.
// How many for a weight of one is a power of two, so that it seldom changes when
// a host comes or goes, and the points of the others stay where they are.
func ring(members []member, size int) []point {
	var sum uint64
	for _, m := range members {
		sum += uint64(m.weight)
	}
	total := uint64(min(max(size, minPoints*len(members)), maxRing))
	up, down := 0, 0
	for sum<<(up+1) <= total {
		up++
	}
	for sum>>down > total {
		down++
	}
	points := make([]point, 0, total+uint64(len(members)))
	for i, m := range members {
		h := Hash(m.host.name)
		for n := range max(uint64(m.weight)<<up>>down, 1) {
			points = append(points, point{mix(h + n), uint16(i)})
		}
	}
	slices.SortFunc(points, func(a, b point) int {
		return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(members[a.index].host.name, members[b.index].host.name))
	})
	return points
}

// walk bounds how far a hash looks on from its place, before all members are
// looked at in turn.
const walk = 1024

// maglev takes the host at the request's slot, or at the next one after it: a
// host that is down moves its own requests only, to all others.
func (l *level) maglev(s *Set, p *Policy, r *Request) (h *Host, full bool) {
	slot := below(r.Hash, len(l.table))
	for range min(walk, len(l.table)) {
		m := &l.members[l.table[slot]]
		if l.takes(s, p, r, m) {
			return m.host, false
		}
		if slot++; slot == len(l.table) {
			slot = 0
		}
	}
	return scan(l.up, r.Hash, p, r)
}

// ringHash takes the host at the next point of the ring.
func (l *level) ringHash(s *Set, p *Policy, r *Request) (h *Host, full bool) {
	at := sort.Search(len(l.ring), func(i int) bool { return l.ring[i].hash >= r.Hash })
	for range min(walk, len(l.ring)) {
		if at == len(l.ring) {
			at = 0
		}
		m := &l.members[l.ring[at].index]
		if l.takes(s, p, r, m) {
			return m.host, false
		}
		at++
	}
	return scan(l.up, r.Hash, p, r)
}

// takes tells whether a member may have the request, and counts it in.
func (l *level) takes(s *Set, p *Policy, r *Request, m *member) bool {
	h := m.host
	if !l.panics && !h.up.Load() || r.tried(h) || p.Bound > 0 && h.Active() >= l.room(s, p, m) {
		return false
	}
	return h.counts.take(Requests, p.EndpointLimits.Requests)
}

// room is how many requests a member may have: its part of all there are, times
// the bound (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded
// loads", 2018; Envoy: hash_balance_factor). The request that asks is counted
// already.
func (l *level) room(s *Set, p *Policy, m *member) int64 {
	hi, part := bits.Mul64(uint64(p.Bound)*uint64(max(s.Active(), 1)), uint64(m.weight))
	if hi > 0 {
		return 1<<63 - 1
	}
	d := whole * l.upSum
	return int64((part + d - 1) / d)
}
