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
	"time"
)

// manyPods is how many idle containers the slope is taken over.
const manyPods = 50

// idles measures what idle containers cost the host: one of them, and many.
func idles(ctx context.Context, l *lab) (out []figure, err error) {
	for _, r := range underTest {
		if r.start == "cold" || r.start == "pool" {
			continue // they idle as a clone does, but for the pages a cold boot does not share
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
	before, free := census(), available()
	for _, n := range []int{1, manyPods} {
		for len(ids) < n {
			id, err := e.idle(ctx)
			if err != nil {
				return out, err
			}
			ids = append(ids, id)
		}
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
	cost := (free - available()) / manyPods
	out = append(out, single(e.name+": idle pods in 8 GiB", "", fmt.Sprintf("computed: %.1f MiB of MemAvailable each, over %d", mib(uint64(max(cost, 1))), manyPods),
		float64(8<<30)/float64(max(cost, 1))))
	return out, nil
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
