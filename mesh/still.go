package mesh

import (
	"fmt"
	"sync"
	"time"
)

const (
	// stillTime is how long connections may take to stop. While they do, nothing
	// moves; a request of HTTP/2 that waits for its guest takes longest.
	stillTime = connectTimeout + time.Second
	// shakeTime is how long handshakes may take to end before.
	shakeTime = handshakeTimeout + time.Second
)

// still is where connections go that are frozen, so that another process, or
// this one again, may go on with them.
type still struct {
	mu      sync.Mutex
	changed sync.Cond
	on      bool
	moving  int // goroutines that will either end or put what they have here
	shaking int // handshakes under way with peers that call
	flows   []*flow
	wake    map[int]func()
	next    int
}

func newStill() *still {
	s := &still{wake: map[int]func(){}}
	s.changed.L = &s.mu
	return s
}

// moves counts who has a connection, shakes who is about to.
func (s *still) moves(n int) { s.count(&s.moving, n) }

func (s *still) shakes(n int) { s.count(&s.shaking, n) }

func (s *still) count(what *int, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*what += n
	s.changed.Broadcast()
}

// put leaves a frozen connection. Whoever puts one that is a stream may be ahead
// of who freezes its link, as when dialling a guest was broken off, and streams
// whose handlers return while their link is not frozen are reset.
func (s *still) put(f *flow) {
	if f.over != nil && f.Kind == flowIn {
		f.over.Freeze()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flows = append(s.flows, f)
}

// frozen tells whether connections are to stop.
func (s *still) frozen() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.on
}

// onFreeze calls f when connections are to stop, unless undo is called before.
func (s *still) onFreeze(f func()) (undo func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.on {
		f()
		return func() {}
	}
	n := s.next
	s.next++
	s.wake[n] = f
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.wake, n)
	}
}

// begin has connections stop.
func (s *still) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.on = true
	for n, f := range s.wake {
		f()
		delete(s.wake, n)
	}
}

// end gives what was put and takes no more.
func (s *still) end() []*flow {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.on = false
	flows := s.flows
	s.flows = nil
	return flows
}

// settled waits until no handshake is under way.
func (s *still) settled() error {
	return s.await(shakeTime, func() error {
		if s.shaking > 0 {
			return fmt.Errorf("%d handshakes take longer than %v", s.shaking, shakeTime)
		}
		return nil
	})
}

// stopped waits until everybody has put down what he has.
func (s *still) stopped() error {
	return s.await(stillTime, func() error {
		if s.moving > 0 {
			return fmt.Errorf("%d connections have not stopped within %v", s.moving, stillTime)
		}
		return nil
	})
}

// await waits until ready returns nil, or returns its error in the end.
func (s *still) await(most time.Duration, ready func() error) error {
	over := false
	t := time.AfterFunc(most, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		over = true
		s.changed.Broadcast()
	})
	defer t.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if err := ready(); err == nil || over {
			return err
		}
		s.changed.Wait()
	}
}
