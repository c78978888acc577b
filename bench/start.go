package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// abreast is how many containers start at once.
const abreast = 16

// starts times, for each runtime in turn, what it takes from calling ctr until
// a container's first word: one after the other, and many at once.
func starts(ctx context.Context, l *lab) (out []figure, err error) {
	samples := make([][]float64, len(underTest))
	engines, err := l.engines(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closeAll(ctx, engines)) }()
	for _, e := range engines { // what is made at first need is made now
		if _, err := e.word(ctx, e.id()); err != nil {
			return nil, err
		}
	}
	engines[0].rest(ctx) // the pool's
	for i := range l.n {
		l.say("start: round %d of %d", i+1, l.n)
		for k, e := range engines {
			took, err := e.word(ctx, e.id())
			if err != nil {
				return nil, err
			}
			samples[k] = append(samples[k], ms(took))
			e.rest(ctx) // now, so that filling it disturbs nobody
		}
	}
	base := spread("runc", "ms", "", samples[3])
	for k, e := range engines {
		f := spread(e.name+", first word", "ms", "", samples[k])
		f.Note = f.ratio(base)
		out = append(out, f)
	}
	var errs []error
	for _, e := range engines {
		l.say("start: %s, %d at once", e.name, abreast)
		f, err := e.together(ctx)
		if errs = append(errs, err); err == nil {
			out = append(out, f)
		}
	}
	return out, errors.Join(errs...)
}

// rest gives a pool the time to fill again, as it would have between the pods
// of a real node.
func (e *engine) rest(ctx context.Context) {
	if e.start != "pool" {
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(2 * time.Second):
	}
}

// together starts containers all at once and times the first word of each.
func (e *engine) together(ctx context.Context) (figure, error) {
	if e.start == "pool" {
		e.rest(ctx)
	}
	var mu sync.Mutex
	var samples []float64
	var errs []error
	var wg sync.WaitGroup
	began := time.Now()
	for range abreast {
		id := e.id()
		wg.Go(func() {
			took, err := e.word(ctx, id)
			mu.Lock()
			defer mu.Unlock()
			samples, errs = append(samples, ms(took)), append(errs, err)
		})
	}
	wg.Wait()
	note := fmt.Sprintf("all ended after %.1f s", time.Since(began).Seconds())
	return spread(fmt.Sprintf("%s, %d at once, first word", e.name, abreast), "ms", note, samples), errors.Join(errs...)
}

// engines starts a containerd for every runtime.
func (l *lab) engines(ctx context.Context) (all []*engine, err error) {
	for _, r := range underTest {
		e, err := openEngine(ctx, l, r)
		if err != nil {
			return nil, errors.Join(err, closeAll(ctx, all))
		}
		all = append(all, e)
	}
	return all, nil
}

func closeAll(ctx context.Context, engines []*engine) error {
	var errs []error
	for _, e := range engines {
		errs = append(errs, e.close(ctx))
	}
	return errors.Join(errs...)
}
