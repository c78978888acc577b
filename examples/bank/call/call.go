// Package call makes calls over a few kept TCP connections, and makes them
// again when a connection broke. What is called must bear being called twice.
package call

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"
)

// Pool keeps connections to one address.
type Pool struct {
	address string
	idle    chan net.Conn
	slots   chan struct{}
}

// Connections that are open at most, and attempts at one call.
const (
	connections = 8
	attempts    = 8
)

// New returns a pool for an address. It opens nothing.
func New(address string) *Pool {
	return &Pool{address: address, idle: make(chan net.Conn, connections), slots: make(chan struct{}, connections)}
}

// Do runs exchange on a connection: one request, one reply. If that fails
// without a Refusal the connection is closed and exchange runs again on
// another, after a pause that grows, until the context ends.
func (p *Pool) Do(ctx context.Context, exchange func(net.Conn) error) error {
	pause := 20 * time.Millisecond
	var err error
	for range attempts {
		var refused *Refusal
		if err = p.once(ctx, exchange); err == nil || errors.As(err, &refused) {
			return err
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, time.Second)
		case <-ctx.Done():
			return fmt.Errorf("call %s: %w (last: %w)", p.address, ctx.Err(), err)
		}
	}
	return fmt.Errorf("call %s: %w", p.address, err)
}

// Refusal is an answer: the peer understood and said no. It is not tried again.
type Refusal struct{ Reason string }

func (r *Refusal) Error() string { return r.Reason }

func (p *Pool) once(ctx context.Context, exchange func(net.Conn) error) error {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	c, err := p.take(ctx)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(10 * time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	c.SetDeadline(deadline)
	err = exchange(c)
	var refused *Refusal
	if err != nil && !errors.As(err, &refused) {
		c.Close()
		return err
	}
	select {
	case p.idle <- c:
	default:
		c.Close()
	}
	return err
}

func (p *Pool) take(ctx context.Context) (net.Conn, error) {
	select {
	case c := <-p.idle:
		return c, nil
	default:
	}
	d := net.Dialer{Timeout: 5 * time.Second}
	return d.DialContext(ctx, "tcp", p.address)
}

// Close closes the connections that are not in use.
func (p *Pool) Close() {
	for {
		select {
		case c := <-p.idle:
			c.Close()
		default:
			return
		}
	}
}
