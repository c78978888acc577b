package alone

import (
	"os"
	"sync"
	"time"
)

// waiter is for one goroutine to wait with, until a moment that may be moved.
type waiter struct {
	mu       sync.Mutex
	deadline time.Time
	rung     bool  // and nobody has heard it
	bell     *bell // while somebody waits
}

// bell wakes who waits, and is used again by others. It may ring for nothing: who is
// woken looks whether there is what was waited for.
type bell struct {
	rings chan struct{}
	timer *time.Timer
	at    time.Time // of the timer; zero: it never ran
}

var bells = sync.Pool{New: func() any {
	b := &bell{rings: make(chan struct{}, 1)}
	b.timer = time.AfterFunc(time.Hour, b.ring)
	b.timer.Stop()
	return b
}}

func (b *bell) ring() {
	select {
	case b.rings <- struct{}{}:
	default:
	}
}

// by has the bell ring at a moment, or before: most waits end long before theirs, and
// the timer of one does for the next.
func (b *bell) by(at, now time.Time) {
	if b.at.After(now) && !b.at.After(at) {
		return
	}
	b.at = at
	b.timer.Reset(at.Sub(now))
}

func (w *waiter) signal() {
	w.mu.Lock()
	w.rung = true
	if w.bell != nil {
		w.bell.ring()
	}
	w.mu.Unlock()
}

func (w *waiter) until(at time.Time) {
	w.mu.Lock()
	w.deadline = at
	if w.bell != nil {
		w.bell.ring() // whoever waits looks at it
	}
	w.mu.Unlock()
}

// wait waits for a signal.
func (w *waiter) wait() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.rung {
		w.rung = false
		return nil
	}
	b := bells.Get().(*bell)
	select {
	case <-b.rings: // for another; once its timer is set for us it may be ours
	default:
	}
	if !w.deadline.IsZero() {
		now := time.Now()
		if !now.Before(w.deadline) {
			bells.Put(b)
			return os.ErrDeadlineExceeded
		}
		b.by(w.deadline, now)
	}
	w.bell = b
	w.mu.Unlock()
	<-b.rings
	w.mu.Lock()
	w.bell, w.rung = nil, false
	bells.Put(b)
	return nil // whoever asks again finds the moment past, or moved
}

// rings are those of streams for whom something has come. They are woken when all
// that has come was read: most answers are whole by then. They are for the goroutine
// that reads.
type rings []*stream

// add has who reads t woken. t is locked.
func (r *rings) add(t *stream) {
	if r == nil {
		t.read.signal()
		return
	}
	if !t.heard {
		t.heard = true
		*r = append(*r, t)
	}
}

func (r *rings) all() {
	for i, t := range *r {
		(*r)[i] = nil
		t.heard = false
		t.read.signal()
	}
	*r = (*r)[:0]
}
