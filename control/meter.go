package control

import (
	"slices"
	"sync"
	"time"
)

const (
	// tick is how finely denials are counted, meterSpan how long they are
	// remembered.
	tick      = time.Second
	meterSpan = 10 * time.Minute
)

// meter counts the denials of every instance over the last minutes. What
// cannot be counted because too many instances are denied things is not.
type meter struct {
	mu     sync.Mutex
	counts map[string][]tally
}

// tally is the count of a tick, from its first denial on.
type tally struct {
	at time.Time
	n  int
}

func (m *meter) count(instance string, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.counts == nil {
		m.counts = map[string][]tally{}
	}
	list := m.counts[instance]
	if list == nil && len(m.counts) >= maxQuiet {
		m.pruneLocked(now)
		if len(m.counts) >= maxQuiet {
			return
		}
	}
	if n := len(list); n > 0 && now.Sub(list[n-1].at) < tick {
		list[n-1].n++
		return
	}
	old := slices.IndexFunc(list, func(t tally) bool { return now.Sub(t.at) < meterSpan })
	if old < 0 {
		old = len(list)
	}
	m.counts[instance] = append(list[old:], tally{now, 1})
}

func (m *meter) pruneLocked(now time.Time) {
	for name, list := range m.counts {
		if n := len(list); n == 0 || now.Sub(list[n-1].at) >= meterSpan {
			delete(m.counts, name)
		}
	}
}

// seen counts the denials of instances from one moment to another.
func (m *meter) seen(instances []string, from, to time.Time) (n float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, name := range instances {
		for _, t := range m.counts[name] {
			if !t.at.Before(from) && !t.at.After(to) {
				n += float64(t.n)
			}
		}
	}
	return n
}

// rate is how many denials a minute and instance there were lately.
func (m *meter) rate(instances []string, now time.Time) float64 {
	if len(instances) == 0 {
		return 0
	}
	return m.seen(instances, now.Add(-meterSpan), now) / meterSpan.Minutes() / float64(len(instances))
}
