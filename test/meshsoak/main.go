// Command meshsoak loads real proxies for a long time and looks for what only
// time shows. Two hauberk-mesh processes play two nodes, with namespaces for
// guests, and a third serves a file alone. Clients speak every protocol through
// them, some leave in the middle, while plans change, servers die, callers are
// revoked, certificates rotate, and slow and half-open clients hang about. Every
// error that a client sees must be explained by something done to it at that
// time; memory, descriptors and goroutines must stay flat; no request may be
// served twice. It is no benchmark: the rate is low on purpose. It needs root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"
)

type options struct {
	program  string
	duration time.Duration
	rate     float64
	seed     uint64
	calm     bool
}

func main() {
	var o options
	flag.StringVar(&o.program, "program", "bin/hauberk-mesh", "the proxy to test")
	flag.DurationVar(&o.duration, "duration", 30*time.Minute, "how long to load")
	flag.Float64Var(&o.rate, "rate", 150, "requests a second, all together")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "of what is random")
	flag.BoolVar(&o.calm, "calm", false, "load only: no trouble")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	good, err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "meshsoak:", err)
	}
	if err != nil || !good {
		os.Exit(1)
	}
}

func say(format string, args ...any) {
	fmt.Printf("meshsoak: %s "+format+"\n", append([]any{time.Now().UTC().Format("15:04:05")}, args...)...)
}

func run(ctx context.Context, o options) (good bool, err error) {
	if flag.NArg() > 0 || o.rate <= 0 || os.Geteuid() != 0 {
		return false, errors.New("wants flags only, a rate above 0, and root for namespaces")
	}
	w, err := newWorld(o.program)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	say("%v at %g requests a second, seed %d", o.duration, o.rate, o.seed)
	watch := &watcher{world: w}
	log := &journal{}
	load, end := context.WithTimeout(ctx, o.duration)
	defer end()
	clients := w.clients(log, o)
	loaded := make(chan struct{})
	go func() { defer close(loaded); clients.run(load) }()
	troubled := make(chan error, 1)
	go func() {
		t := &trouble{world: w, journal: log, random: rand.New(rand.NewPCG(o.seed, 1))}
		if o.calm {
			<-load.Done()
			troubled <- nil
			return
		}
		troubled <- t.run(load)
	}()
	watch.run(load)
	<-loaded
	err = <-troubled
	watch.settle(ctx)
	return clients.report() && watch.report() && err == nil, err
}
