package mesh

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
)

const maxEvents = 1024 // waiting to be sent

// events waits for the node to take them. It drops what has no room, and says
// how much it dropped.
type events struct {
	mu    sync.Mutex
	queue []api.Event
	kick  chan struct{}
	lost  uint64        // since the last event sent
	total atomic.Uint64 // lost ever
}

func newEvents() *events { return &events{kick: make(chan struct{}, 1)} }

func (e *events) add(ev api.Event) {
	ev.At = time.Now()
	e.mu.Lock()
	if len(e.queue) >= maxEvents {
		e.lost++
		e.total.Add(1)
	} else {
		e.queue = append(e.queue, ev)
	}
	e.mu.Unlock()
	e.wake()
}

func (e *events) wake() {
	select {
	case e.kick <- struct{}{}:
	default:
	}
}

func (e *events) first() (ev api.Event, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.queue) == 0 {
		return ev, false
	}
	ev = e.queue[0]
	ev.Lost, e.lost = e.lost, 0
	e.queue = e.queue[1:]
	return ev, true
}

// back puts an event that could not be sent before the others again.
func (e *events) back(ev api.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.lost += ev.Lost
	ev.Lost = 0
	e.queue = append([]api.Event{ev}, e.queue...)
}

// take takes all that waits, and how much was lost.
func (e *events) take() (queue []api.Event, lost uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	queue, lost = e.queue, e.lost
	e.queue, e.lost = nil, 0
	return queue, lost
}

// give puts what was taken before what has come since.
func (e *events) give(queue []api.Event, lost uint64) {
	e.mu.Lock()
	e.queue = append(queue, e.queue...)
	e.lost += lost
	e.mu.Unlock()
	e.wake()
}

// sendEvents sends one event after the other; the ack is the back pressure.
func (p *Proxy) sendEvents(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.events.kick:
		}
		for ctx.Err() == nil {
			ev, ok := p.events.first()
			if !ok {
				break
			}
			call, cancel := context.WithTimeout(ctx, 10*time.Second)
			_, _, err := p.ask(call, &api.Message{Kind: api.KindEvent, Event: &ev})
			cancel()
			if err != nil {
				p.events.back(ev)
				break // a new link wakes this up again
			}
		}
	}
}
