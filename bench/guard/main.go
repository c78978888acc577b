// Command guard measures what the Guard costs inside a guest: one machine and
// kernel, the same loads at every step of a ladder from a kernel without BPF LSM
// to a policy that reports everything, in the order A B … B A so that a machine
// that grows warm or busy favours no step.
//
//	go run ./bench/guard [-kernels 6.1,6.12] [-samples 10] [-rounds 2] [-o table|json]
//	go run ./bench/guard -only load [-kernels 6.1,6.12]
//
// The second says what each program costs the verifier when a guest starts.
//
// It judges nothing; docs/figures.md does that in words.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench guard:", err)
		os.Exit(1)
	}
}

var loads = []string{"getppid", "exec", "open2", "open8", "open20", "stat", "create", "map", "connect", "sendto"}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("guard", flag.ContinueOnError)
	kernels := flags.String("kernels", "6.1,6.12", "series of guest kernels")
	samples := flags.Int("samples", 10, "samples of each load in a boot")
	rounds := flags.Int("rounds", 2, "times each step is booted")
	output := flags.String("o", "table", "table or json")
	only := flags.String("only", "", "load: only what loading the programs takes; costs: only what each run of one takes")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || *samples < 2 || *rounds < 1 || *output != "table" && *output != "json" {
		return errors.New("want flags alone, at least two samples and one round, -o table or json")
	}
	if *only != "" {
		return part(ctx, os.Stdout, *only, strings.Split(*kernels, ","))
	}
	var reports []report
	for _, series := range strings.Split(*kernels, ",") {
		r, err := measure(ctx, series, *samples, *rounds)
		if err != nil {
			return fmt.Errorf("kernel %s: %w", series, err)
		}
		reports = append(reports, r)
	}
	if *output == "json" {
		return json.NewEncoder(os.Stdout).Encode(reports)
	}
	for _, r := range reports {
		if err := r.print(os.Stdout); err != nil {
			return err
		}
	}
	return nil
}

// report is what one kernel showed.
type report struct {
	Series string            `json:"series"`
	Kernel string            `json:"kernel"`
	Date   time.Time         `json:"date"`
	Steps  []*result         `json:"steps"`
	Costs  map[string]uint64 `json:"nsPerRun"` // of each program, over all runs of it
	AtLoad string            `json:"loadAverage"`
}

// result is what one step showed.
type result struct {
	Name   string               `json:"name"`
	What   string               `json:"what"`
	NS     map[string][]float64 `json:"ns"`  // an operation, by load
	P99    map[string][]float64 `json:"p99"` // by load, of each boot
	Lost   uint64               `json:"lost"`
	Events uint64               `json:"events"`
	Agent  uint64               `json:"agentKiB"`
}

func measure(ctx context.Context, series string, samples, rounds int) (report, error) {
	m, err := prepare(ctx, series)
	if err != nil {
		return report{}, err
	}
	defer m.close()
	r := report{Series: series, Kernel: m.kernel.Release, Date: time.Now().UTC(), Costs: map[string]uint64{}}
	for _, s := range ladder() {
		r.Steps = append(r.Steps, &result{Name: s.name, What: s.what, NS: map[string][]float64{}, P99: map[string][]float64{}})
	}
	for round := range rounds {
		order := ladder()
		if round%2 == 1 {
			slices.Reverse(order)
		}
		for _, s := range order {
			began := time.Now()
			i := slices.IndexFunc(r.Steps, func(x *result) bool { return x.Name == s.name })
			if err := m.step(ctx, s, samples, r.Steps[i]); err != nil {
				return r, fmt.Errorf("step %s: %w", s.name, err)
			}
			fmt.Fprintf(os.Stderr, "kernel %s, round %d of %d, %s: %.0f s\n", series, round+1, rounds, s.name, time.Since(began).Seconds())
		}
	}
	if err := m.costs(ctx, r.Costs); err != nil {
		return r, err
	}
	raw, _ := os.ReadFile("/proc/loadavg")
	r.AtLoad = strings.TrimSpace(string(raw))
	return r, nil
}

func (r report) print(w io.Writer) error {
	fmt.Fprintf(w, "\nkernel %s (%s), %s, load average %s\nmicroseconds an operation: median (95%% interval), p99 of single operations; beside it the ratio to L1\n", r.Series, r.Kernel, r.Date.Format(time.RFC3339), r.AtLoad)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, load := range loads {
		fmt.Fprintf(t, "\n%s\n", load)
		base := median(r.step("L1").NS[load])
		for _, s := range r.Steps {
			low, high := interval(s.NS[load])
			m := median(s.NS[load])
			fmt.Fprintf(t, "  %s\t%s\t%.2f\t(%.2f–%.2f)\tp99 %.2f\t%.3fx\n", s.Name, s.What, m/1e3, low/1e3, high/1e3, median(s.P99[load])/1e3, m/base)
		}
	}
	fmt.Fprintf(t, "\nrecords\n")
	for _, s := range r.Steps {
		if s.Agent > 0 {
			fmt.Fprintf(t, "  %s\t%d sent, %d lost, first process holds %d KiB\n", s.Name, s.Events, s.Lost, s.Agent)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return printCosts(w, r.Costs)
}

func printCosts(w io.Writer, costs map[string]uint64) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "\nnanoseconds a run of each program (L4/64, counting on)\n")
	for _, name := range sorted(costs) {
		fmt.Fprintf(t, "  %s\t%d\n", name, costs[name])
	}
	return t.Flush()
}

func (r report) step(name string) *result {
	return r.Steps[slices.IndexFunc(r.Steps, func(s *result) bool { return s.Name == name })]
}

func sorted(m map[string]uint64) (names []string) {
	for n := range m {
		names = append(names, n)
	}
	slices.SortFunc(names, func(a, b string) int { return int(m[b]) - int(m[a]) })
	return names
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// interval holds the median with a probability of 95 %, whatever the
// distribution: order statistics of a binomial (Conover, Practical
// Nonparametric Statistics, section 3.2), in the normal approximation.
func interval(v []float64) (low, high float64) {
	if len(v) == 0 {
		return 0, 0
	}
	s := slices.Sorted(slices.Values(v))
	n := float64(len(s))
	d := 0.98 * math.Sqrt(n)
	at := func(x float64) float64 { return s[min(max(int(x), 0), len(s)-1)] }
	return at(n/2 - d), at(n/2 + d)
}
