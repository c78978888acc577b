package mesh

import (
	"context"
	"errors"
	"net"
	"time"

	"hauberk.dev/mesh/handover"
)

// GiveOver gives this proxy's place to each process that connects to ln and asks
// for it, until one has it: then Run ends. One that fails before that changes
// nothing; what was held meanwhile goes on here. It blocks until ctx ends, Run
// has ended, or ln is closed.
//
// What is given are all listeners, the plan, the epoch in force, and every live
// connection with the secrets of its TLS, so that only this process's own user
// and root may ask. Private keys of certificates are not: the other makes its own.
func (p *Proxy) GiveOver(ctx context.Context, ln *net.UnixListener) error {
	p.mu.Lock()
	p.door = ln
	p.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.leaves, func() {
		ln.SetUnlinkOnClose(false) // it is another's
		cancel()
	})()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	for {
		c, err := ln.AcceptUnix()
		if err != nil && !errors.Is(err, net.ErrClosed) {
			p.pause("wait for another process", err)
			continue
		}
		if err != nil {
			return nil
		}
		began := time.Now()
		if err := handover.Give(ctx, c, p.holdAs, p.back, p.letGo); err != nil {
			p.log.Warn("not handed over; going on", "err", err, "took", time.Since(began))
			continue
		}
		p.log.Info("handed over", "took", time.Since(began))
		return nil
	}
}

// TakeOver takes the place of the proxy that gives it at path. Afterwards Run and
// GiveOver are to be called with the listeners it returns, those that nodes and the
// next process know. ctx bounds the connections that are taken, as that of Run
// does. If it fails the other goes on and this Proxy is of no use.
func (p *Proxy) TakeOver(ctx context.Context, path string) (nodes, door *net.UnixListener, err error) {
	p.mu.Lock()
	p.ctx = ctx
	p.mu.Unlock()
	if err := handover.Take(ctx, path, func(l *handover.Load) (func(), error) { return p.build(l, true) }); err != nil {
		return nil, nil, err
	}
	return p.nodes, p.door, nil
}
