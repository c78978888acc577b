package alone

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A deadline that is moved back or forth is the one that counts, whatever the bell
// was used for before.
func TestWaiterDeadline(t *testing.T) {
	far := &waiter{}
	far.until(time.Now().Add(time.Hour))
	go far.signal()
	if err := far.wait(); err != nil { // its bell goes to the next
		t.Fatal(err)
	}
	w := &waiter{}
	wait := func() (err error) {
		for err == nil {
			err = w.wait()
		}
		return err
	}
	w.until(time.Now().Add(20 * time.Millisecond))
	if err := wait(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	w.until(time.Now().Add(time.Hour))
	done := make(chan error)
	go func() { done <- wait() }()
	w.until(time.Unix(1, 0)) // while it waits, or before
	if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
}

// No signal is lost between who looks and who waits.
func TestWaiterSignals(t *testing.T) {
	for range 4 {
		w, made := &waiter{}, atomic.Int64{}
		const n = 5000
		go func() {
			for range n {
				made.Add(1)
				w.signal()
			}
		}()
		w.until(time.Now().Add(time.Minute))
		for made.Load() < n {
			if err := w.wait(); err != nil {
				t.Fatal(err, made.Load())
			}
		}
	}
}

// A deadline that comes while it is being waited for, or that an older timer stands
// for, is not missed.
func TestWaiterShort(t *testing.T) {
	const waiters, rounds = 4, 2000
	var done atomic.Int64
	for range waiters {
		go func() {
			for n := range rounds {
				w := &waiter{}
				w.until(time.Now().Add(time.Duration(1+n%40) * time.Microsecond))
				for w.wait() == nil {
				}
				done.Add(1)
			}
		}()
	}
	for n := int64(0); n < waiters*rounds; n = done.Load() {
		waitFor(t, "end of a wait", func() bool { return done.Load() > n })
	}
}

type serves func()

func (f serves) serveStream() { f() }

// Hands that nobody needs go, and none is left behind.
func TestHands(t *testing.T) {
	var h hands
	var ran sync.WaitGroup
	serve := func(n int) {
		gate := make(chan struct{})
		for range n {
			ran.Add(1)
			h.serve(serves(func() { defer ran.Done(); <-gate }))
		}
		close(gate)
		ran.Wait()
	}
	resting := func(want int) {
		t.Helper()
		n := -1
		for deadline := time.Now().Add(time.Minute); n != want && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			h.mu.Lock()
			n = len(h.idle)
			h.mu.Unlock()
		}
		if n != want {
			t.Fatalf("%d rest, want %d", n, want)
		}
	}
	serve(20)
	resting(20)
	h.sweep() // all were needed
	resting(20)
	h.sweep()
	resting(0)
	serve(20)
	resting(20)
	h.sweep()
	serve(5)
	resting(20)
	h.sweep()
	resting(5)
	h.close()
	resting(0)
	serve(3)
	resting(0)
}
