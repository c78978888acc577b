package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"hauberk.dev/bench/stages"
	"hauberk.dev/internal/unixsock"
	"hauberk.dev/mesh"
)

const (
	// profiled is the first argument of this program when it is the proxy itself,
	// whose time is taken down; hauberk-mesh writes no profile.
	profiled = "profiled"
	// costly is how long a profile is taken: it has a sample every 10 ms of
	// processor time.
	costly = 5 * time.Second
)

// beMesh is hauberk-mesh -link, and writes a profile when it ends.
func beMesh(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("profiled takes a socket and where the profile goes")
	}
	ln, err := unixsock.Listen(args[0])
	if err != nil {
		return err
	}
	p := mesh.New(mesh.Options{Log: slog.New(slog.DiscardHandler)})
	return stages.Profile(ctx, args[1], func(ctx context.Context) error { return p.Run(ctx, ln) })
}

// costs says where the time of a hop goes: calls of 1 KiB through both sides of the
// mesh, in one process, as many as go through.
func costs(ctx context.Context, l *lab) (_ []figure, err error) {
	ca, err := newAuthority()
	if err != nil {
		return nil, err
	}
	w, err := openWorld(ctx, l, ca, true)
	if err != nil {
		return nil, err
	}
	closed := false
	defer func() {
		if !closed {
			err = errors.Join(err, w.Close())
		}
	}()
	p := &path{what: "hauberk-mesh, both sides", dial: w.meshed, pid: w.proxy.Process.Pid}
	defer p.close()
	if err := p.open(); err != nil {
		return nil, err
	}
	if err := p.flood(ctx, costly); err != nil {
		return nil, err
	}
	closed = true
	if err := w.Close(); err != nil { // which writes the profile
		return nil, err
	}
	shares, err := stages.Read(w.profile)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, w.said)
	}
	return divided(p, shares), nil
}

// divided makes figures of what a call costs.
func divided(p *path, shares []stages.Share) []figure {
	sum, samples := stages.Sum(shares)
	whole := p.processor("both sides")
	whole.Note = fmt.Sprintf("%d calls, %d samples", len(p.took), samples)
	out := []figure{whole}
	for _, s := range shares {
		part := float64(s.Time) / float64(max(sum, 1))
		out = append(out, single("of it "+s.Stage, "us", fmt.Sprintf("%.1f%%, %d samples", 100*part, s.Samples), part*whole.P50))
	}
	return out
}

// flood calls on each connection as soon as it has its answer.
func (p *path) flood(ctx context.Context, length time.Duration) error {
	before, err := p.spent()
	if err != nil {
		return err
	}
	end := time.Now().Add(length)
	took, faults := make([][]float64, len(p.conns)), make([]error, len(p.conns))
	var wg sync.WaitGroup
	for i, c := range p.conns {
		wg.Go(func() {
			b := make([]byte, kib)
			for time.Now().Before(end) && ctx.Err() == nil {
				d, err := p.call(c, b)
				if err != nil {
					faults[i] = err
					return
				}
				took[i] = append(took[i], us(d))
			}
		})
	}
	wg.Wait()
	for _, t := range took {
		p.took = append(p.took, t...)
	}
	after, err := p.spent()
	p.ticks += after - before
	return errors.Join(append(faults, err, context.Cause(ctx))...)
}
