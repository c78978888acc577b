package shim

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"time"

	"hauberk.dev/guard/bpf"
	"hauberk.dev/shim/keep"
	"hauberk.dev/vm"
)

const (
	// keepAction makes this program the keeper; shims start it so.
	keepAction = "keep"
	// keptSizes is how many sizes of machines are kept ahead, and how many
	// templates there are.
	keptSizes = 3
	// keeperIdle is when a keeper that nobody asks ends.
	keeperIdle = 15 * time.Minute
	// hotDisk bounds writable disks attached to a kept machine.
	hotDisk = 64 << 30
)

// keepMachines runs the keeper, or ends all there are.
func keepMachines(ctx context.Context, args []string, stderr io.Writer) error {
	f := flag.NewFlagSet(keepAction, flag.ContinueOnError)
	f.SetOutput(stderr)
	state := f.String("state", defaultState, "where kernels and images are kept")
	run := f.String("run", defaultRun, "where machines are")
	number := f.Int("pool", defaultPool, "machines kept ahead of each size")
	idle := f.Duration("idle", keeperIdle, "end when nobody asked for this long")
	stop := f.Bool("end", false, "end the keepers of -run instead, and what they kept")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *number < 0 || *number > maxPool || f.NArg() > 0 || *idle <= 0 {
		return fmt.Errorf("read arguments: -pool %d, -idle %v, %q", *number, *idle, f.Args())
	}
	place := keep.Place{State: *state, Run: *run}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	c := config{state: *state, run: *run}
	if *stop {
		c.sweep(ctx, log)
		return place.End(ctx)
	}
	return keep.Run(ctx, keep.Config{
		Place: place, Link: bpf.Link, PerSize: *number, Sizes: keptSizes, Idle: *idle, DiskLimit: hotDisk,
		Prepare: keep.Rehearse(filepath.Join(*state, "rehearsal"), baseline),
		Tidy:    func(ctx context.Context) { c.sweep(ctx, log) },
		Log:     log,
	})
}

// baseline puts in force, while a machine rehearses, what its pod will begin
// with.
func baseline(ctx context.Context, c *vm.Channel) error {
	p, err := compilePolicy(nil)
	if err == nil {
		_, err = c.GuardPolicy(ctx, p.Generation, p.Blob)
	}
	return err
}
