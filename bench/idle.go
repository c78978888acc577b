package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// plenty is the memory that idle containers are to take, reserve what must be
	// left of the host's for that to be tried, and atATime how many start at once.
	plenty  = 8 << 30
	reserve = 4 << 30
	atATime = 4
	// tooMany is how many are not tried: to start and to end them takes too long.
	tooMany = 1000
)

// idles measures what idle containers cost the host: one of them, and many.
func idles(ctx context.Context, l *lab) (out []figure, err error) {
	for _, r := range underTest {
		if r.start == "cold" {
			continue // it idles as a clone does, but for the pages that it does not share
		}
		f, err := idle(ctx, l, r)
		out = append(out, f...)
		if err != nil {
			return out, err
		}
	}
	return out, nil
}

func idle(ctx context.Context, l *lab, r runtimeUnderTest) (out []figure, err error) {
	e, err := openEngine(ctx, l, r)
	if err != nil {
		return nil, err
	}
	var ids []string
	defer func() { err = errors.Join(err, e.end(ctx, ids...), e.close(ctx)) }()
	if _, err := e.word(ctx, e.id()); err != nil { // templates and caches
		return nil, err
	}
	e.rest(ctx) // with it one machine waits, before as after
	before, free := census(), available()
	for _, n := range []int{1, l.pods} {
		for len(ids) < n {
			id, err := e.idle(ctx)
			if err != nil {
				return out, err
			}
			ids = append(ids, id)
			e.rest(ctx)
		}
		l.say("idle: %s, %d of them", e.name, n)
		if err := wait(ctx, 5*time.Second); err != nil { // until they are idle
			return out, err
		}
		u := census().since(before)
		what := fmt.Sprintf("%s, %d idle: ", e.name, n)
		each := func(b uint64) float64 { return mib(b) / float64(n) }
		out = append(out,
			single(what+"private memory of each", "MiB", "", each(u.private)),
			single(what+"share of shared memory of each", "MiB", "", each(u.shared)),
			single(what+"processes of each", "", "its own and all helpers", float64(u.processes)/float64(n)))
	}
	f, more, err := e.dense(ctx, l, free, len(ids))
	ids = append(ids, more...)
	return append(out, f), err
}

// dense starts idle containers until they take what is plenty, or time is over:
// then it is computed of those there are.
func (e *engine) dense(ctx context.Context, l *lab, free int64, n int) (f figure, ids []string, err error) {
	what := e.name + ": idle pods in 8 GiB"
	compute := func(note string) figure {
		cost := max((free-available())/int64(n+len(ids)), 1)
		return single(what, "", fmt.Sprintf("computed%s: %.1f MiB of MemAvailable each, over %d", note, mib(uint64(cost)), n+len(ids)), float64(plenty)/float64(cost))
	}
	switch {
	case e.start == "pool":
		return compute(", as a clone's"), nil, nil
	case l.grow <= 0:
		return compute(""), nil, nil
	case compute("").P50 > tooMany:
		return compute(", for so many take too long to try"), nil, nil
	case free < plenty+reserve:
		return compute(", for the host has too little memory to try"), nil, nil
	}
	began := time.Now()
	for free-available() < plenty {
		if time.Since(began) > l.grow {
			return compute(fmt.Sprintf(" after %v", l.grow)), ids, nil
		}
		some, err := e.several(ctx, atATime)
		if ids = append(ids, some...); err != nil {
			return compute(" when one did not start"), ids, err
		}
		if len(ids)%100 < atATime {
			l.say("idle: %s, %d take %.1f GiB", e.name, n+len(ids), float64(free-available())/(1<<30))
		}
	}
	return single(what, "", fmt.Sprintf("measured: all run, %d take %.2f GiB of MemAvailable", n+len(ids), float64(free-available())/(1<<30)),
		float64(n+len(ids))*float64(plenty)/float64(free-available())), ids, nil
}

// several starts idle containers at once.
func (e *engine) several(ctx context.Context, n int) (ids []string, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range n {
		id := e.id()
		wg.Go(func() {
			_, one := e.idleAs(ctx, id)
			mu.Lock()
			defer mu.Unlock()
			ids, err = append(ids, id), errors.Join(err, one)
		})
	}
	wg.Wait()
	return ids, err
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// use is what processes take of the host.
type use struct {
	private, shared uint64 // bytes; shared is their proportional part
	processes       int
}

// people are processes by number and start.
type people map[string]use

// census looks at every process there is. One that ends meanwhile is left out.
func census() people {
	all := people{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return all
	}
	for _, entry := range entries {
		if _, err := strconv.Atoi(entry.Name()); err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + entry.Name() + "/stat")
		f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if err != nil || len(f) < 20 {
			continue
		}
		if u, ok := rollup("/proc/" + entry.Name() + "/smaps_rollup"); ok {
			all[entry.Name()+" "+f[19]] = u
		}
	}
	return all
}

// rollup sums up one process; a kernel's has no memory.
func rollup(path string) (u use, ok bool) {
	raw, err := os.ReadFile(path)
	if err != nil || len(raw) == 0 {
		return u, false
	}
	var pss uint64
	for sc := bufio.NewScanner(bytes.NewReader(raw)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) != 3 {
			continue
		}
		kb, _ := strconv.ParseUint(f[1], 10, 64) // the kernel writes numbers
		switch f[0] {
		case "Private_Clean:", "Private_Dirty:":
			u.private += kb << 10
		case "Pss:":
			pss = kb << 10
		}
	}
	u.processes, u.shared = 1, pss-min(pss, u.private)
	return u, pss > 0
}

// since sums up who came after an earlier census.
func (p people) since(before people) (sum use) {
	for who, u := range p {
		if _, there := before[who]; !there {
			sum.private, sum.shared, sum.processes = sum.private+u.private, sum.shared+u.shared, sum.processes+u.processes
		}
	}
	return sum
}

// available is what the kernel says could still be used, in bytes.
func available() int64 {
	kb, _ := strconv.ParseInt(strings.TrimSuffix(entry("/proc/meminfo", "MemAvailable"), " kB"), 10, 64)
	return kb << 10
}
