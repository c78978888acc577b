package alone

import (
	"context"
	"sync"
	"time"
)

// carrying is a connection to an endpoint that carries many requests at once.
type carrying interface {
	takes() bool                 // more requests
	load() (open, most int)      // under way, and how many go well together
	drain()                      // lets those under way end, and takes no more
	unused(since time.Time) bool // nothing is under way, and nothing was since
}

// shared holds the connections to one endpoint that requests of any client share.
type shared[T carrying] struct {
	mu      sync.Mutex
	conns   []T
	dialing chan struct{} // closed when a connection that is being made is there, or not
	closed  bool
	epoch   int // of renew
}

// get takes a connection that has room, or has one made if there may be one more.
func (x *shared[T]) get(ctx context.Context, limit int, dial func() (T, error)) (c T, reused bool, err error) {
	for {
		x.mu.Lock()
		best, found, room := x.bestLocked()
		switch {
		case x.closed: // a request of the world before has picked an endpoint of this one
			x.mu.Unlock()
			return c, false, errNoServer
		case found && (room || len(x.conns) >= limit):
			x.mu.Unlock()
			return best, true, nil
		}
		if x.dialing == nil {
			break
		}
		wait := x.dialing
		x.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return c, false, ctx.Err()
		}
	}
	return x.oneMoreLocked(ctx, limit, dial)
}

// oneMoreLocked has a connection made, and gives up the lock.
func (x *shared[T]) oneMoreLocked(ctx context.Context, limit int, dial func() (T, error)) (c T, reused bool, err error) {
	done, epoch := make(chan struct{}), x.epoch
	x.dialing = done
	x.mu.Unlock()
	c, err = dial()
	x.mu.Lock()
	x.dialing = nil
	late, old := err == nil && x.closed, err == nil && x.epoch != epoch
	if err == nil && !old {
		x.conns = append(x.conns, c)
	}
	x.mu.Unlock()
	close(done)
	if late || old {
		c.drain()
	}
	if old && !late { // made by rules that have changed since
		return x.get(ctx, limit, dial)
	}
	return c, false, err
}

// bestLocked is the connection with the least to do, and whether one more goes well
// on it. Those that take no more are forgotten.
func (x *shared[T]) bestLocked() (best T, found, room bool) {
	least, keep := 0, x.conns[:0]
	for _, c := range x.conns {
		if !c.takes() {
			continue
		}
		keep = append(keep, c)
		open, most := c.load()
		if !found || open < least {
			best, found, least, room = c, true, open, open < most
		}
	}
	clear(x.conns[len(keep):])
	x.conns = keep
	return best, found, room
}

// sweep lets go of connections that nobody has used for long.
func (x *shared[T]) sweep(before time.Time) {
	x.mu.Lock()
	x.bestLocked()
	var old []T
	for _, c := range x.conns {
		if c.unused(before) {
			old = append(old, c)
		}
	}
	x.mu.Unlock()
	for _, c := range old {
		c.drain()
	}
}

// renew has the next request make a new connection.
func (x *shared[T]) renew() {
	x.mu.Lock()
	all := x.conns
	x.conns = nil
	x.epoch++
	x.mu.Unlock()
	for _, c := range all {
		c.drain()
	}
}

// shut lets the requests under way end, and takes no others.
func (x *shared[T]) shut() {
	x.mu.Lock()
	x.closed = true
	x.mu.Unlock()
	x.renew()
}
