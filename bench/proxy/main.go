// Command proxy measures hauberk-mesh alone beside nginx and HAProxy: the same
// requests, in the same run, each proxy by itself on one processor and what
// loads and answers on another. It prints what each adds to a request that goes
// straight, and the processor time it takes. It needs root for nothing; the
// programs are nginx, haproxy and taskset of Debian and bin/hauberk-mesh.
//
//	go run ./bench/proxy [-seconds 2] [-turns 3] [-only http,https,tcp] [-o table|json]
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Processors: what is measured has one to itself.
const (
	ofProxy = "0"
	ofLoad  = "1"
	moved   = "HAUBERK_BENCH_MOVED" // this process is on its processor
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	seconds := flag.Float64("seconds", 2, "of each turn")
	turns := flag.Int("turns", 3, "of each way, one after the other")
	only := flag.String("only", "http,https,tcp", "what is spoken")
	mesh := flag.String("mesh", "bin/hauberk-mesh", "the program")
	output := flag.String("o", "table", "table or json")
	flag.Parse()
	if flag.NArg() > 0 || *seconds <= 0 || *turns < 1 || *output != "table" && *output != "json" {
		flag.Usage()
		os.Exit(2)
	}
	if runtime.NumCPU() < 2 && os.Getenv(moved) == "" {
		return errors.New("there is one processor: what loads would be measured too")
	}
	if err := move(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &bench{dir: dir, mesh: *mesh, turn: time.Duration(*seconds * float64(time.Second)), turns: *turns, spoken: strings.Split(*only, ",")}
	r, err := b.measure(ctx)
	if err != nil {
		return err
	}
	if *output == "json" {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	return r.print(os.Stdout)
}

// move puts this process, whole, on the processor of what loads.
func move() error {
	if os.Getenv(moved) != "" {
		return nil
	}
	taskset, err := exec.LookPath("taskset")
	if err != nil {
		return fmt.Errorf("keep processors apart: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := append([]string{taskset, "-c", ofLoad, self}, os.Args[1:]...)
	return syscall.Exec(taskset, args, append(os.Environ(), moved+"=1"))
}

type bench struct {
	dir, mesh string
	turn      time.Duration
	turns     int
	spoken    []string
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
}

func (b *bench) measure(ctx context.Context) (r report, err error) {
	r.Date, r.Cores, r.Load = time.Now().UTC().Format(time.RFC3339), 1, loadAverage()
	origin, err := openOrigin()
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, origin.Close()) }()
	all, err := b.proxies(origin.address())
	for _, p := range all {
		defer p.end()
	}
	if err != nil {
		return r, err
	}
	for _, p := range all {
		r.Proxies = append(r.Proxies, p.version())
		if err := p.begin(ctx); err != nil {
			return r, err
		}
	}
	for _, spoken := range b.spoken {
		for _, kib := range sizes {
			for _, rate := range loads {
				if rate == 10000 && kib == 64 {
					continue // 5 Gbit/s: the load would be measured
				}
				one, err := b.row(ctx, spoken, kib, rate, origin, all)
				if err != nil {
					return r, fmt.Errorf("%s, %d KiB, %d a second: %w", spoken, kib, rate, err)
				}
				r.Rows = append(r.Rows, one)
				fmt.Fprintf(os.Stderr, "bench: %s, %d KiB, %s: done\n", spoken, kib, named(rate))
			}
		}
	}
	r.Idle, err = idle(ctx, all)
	r.LoadAfter = loadAverage()
	return r, err
}

// row measures all ways in turn, several times.
func (b *bench) row(ctx context.Context, spoken string, kib, rate int, origin *origin, all []*proxy) (row, error) {
	out := row{Spoken: spoken, KiB: kib, Rate: rate}
	ways := []*way{{name: "straight", address: origin.address(), kib: kib}}
	for _, p := range all {
		if a, ok := p.ports[spoken]; ok {
			ways = append(ways, &way{name: p.name, address: a, kib: kib, tls: spoken == "https", proxy: p})
		}
	}
	for _, w := range ways {
		defer w.close()
		if err := w.open(ctx); err != nil {
			return out, fmt.Errorf("%s: %w", w.name, err)
		}
	}
	for range b.turns {
		for _, w := range ways {
			if err := w.turn(ctx, b.turn, rate); err != nil {
				return out, fmt.Errorf("%s: %w", w.name, err)
			}
		}
	}
	for _, w := range ways {
		out.Ways = append(out.Ways, w.cell())
	}
	return out, nil
}

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
