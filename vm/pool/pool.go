// Package pool keeps machines ahead of demand: made, greeted and paused, so that
// who needs one has it at once.
//
// It knows neither monitor nor guest: how a spare machine is made is told to
// it. It bounds how many there are, of how many sizes, and makes them when
// nobody is waiting for anything.
package pool

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"hauberk.dev/vm"
)

const (
	// quiet is how long nobody must have asked before a spare is made, and
	// patience how long at most that is waited for.
	quiet    = 300 * time.Millisecond
	patience = 5 * time.Second
	// After a failure the pool rests, longer each time.
	firstRest = time.Second
	maxRest   = 2 * time.Minute

	endTime = 20 * time.Second
)

// Config is how a pool is set up.
type Config struct {
	// Make makes a spare machine: restored, greeted, paused.
	Make func(context.Context, vm.TemplateSpec) (*vm.Machine, error)
	// PerSize machines are kept of each of the Sizes that were asked for last.
	PerSize, Sizes int
	// Failed is told what went wrong; the pool goes on.
	Failed func(error)
}

// Pool is machines that wait. It is safe for concurrent use.
type Pool struct {
	config Config
	wake   chan struct{}

	mu      sync.Mutex
	shelves []*shelf // the least recently asked for first
	asked   time.Time
	closed  bool
}

// shelf is the spares of one kind.
type shelf struct {
	spec  vm.TemplateSpec
	ready []*vm.Machine
	// each takes about as much of the host's memory as the one made last.
	each uint64
}

// New makes an empty pool. Run fills it.
func New(c Config) *Pool {
	if c.Failed == nil {
		c.Failed = func(error) {}
	}
	return &Pool{config: c, wake: make(chan struct{}, 1)}
}

// Take gives a spare machine, the caller's from then on, or nil if none is
// ready. Either way there will be more of its kind.
func (p *Pool) Take(spec vm.TemplateSpec) *vm.Machine {
	p.mu.Lock()
	s, gone := p.askLocked(spec)
	var m *vm.Machine
	for m == nil && len(s.ready) > 0 {
		m = s.ready[0]
		s.ready = s.ready[1:]
		if m.Err() != nil { // it died while it waited
			gone, m = append(gone, m), nil
		}
	}
	p.mu.Unlock()
	p.end(gone)
	p.stir()
	return m
}

// Want makes the pool keep machines of a kind.
func (p *Pool) Want(spec vm.TemplateSpec) {
	p.mu.Lock()
	_, gone := p.askLocked(spec)
	p.mu.Unlock()
	p.end(gone)
	p.stir()
}

// Ready is how many machines of a kind wait.
func (p *Pool) Ready(spec vm.TemplateSpec) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := p.findLocked(spec); i >= 0 {
		return len(p.shelves[i].ready)
	}
	return 0
}

// Waiting is how many machines wait, and about how much of the host's memory,
// in bytes, is theirs alone.
func (p *Pool) Waiting() (machines int, private uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.shelves {
		machines += len(s.ready)
		private += uint64(len(s.ready)) * s.each
	}
	return machines, private
}

func (p *Pool) findLocked(spec vm.TemplateSpec) int {
	return slices.IndexFunc(p.shelves, func(s *shelf) bool { return s.spec == spec })
}

// askLocked notes that a kind is in demand, and gives its shelf and the
// machines of kinds that are one too many.
func (p *Pool) askLocked(spec vm.TemplateSpec) (s *shelf, gone []*vm.Machine) {
	p.asked = time.Now()
	if i := p.findLocked(spec); i >= 0 {
		s = p.shelves[i]
		p.shelves = append(slices.Delete(p.shelves, i, i+1), s)
		return s, nil
	}
	s = &shelf{spec: spec}
	p.shelves = append(p.shelves, s)
	for len(p.shelves) > max(p.config.Sizes, 1) {
		gone = append(gone, p.shelves[0].ready...)
		p.shelves = p.shelves[1:]
	}
	return s, gone
}

func (p *Pool) stir() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Run fills the pool until ctx ends, and ends what is in it then.
func (p *Pool) Run(ctx context.Context) error {
	rest := firstRest
	for ctx.Err() == nil {
		spec, wanted := p.wanted()
		if !wanted {
			select {
			case <-p.wake:
			case <-ctx.Done():
			}
			continue
		}
		if p.awaitQuiet(ctx) != nil {
			break
		}
		m, err := p.config.Make(ctx, spec)
		if err != nil {
			if ctx.Err() == nil {
				p.config.Failed(err)
			}
			sleep(ctx, rest)
			rest = min(2*rest, maxRest)
			continue
		}
		rest = firstRest
		p.put(spec, m)
	}
	return p.close()
}

// wanted is the kind asked for last of which some are missing.
func (p *Pool) wanted() (vm.TemplateSpec, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range slices.Backward(p.shelves) {
		if len(s.ready) < p.config.PerSize {
			return s.spec, true
		}
	}
	return vm.TemplateSpec{}, false
}

// awaitQuiet waits until nobody has asked for a while: who asks is starting
// something, and needs the processors more.
func (p *Pool) awaitQuiet(ctx context.Context) error {
	for until := time.Now().Add(patience); time.Now().Before(until); {
		p.mu.Lock()
		left := quiet - time.Since(p.asked)
		p.mu.Unlock()
		if left <= 0 {
			break
		}
		sleep(ctx, left)
		if ctx.Err() != nil {
			break
		}
	}
	return ctx.Err()
}

// put puts a machine on its shelf, if there is room still.
func (p *Pool) put(spec vm.TemplateSpec, m *vm.Machine) {
	used, err := m.Memory() // it stands still: this does not change
	if err != nil {
		p.config.Failed(err)
	}
	p.mu.Lock()
	i := p.findLocked(spec)
	if i < 0 || p.closed || len(p.shelves[i].ready) >= p.config.PerSize {
		p.mu.Unlock()
		p.end([]*vm.Machine{m})
		return
	}
	p.shelves[i].ready = append(p.shelves[i].ready, m)
	p.shelves[i].each = used.Private
	p.mu.Unlock()
}

// close empties the pool for good.
func (p *Pool) close() error {
	p.mu.Lock()
	p.closed = true
	var gone []*vm.Machine
	for _, s := range p.shelves {
		gone = append(gone, s.ready...)
	}
	p.shelves = nil
	p.mu.Unlock()
	return kill(gone)
}

func (p *Pool) end(gone []*vm.Machine) {
	if err := kill(gone); err != nil {
		p.config.Failed(err)
	}
}

func kill(gone []*vm.Machine) error {
	ctx, cancel := context.WithTimeout(context.Background(), endTime)
	defer cancel()
	var errs []error
	for _, m := range gone {
		errs = append(errs, m.Kill(ctx))
	}
	return errors.Join(errs...)
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// Prepare brings a guest to where a spare waits, and leaves nothing in it.
type Prepare func(context.Context, *vm.Machine, *vm.Channel) error

// Ready greets a guest, so that what answers is there and its code translated,
// prepares it if it is told how, and lets it wait.
func Ready(ctx context.Context, m *vm.Machine, prepare Prepare) error {
	c, _, err := m.Channel(ctx, nil)
	if err != nil {
		return err
	}
	if err = c.Ping(ctx); err == nil && prepare != nil {
		err = prepare(ctx, m, c)
	}
	if err != nil {
		return errors.Join(err, c.Close())
	}
	return m.Park(ctx, c)
}
