// Command proxy measures hauberk-mesh alone beside nginx, HAProxy and Traefik, in
// HTTP/1 and HTTP/2, gRPC, TLS of one side and of both, TCP, bolt and Dubbo: the
// same requests, in the same run, each proxy by itself on one processor and then
// on two, and what loads and answers on others where the machine has more. It
// prints what each adds to a request that goes straight, and the processor time it
// takes, as ratios to those of nginx, and whether what is asked of hauberk-mesh is
// met. It needs no root; the programs are nginx, haproxy and taskset of
// Debian, bin/hauberk-mesh, and bin/traefik if scripts/traefik could build it.
//
// What cannot be measured is named in the table, the rest goes on, and it exits with
// 1. It says how long it will take, and stops after 22 minutes with what it has.
//
// With -cost it takes profiles of hauberk-mesh instead (docs/cost.md).
//
//	go run ./bench/proxy [-short] [-cost] [-cores 1,2] [-seconds 0.5] [-turns 3] [-only http,https,mtls,tcp,h2,grpc,bolt,dubbo] [-o table|json]
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// moved says to this process that it is on its processors, and on how many the
// proxies are.
const moved = "HAUBERK_BENCH_CORES"

const (
	most     = 22 * time.Minute // for all
	farewell = time.Minute      // to end the proxies and report, after that
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == profiled {
		if err := beProxy(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	seconds := flag.Float64("seconds", 0.5, "of each turn")
	turns := flag.Int("turns", 3, "of each way, one after the other")
	short := flag.Bool("short", false, "one turn of 0.2 s, and 1,000 idle connections in place of 10,000")
	cores := flag.String("cores", "1,2", "processors of a proxy, one run for each")
	only := flag.String("only", "http,https,mtls,tcp,h2,grpc,bolt,dubbo", "what is spoken")
	mesh := flag.String("mesh", "bin/hauberk-mesh", "the program")
	traefik := flag.String("traefik", "bin/traefik", "the program; may be absent")
	cost := flag.Bool("cost", false, "say where hauberk-mesh's own time goes, in place of comparing; see docs/cost.md")
	output := flag.String("o", "table", "table or json")
	flag.Parse()
	if flag.NArg() > 0 || *seconds <= 0 || *turns < 1 || *output != "table" && *output != "json" {
		flag.Usage()
		os.Exit(2)
	}
	b := &bench{mesh: *mesh, traefik: *traefik, turn: time.Duration(*seconds * float64(time.Second)), turns: *turns, spoken: strings.Split(*only, ","), idle: 10000, onlyCost: *cost}
	if *short {
		b.turn, b.turns, b.idle = 200*time.Millisecond, 1, 1000
	}
	if n := os.Getenv(moved); n != "" {
		return b.tellParent(ctx, n)
	}
	runs := strings.Split(*cores, ",")
	fmt.Fprintf(os.Stderr, "bench: %d parts on %s processors, %d turns of %v for each proxy in each: about %v, and no more than %v\n",
		len(b.parts()), strings.Join(runs, " and "), b.turns, b.turn, time.Duration(len(runs))*b.estimate(b.parts()), most)
	ctx, cancel := context.WithTimeoutCause(ctx, most, fmt.Errorf("not done within %v", most))
	defer cancel()
	var all reports
	for _, n := range runs {
		r, err := onProcessors(ctx, n)
		if err != nil {
			r.Faults = append(r.Faults, err.Error())
		}
		all = append(all, r)
	}
	show := all.print
	if *output == "json" {
		show = all.write
	}
	return errors.Join(show(os.Stdout), all.fault())
}

// onProcessors measures in a process of its own, which is kept off those of the
// proxies if the machine has others. What it measured before a fault counts.
func onProcessors(ctx context.Context, cores string) (r report, err error) {
	n, err := strconv.Atoi(cores)
	if err != nil || n < 1 || n > runtime.NumCPU() {
		return r, fmt.Errorf("a proxy on %q processors: there are %d", cores, runtime.NumCPU())
	}
	r.Cores = n
	if runtime.NumCPU() < 2 {
		return r, errors.New("there is one processor: what loads would be measured too")
	}
	own := processors(n, runtime.NumCPU())
	if n == runtime.NumCPU() {
		own = processors(0, n)
	}
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	c := exec.CommandContext(ctx, "taskset", append([]string{"-c", own, self}, os.Args[1:]...)...)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = farewell
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	c.Env = append(os.Environ(), moved+"="+cores)
	var said bytes.Buffer
	c.Stdout, c.Stderr = &said, os.Stderr
	if err = c.Run(); err != nil {
		err = fmt.Errorf("measure on %d processors: %w", n, errors.Join(err, context.Cause(ctx)))
	}
	if said.Len() > 0 {
		err = errors.Join(err, json.Unmarshal(said.Bytes(), &r))
	}
	r.Shared, r.Processors = n == runtime.NumCPU(), runtime.NumCPU() // of this process: the other sees its own
	return r, err
}

// processors are those from one to before another, as taskset is told them.
func processors(from, before int) string { return fmt.Sprintf("%d-%d", from, before-1) }

// tellParent measures, and writes the report for the process that started this one.
func (b *bench) tellParent(ctx context.Context, cores string) (err error) {
	if b.cores, err = strconv.Atoi(cores); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "bench"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	measure := b.measure
	if b.onlyCost {
		measure = b.measureCosts
	}
	r, err := measure(ctx)
	return errors.Join(err, json.NewEncoder(os.Stdout).Encode(r))
}

type bench struct {
	dir           string
	mesh, traefik string
	cores         int // of a proxy
	turn          time.Duration
	turns         int
	idle          int  // connections held
	onlyCost      bool // is asked for, and nothing else
	spoken        []string
	shown         tls.Certificate // by who asks, to those that demand one
}

// loads are how much is asked: requests a second, 0 as many as go through.
var loads = []int{1000, 10000, 0}

// sizes of answers, in KiB.
var sizes = []int{1, 64}

// row is what came of one load on all ways.
type row struct {
	Spoken string `json:"spoken"`
	KiB    int    `json:"kib"`
	Rate   int    `json:"rate"` // 0: as many as go through
	Ways   []cell `json:"ways"`
}

// cell is one way's.
type cell struct {
	Name     string  `json:"name"`
	P50      float64 `json:"p50us"`
	P99      float64 `json:"p99us"`
	P999     float64 `json:"p999us"`
	PerSec   float64 `json:"perSecond"`
	CPU      float64 `json:"cpuMicrosecondsARequest,omitempty"`
	Requests int     `json:"requests"`
	Fault    string  `json:"fault,omitempty"` // it was not measured
}

// part is one row to be measured.
type part struct {
	spoken    string
	kib, rate int
}

func (p part) String() string { return fmt.Sprintf("%s, %d KiB, %s", p.spoken, p.kib, named(p.rate)) }

func (b *bench) parts() (all []part) {
	for _, spoken := range b.spoken {
		for _, kib := range sizes {
			for _, rate := range loads {
				if rate == 10000 && kib == 64 {
					continue // 5 Gbit/s: what loads would be measured
				}
				all = append(all, part{spoken, kib, rate})
			}
		}
	}
	return all
}

// estimate says how long parts take, and the idle connections after them: turns,
// and what opens and warms the connections for them.
func (b *bench) estimate(parts []part) (sum time.Duration) {
	const toOpen, each = 200 * time.Millisecond, 500 * time.Microsecond
	if b.onlyCost {
		return time.Duration(len(b.spoken)*b.turns) * costly * b.turn
	}
	for _, p := range parts {
		ways := 1
		for _, speaks := range speaks {
			if slices.Contains(speaks, p.spoken) {
				ways++
			}
		}
		sum += time.Duration(ways) * (toOpen + time.Duration(b.turns)*b.turn)
	}
	return (sum + time.Duration(len(speaks)*b.idle)*each).Round(time.Second)
}

// measure names in the report what could not be measured, and goes on.
func (b *bench) measure(ctx context.Context) (r report, err error) {
	r.Date, r.Cores, r.Load = time.Now().UTC().Format(time.RFC3339), b.cores, loadAverage()
	origins, err := openOrigins()
	defer func() {
		for _, o := range origins {
			err = errors.Join(err, o.Close())
		}
	}()
	if err != nil {
		return r, err
	}
	told, absent, err := b.proxies(origins)
	for _, p := range told {
		defer p.close()
	}
	if err != nil {
		return r, err
	}
	r.Proxies = absent
	var all []*proxy
	for _, p := range told {
		r.Proxies = append(r.Proxies, p.version())
		if err := b.begin(ctx, p, origins); err != nil {
			r.Faults = append(r.Faults, err.Error())
			continue
		}
		all = append(all, p)
	}
	parts := b.parts()
	for i, p := range parts {
		if ctx.Err() != nil {
			r.Faults = append(r.Faults, fmt.Sprintf("%d of %d parts, from %v on: %v", len(parts)-i, len(parts), p, context.Cause(ctx)))
			return r, nil
		}
		one := b.row(ctx, p, origins, all)
		for _, c := range one.Ways {
			if c.Fault != "" {
				r.Faults = append(r.Faults, fmt.Sprintf("%v: %s: %s", p, c.Name, c.Fault))
			}
		}
		r.Rows = append(r.Rows, one)
		fmt.Fprintf(os.Stderr, "bench: on %d processors, %d of %d, %v to go: %v\n", b.cores, i+1, len(parts), b.estimate(parts[i+1:]), p)
	}
	for _, p := range all {
		h, err := p.idle(ctx, b.idle)
		if err != nil {
			r.Faults = append(r.Faults, err.Error())
			continue
		}
		r.Idle = append(r.Idle, h)
	}
	r.LoadAfter = loadAverage()
	return r, nil
}

func (b *bench) measureCosts(ctx context.Context) (r report, err error) {
	r.Date, r.Cores, r.Load = time.Now().UTC().Format(time.RFC3339), b.cores, loadAverage()
	r.Costs, err = b.costs(ctx)
	r.LoadAfter = loadAverage()
	return r, err
}

// row measures all ways in turn, several times. A way that fails is left out from
// then on.
func (b *bench) row(ctx context.Context, p part, origins map[string]*origin, all []*proxy) row {
	out := row{Spoken: p.spoken, KiB: p.kib, Rate: p.rate}
	o, direct := origins[p.spoken], p.spoken
	if o == nil {
		o, direct = origins["http"], "http"
	}
	ways := []*way{{name: "straight", address: o.address(), spoken: direct, kib: p.kib}}
	for _, x := range all {
		if a, ok := x.ports[p.spoken]; ok {
			ways = append(ways, &way{name: x.name, address: a, spoken: p.spoken, kib: p.kib, shown: &b.shown, proxy: x})
		}
	}
	for _, w := range ways {
		defer w.close()
		w.fault = w.open(ctx)
	}
	for range b.turns {
		for _, w := range ways {
			if w.fault == nil {
				w.fault = w.turn(ctx, b.turn, p.rate)
			}
		}
	}
	for _, w := range ways {
		out.Ways = append(out.Ways, w.cell())
	}
	return out
}

// openOrigins are who answers, by what is spoken.
func openOrigins() (all map[string]*origin, err error) {
	all = map[string]*origin{}
	for spoken, open := range map[string]func() (*origin, error){"http": openOrigin, "grpc": openOriginTwo,
		"bolt": func() (*origin, error) { return openOriginRPC(false) }, "dubbo": func() (*origin, error) { return openOriginRPC(true) }} {
		o, err := open()
		if err != nil {
			return all, err
		}
		all[spoken] = o
	}
	all["h2"] = &origin{neverClosed{all["grpc"].ln}} // the same
	return all, nil
}

// neverClosed is a listener that another owner closes.
type neverClosed struct{ net.Listener }

func (neverClosed) Close() error { return nil }

func named(rate int) string {
	if rate == 0 {
		return "all that goes through"
	}
	return fmt.Sprintf("%d/s", rate)
}

func loadAverage() string {
	raw, err := os.ReadFile("/proc/loadavg")
	if f := strings.Fields(string(raw)); err == nil && len(f) > 2 {
		return strings.Join(f[:3], " ")
	}
	return "unknown"
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }
