package alone

import "sync"

// maxHands bounds the goroutines that wait for something to do.
const maxHands = 256

// hands serve the streams of HTTP/2. One that has served waits for the next: its
// stack has grown already, which for a new one takes longer than many a request.
type hands struct {
	mu     sync.Mutex
	idle   []*hand // the one used last is at the end
	least  int     // that were idle since the last sweep
	closed bool
}

// hand is a goroutine.
type hand struct{ next chan served }

// served is what a hand does.
type served interface{ serveStream() }

// serve has something done.
func (h *hands) serve(s served) {
	h.mu.Lock()
	n := len(h.idle) - 1
	if n < 0 {
		h.mu.Unlock()
		go h.work(&hand{make(chan served, 1)}, s)
		return
	}
	one := h.idle[n]
	h.idle[n] = nil
	h.idle = h.idle[:n]
	h.least = min(h.least, n)
	h.mu.Unlock()
	one.next <- s // there is room: it waits
}

func (h *hands) work(one *hand, s served) {
	for more := true; more; s, more = <-one.next {
		s.serveStream()
		if !h.rest(one) {
			return
		}
	}
}

// rest puts a hand where the next to serve finds it.
func (h *hands) rest(one *hand) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || len(h.idle) == maxHands {
		return false
	}
	h.idle = append(h.idle, one)
	return true
}

// sweep lets go of those that nobody has needed since the last.
func (h *hands) sweep() {
	h.mu.Lock()
	old := append([]*hand(nil), h.idle[:h.least]...)
	h.idle = append(h.idle[:0], h.idle[h.least:]...)
	clear(h.idle[len(h.idle):cap(h.idle)])
	h.least = len(h.idle)
	h.mu.Unlock()
	for _, one := range old {
		close(one.next)
	}
}

// close lets go of all, and of those that serve when they have.
func (h *hands) close() {
	h.mu.Lock()
	h.closed = true
	h.least = len(h.idle)
	h.mu.Unlock()
	h.sweep()
}
