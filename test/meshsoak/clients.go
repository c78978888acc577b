package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/test/meshload"
)

// journal is what was done to the clients, and when.
type journal struct {
	mu   sync.Mutex
	acts []*act
}

// act is something that explains errors of some clients.
type act struct {
	what     string
	from, to time.Time // to is zero while it lasts
	hits     func(c *client) bool
	errors   int
}

func (j *journal) begin(what string, hits func(*client) bool) *act {
	a := &act{what: what, from: time.Now(), hits: hits}
	j.mu.Lock()
	j.acts = append(j.acts, a)
	j.mu.Unlock()
	return a
}

func (j *journal) end(a *act) {
	j.mu.Lock()
	a.to = time.Now()
	j.mu.Unlock()
}

// explain finds what was done to a client at any time since from, where from is
// the last time all was well with its connection.
func (j *journal) explain(c *client, from time.Time) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, a := range slices.Backward(j.acts) {
		if a.hits(c) && (a.to.IsZero() || a.to.After(from)) {
			a.errors++
			return true
		}
	}
	return false
}

// client asks one service in one protocol, over and over.
type client struct {
	caller, service, protocol string
	dial                      func() (net.Conn, error)

	good, aborted, explained, refused int
	unexplained                       []string
}

func (c *client) name() string { return c.caller + " -> " + c.service + " " + c.protocol }

type clients struct {
	all      []*client
	journal  *journal
	world    *world
	interval time.Duration
	seed     uint64
	next     atomic.Uint64
}

func (w *world) clients(j *journal, o options) *clients {
	cs := &clients{journal: j, world: w, seed: o.seed}
	for _, caller := range []string{"web", "guest"} {
		for _, service := range []string{"shop", "still"} {
			for _, protocol := range meshload.Protocols {
				from, to := w.boxes[caller+"-1"], fmt.Sprintf("%s:%d", w.service(service).Address, ports[protocol].Port)
				cs.all = append(cs.all, &client{caller: caller, service: service, protocol: protocol, dial: func() (net.Conn, error) { return from.dial(to) }})
			}
		}
	}
	for _, protocol := range meshload.Protocols {
		if door, ok := w.alone.doors[protocol]; ok {
			cs.all = append(cs.all, &client{caller: "anyone", service: "alone", protocol: protocol, dial: func() (net.Conn, error) { return net.Dial("tcp", door) }})
		}
	}
	cs.interval = time.Duration(float64(time.Second) * float64(len(cs.all)) / o.rate)
	return cs
}

func (cs *clients) run(ctx context.Context) {
	var wg sync.WaitGroup
	for i, c := range cs.all {
		wg.Go(func() { cs.one(ctx, c, rand.New(rand.NewPCG(cs.seed, uint64(i)+2))) })
	}
	wg.Wait()
}

var sizes = []int{0, 1, 100, 1000, 4096, 16 << 10, 60 << 10}

func (cs *clients) one(ctx context.Context, c *client, random *rand.Rand) {
	l := meshload.New(c.protocol, c.dial)
	defer l.Close()
	well := time.Now() // when this connection was last seen to be good
	for {
		pause := time.NewTimer(time.Duration(random.ExpFloat64() * float64(cs.interval)))
		select {
		case <-ctx.Done():
			pause.Stop()
			return
		case <-pause.C:
		}
		id, size := cs.next.Add(1), sizes[random.IntN(len(sizes))]
		switch random.IntN(50) {
		case 0:
			l.Abort(id, size, uint8(random.IntN(256)))
			c.aborted++
			continue
		case 1:
			l.Close() // the next begins a connection
			well = time.Now()
		}
		err := l.Ask(id, size)
		var no *meshload.Refused
		switch {
		case err == nil:
			c.good++
			well = time.Now()
		case !cs.journal.explain(c, well):
			c.unexplained = append(c.unexplained, fmt.Sprintf("%s request %d of %d bytes: %v", time.Now().UTC().Format("15:04:05.000"), id, size, err))
			say("UNEXPLAINED: %s: %v", c.name(), err)
		default:
			c.explained++
			if errors.As(err, &no) {
				c.refused++
			} else {
				well = time.Now() // its connection is gone
			}
		}
	}
}

// report prints what clients saw and says whether all of it is explained.
func (cs *clients) report() bool {
	fmt.Printf("\n%-26s %9s %8s %10s %9s %12s\n", "client", "answered", "aborted", "explained", "refused", "unexplained")
	var good, bad, aborted int
	for _, c := range cs.all {
		fmt.Printf("%-26s %9d %8d %10d %9d %12d\n", c.name(), c.good, c.aborted, c.explained, c.refused, len(c.unexplained))
		good, bad, aborted = good+c.good, bad+len(c.unexplained), aborted+c.aborted
		for _, text := range c.unexplained[:min(len(c.unexplained), 5)] {
			fmt.Printf("    %s\n", text)
		}
	}
	fmt.Printf("\n%-40s %6s %14s\n", "what was done", "times", "errors of it")
	times, errs := map[string]int{}, map[string]int{}
	for _, a := range cs.journal.acts {
		times[a.what]++
		errs[a.what] += a.errors
	}
	var names []string
	for what := range times {
		names = append(names, what)
	}
	slices.Sort(names)
	for _, what := range names {
		fmt.Printf("%-40s %6d %14d\n", what, times[what], errs[what])
	}
	var kinds []string
	cs.world.events.Range(func(k, v any) bool {
		kinds = append(kinds, fmt.Sprintf("%v %d", k, v.(*atomic.Int64).Load()))
		return true
	})
	slices.Sort(kinds)
	twice := cs.world.ledger.Twice.Load()
	fmt.Printf("\nanswered %d, aborted on purpose %d, unexplained errors %d, served twice %d, certificates %d\nevents: %s\n",
		good, aborted, bad, twice, cs.world.serial.Load(), strings.Join(kinds, ", "))
	return good > 0 && bad == 0 && twice == 0
}
