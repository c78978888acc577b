// Command soak starts and ends containers by containerd, with and without pods,
// kills shims, machines, their keeper and containerd at random moments, and
// counts what is left when all of it should be gone: that must be nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/test/cri"
)

func main() {
	o := options{}
	flag.IntVar(&o.cycles, "cycles", 500, "containers to create, run and delete")
	flag.Float64Var(&o.faults, "faults", 0.4, "part of the cycles in which a process is killed")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "of what is random")
	flag.StringVar(&o.only, "only", "", "one kind of life alone: ctr, pod or pair")
	flag.StringVar(&o.runtime, "runtime", "hauberk", "runtime: hauberk or runc")
	flag.BoolVar(&o.debian, "debian", false, "on Debian's containerd instead of the one of the module proxy")
	flag.StringVar(&o.cache, "cache", "", "directory for what is built (default: hauberk/critest in the user's cache)")
	flag.StringVar(&o.keep, "keep", "", "file for containerd's log, if something is left or fails")
	flag.DurationVar(&o.limit, "timeout", 3*time.Hour, "give up after so long")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, o.limit)
	code, err := run(ctx, o)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		code = 1
	}
	os.Exit(code)
}

type options struct {
	cycles                     int
	faults                     float64
	seed                       uint64
	runtime, cache, keep, only string
	debian                     bool
	limit                      time.Duration
}

func say(format string, args ...any) { fmt.Printf("soak: "+format+"\n", args...) }

func run(ctx context.Context, o options) (code int, err error) {
	kinds := slices.DeleteFunc([]int{0, 1, 2}, func(i int) bool { return o.only != "" && kindsOfLife[i] != o.only })
	if flag.NArg() > 0 || o.cycles < 1 || len(kinds) == 0 {
		return 2, errors.New("wants flags only, at least one cycle, and a kind of life that there is")
	}
	t, inside, code, err := cri.Enter(ctx, o.cache, o.debian, say)
	if !inside || err != nil {
		return code, err
	}
	server, err := t.Start(ctx, nil)
	if err != nil {
		return 1, err
	}
	s := &soak{options: o, tools: t, server: server, kinds: kinds, random: rand.New(rand.NewPCG(o.seed, 0)), killed: map[string]int{}}
	err = s.run(ctx)
	err = errors.Join(err, server.Close())
	if err != nil && o.keep != "" {
		raw, _ := os.ReadFile(server.Log())
		err = errors.Join(err, os.WriteFile(o.keep, raw, 0o644))
	}
	return 0, err
}

// soak is one run.
type soak struct {
	options
	tools  cri.Tools
	server *cri.Server
	random *rand.Rand
	kinds  []int // of lives

	killed map[string]int // by kind of process
	lasts  [3]time.Duration
	missed int      // faults that found nothing to kill
	broken []string // cycles that failed though nothing was killed
}

func (s *soak) run(ctx context.Context) error {
	say("seed %d", s.seed)
	if err := s.prepare(ctx); err != nil {
		return err
	}
	// What one quiet cycle of each kind leaves, such as the bridge of the pods,
	// is what a machine with containers has.
	// The second of each says how long one takes.
	for _, i := range s.kinds {
		for n := range 2 {
			began := time.Now()
			if err := s.lives()[i](ctx, fmt.Sprintf("first-%d-%d", i, n)); err != nil {
				return fmt.Errorf("before anything was killed: %w", err)
			}
			s.lasts[i] = time.Since(began)
		}
		say("a life of kind %q takes %v", kindsOfLife[i], s.lasts[i].Round(10*time.Millisecond))
	}
	if err := s.server.EndKeeper(); err != nil {
		return err
	}
	before, err := s.settle(ctx, nil)
	if err != nil {
		return err
	}
	began := time.Now()
	for n := range s.cycles {
		if err := s.cycle(ctx, n); err != nil {
			return err
		}
	}
	say("%d cycles in %v", s.cycles, time.Since(began).Round(time.Second))
	if err := s.server.EndKeeper(); err != nil {
		return err
	}
	after, err := s.settle(ctx, before)
	if err != nil {
		return err
	}
	return s.report(before, after)
}

// cycle is the life of one container or pod, perhaps with a death in it.
func (s *soak) cycle(ctx context.Context, n int) error {
	name := fmt.Sprintf("c%04d", n)
	lives := s.lives()
	kind := s.kinds[s.random.IntN(len(s.kinds))]
	if s.random.Float64() >= s.faults {
		began := time.Now()
		err := lives[kind](ctx, name)
		s.lasts[kind] = min(s.lasts[kind], time.Since(began))
		s.tell(n, kind, "", began, err)
		if err != nil {
			s.broken = append(s.broken, fmt.Sprintf("%s: %v", name, err))
		}
		return s.cleanse(ctx, name)
	}
	began := time.Now()
	victim := victims[s.random.IntN(len(victims))]
	delay := time.Duration(s.random.Int64N(int64(s.lasts[kind])))
	choice := s.random.IntN(1000)
	struck := make(chan error, 1)
	life, end := context.WithCancel(ctx)
	go func() { struck <- s.strikeLater(ctx, life, victim, delay, choice) }()
	err := lives[kind](ctx, name) // it may fail, and so may the next steps
	end()
	hit := <-struck
	switch {
	case hit == nil:
		s.killed[victim.name]++
	case errors.Is(hit, errNobody):
		s.missed++
		if err != nil {
			s.broken = append(s.broken, fmt.Sprintf("%s: %v", name, err))
		}
	default:
		return hit
	}
	s.tell(n, kind, fmt.Sprintf("%s after %v: %v", victim.name, delay.Round(time.Millisecond), orKilled(hit)), began, err)
	return s.cleanse(ctx, name)
}

func orKilled(err error) string {
	if err == nil {
		return "killed"
	}
	return err.Error()
}

func (s *soak) tell(n, kind int, fault string, began time.Time, err error) {
	line := fmt.Sprintf("%4d %-5s %6.1fs", n+1, kindsOfLife[kind], time.Since(began).Seconds())
	if fault != "" {
		line += "  " + fault
	}
	if err != nil {
		text := strings.ReplaceAll(err.Error(), "\n", " ")
		line += "  (..." + text[max(0, len(text)-160):] + ")"
	}
	fmt.Println(line)
}
