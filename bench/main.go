// Command bench measures Hauberk on the machine it runs on and prints the
// figures together with the conditions under which they came about.
//
// It judges nothing: a slow machine or a busy neighbour is no failure. What a hop of
// the mesh may add stands beside the figure; otherwise no figure is compared with a
// bar here, docs/figures.md does that in words. Where
// a rival is named, it was measured in the same run, turn by turn with us. What
// bench starts has ended when it ends. It needs root.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// most bounds a whole run; figures of parts that were done are still printed.
const most = 50 * time.Minute

func main() {
	if len(os.Args) > 2 && (os.Args[1] == "inside" || os.Args[1] == "outside") {
		act := inside
		if os.Args[1] == "outside" {
			act = func(args []string) error { return outside(args[0]) }
		}
		if err := act(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 && os.Args[1] == profiled {
		if err := beMesh(ctx, os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// part is something to measure. What it measured before it failed counts.
type part struct {
	name string
	run  func(context.Context, *lab) ([]figure, error)
	// plain parts start no machine of ours.
	plain bool
}

// parts in the order of running: what a neighbour disturbs most comes first.
var parts = []part{
	{"launch", launches, false}, {"memory", memories, false}, {"mesh", hops, true}, {"records", records, false}, {"system", system, false}, {"policy", policies, false},
}

// beside are the parts that need more than Debian has (scripts/bench-sandbox):
// containerd with us, runc and gVisor side by side.
var beside = []part{{"start", starts, false}, {"idle", idles, false}, {"rates", rates, false}, {"traffic", traffics, false}}

// asked are the parts that say something of ours alone.
var asked = []part{{"cost", costs, true}}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	format := flags.String("o", "table", "how figures are printed: table or json")
	only := flags.String("only", "", "parts to run, separated by commas (default all of the first line)\n"+names(parts)+"\n"+names(beside)+"\n"+names(asked))
	n := flags.Int("n", 12, "launches of each kind, violations and changes of a policy")
	bin := flags.String("programs", "bin", "directory of Hauberk's programs")
	kernel := flags.String("kernel", "", "guest kernel of the parts launch and memory: a series such as 6.12, or an image")
	pods := flags.Int("pods", 50, "how many containers are weighed together in the part idle, and sandboxes are given a policy in the part policy")
	grow := flags.Duration("grow", 150*time.Second, "in the part idle, start containers of each kind until they take 8 GiB or this is over; 0 computes it")
	calls := flags.Int("calls", 2000, "calls of each path in a turn, in the part mesh; a thousand take a second")
	rivals := flags.String("rivals", "", "directory of runsc, for the parts "+names(beside))
	if err := flags.Parse(args); err != nil {
		return err
	}
	wanted, err := choose(*only)
	switch {
	case err != nil:
		return err
	case flags.NArg() > 0 || *n < 2 || *format != "table" && *format != "json":
		return fmt.Errorf("unexpected argument %q, -n below 2 or unknown -o %q; see -h", flags.Args(), *format)
	case os.Geteuid() != 0:
		return errors.New("run as root: machines, taps and network namespaces are made")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, most, fmt.Errorf("not done within %v", most))
	defer cancel()
	machines := slices.ContainsFunc(wanted, func(p part) bool { return !p.plain })
	l, err := openLab(ctx, *bin, *kernel, *n, machines, stderr)
	if err != nil {
		return err
	}
	l.rivals, l.grow, l.pods, l.calls = *rivals, *grow, max(*pods, 2), max(*calls, 1)
	defer func() { err = errors.Join(err, l.Close()) }()
	r := report{Conditions: l.conditions}
	var errs []error
	for _, p := range wanted {
		l.say("%s", p.name)
		figures, err := p.run(ctx, l)
		if err != nil {
			errs = append(errs, fmt.Errorf("measure %s: %w", p.name, err))
		}
		for _, f := range figures {
			f.Part = p.name
			r.Figures = append(r.Figures, f)
		}
	}
	r.LoadAfter = load()
	if *format == "json" {
		e := json.NewEncoder(stdout)
		e.SetIndent("", "  ")
		return errors.Join(append(errs, e.Encode(r))...)
	}
	return errors.Join(append(errs, r.print(stdout))...)
}

func names(list []part) string {
	var all []string
	for _, p := range list {
		all = append(all, p.name)
	}
	return strings.Join(all, ",")
}

func choose(only string) ([]part, error) {
	if only == "" {
		return parts, nil
	}
	var wanted []part
	for name := range strings.SplitSeq(only, ",") {
		all := slices.Concat(parts, beside, asked)
		i := slices.IndexFunc(all, func(p part) bool { return p.name == name })
		if i < 0 {
			return nil, fmt.Errorf("no part %q; there are %s", name, names(all))
		}
		wanted = append(wanted, all[i])
	}
	return wanted, nil
}
