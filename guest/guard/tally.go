package guard

import "syscall"

// Sizes of bpf/src/event.h.
const (
	operations   = 128
	tallySize    = 40
	seriesKey    = 56
	seriesSize   = 48
	repeatedSize = 48
	opRepeated   = 120
	opUnheld     = 122
	eventVersion = 2
)

// appendTallies appends what became of the acts of each operation that there
// were any of.
func (g *Guard) appendTallies(buf []byte) []byte {
	at, n := len(buf), uint16(0)
	buf = append16(buf, 0)
	for op := range uint32(operations) {
		var key [4]byte
		var tally [tallySize]byte
		put32(key[:], op)
		if lookupMap(g.maps["tallies"].fd, key[:], tally[:]) != nil || allZero(tally[:8]) {
			continue
		}
		buf = append(append(buf, byte(op)), tally[:]...)
		n++
	}
	buf[at], buf[at+1] = byte(n), byte(n>>8)
	return buf
}

func allZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}

// repeats is where the telling of repetitions stands.
type repeats struct {
	due    bool
	resume bool // from the entry after key
	key    [seriesKey]byte
	round  uint64 // nanoseconds since boot when this round began
	before uint64 // and the one before it
}

// Recount asks that the next Drain tell how often records were repeated since
// it was last asked.
func (g *Guard) Recount() {
	if g.inShares {
		_ = g.again() // the host may have changed what paths lead to; a rule that is not held is told
	}
	if g.repeats.due {
		return
	}
	g.repeats.due, g.repeats.resume = true, false
	g.repeats.round = sinceBoot()
}

// Recounts says whether a Drain would tell of what no ring announces.
func (g *Guard) Recounts() bool { return g.repeats.due || len(g.refusals) > 0 || len(g.unheld) > 0 }

// tellUnheld tells of rules that do not hold in what came after the policy. It
// says whether emit may be asked again.
func (g *Guard) tellUnheld(emit func(record []byte) bool) bool {
	for ; len(g.unheld) > 0; g.unheld = g.unheld[1:] {
		a := g.unheld[0]
		b := make([]byte, 0, repeatedSize)
		b = append(b, eventVersion, opUnheld, 1, 0, 0, 0, 0, 0)
		b = append32(append32(b, a.rule), 0)
		b = append64(append64(append64(b, 0), 1), sinceBoot())
		if !emit(append64(b, uint64(a.errno))) {
			return false
		}
	}
	return true
}

// tellRepeats goes through the series once. One that did not grow since the
// round before was told in full then, and is forgotten. It says whether emit
// may be asked again.
func (g *Guard) tellRepeats(emit func(record []byte) bool) bool {
	r, fd := &g.repeats, g.maps["repeats"].fd
	for r.due {
		var next [seriesKey]byte
		var from []byte
		if r.resume {
			from = r.key[:]
		}
		if nextKey(fd, from, next[:]) != nil {
			r.due, r.before = false, r.round
			break
		}
		// What follows a forgotten entry cannot be asked for, so the one to be
		// told or forgotten is looked at before the place is kept.
		var value [seriesSize]byte
		if lookupMap(fd, next[:], value[:]) == nil {
			c := &cursor{b: value[:]}
			_, count, last := c.u64(), c.u64(), c.u64()
			if last < r.before {
				_ = deleteMap(fd, next[:])
				continue
			}
			if count > 1 && !emit(repeated(value[:])) {
				return false
			}
		}
		r.key, r.resume = next, true
	}
	return true
}

// repeated makes the record of a series as package guard reads it.
func repeated(series []byte) []byte {
	c := &cursor{b: series}
	sequence, count, last := c.u64(), c.u64(), c.u64()
	c.u64()
	c.u32()
	pid, rule, what := c.u32(), c.u32(), c.take(4)
	b := make([]byte, 0, repeatedSize)
	b = append(b, eventVersion, opRepeated, what[1], 0, 0, what[2], 0, 0)
	b = append32(append32(b, rule), pid)
	b = append64(append64(append64(b, sequence), count), last)
	return append64(b, uint64(what[0]))
}

// limit sets how many records of what was allowed a policy lets be sent in a
// second; 0 is no limit.
func (n *next) limit() error {
	var key [4]byte
	put32(key[:], n.g.place(n.slot))
	value := make([]byte, 24)
	put32(value, n.p.auditPerSecond)
	if err := updateMap(n.g.maps["limits"].fd, key[:], value); err != nil {
		return fail("limit", "the record of what was allowed", err)
	}
	return nil
}

// auditRate reads the section of a policy that limits the record of what was
// allowed.
func (p *policy) auditRate(data []byte) error {
	c := &cursor{b: data}
	p.auditPerSecond = c.u32()
	if c.bad || len(c.b) != 0 {
		return fail("read", "limits of guard policy", syscall.EBADMSG)
	}
	return nil
}
