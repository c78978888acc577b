// Command shortcut measures what sk_msg would save on a leg between two ends of one
// machine, and finds out what a connection over it does otherwise than TCP does.
// hauberk-mesh does not use it: docs/decisions/29-same-host.md says why, with
// figures of this program. Whoever doubts it on another kernel can ask again.
//
//	go run ./bench/shortcut [-turns 3] [-seconds 1]     both, as root
//	go run ./bench/shortcut -turns 0                    only what is otherwise, some seconds
//	go run ./bench/shortcut -- COMMAND ...              run a program with shortcuts for all it does over 127.0.0.0/8
//
// It exits with 1 if it could not measure, not if something is bad.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "shortcut:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("shortcut", flag.ContinueOnError)
	flags.SetOutput(stderr)
	turns := flags.Int("turns", 3, "of each leg at each load, one after the other; 0 measures no time")
	seconds := flags.Float64("seconds", 1, "of each turn")
	if err := flags.Parse(args); err != nil {
		return err
	}
	w, err := openWorld()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if flags.NArg() > 0 {
		return w.run(ctx, flags.Args(), stdout, stderr)
	}
	var kernel syscall.Utsname
	if err := syscall.Uname(&kernel); err != nil {
		return err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s, Linux %s, load average %s", time.Now().UTC().Format(time.RFC3339), release(kernel.Release[:]), load)
	t := tabwriter.NewWriter(stdout, 0, 8, 2, ' ', 0)
	defer t.Flush()
	fmt.Fprint(t, "\nwhat a connection does\tplain\twith shortcuts\tUnix socket pair\n")
	if err := w.compare(t); err != nil {
		return err
	}
	return w.measure(ctx, t, *turns, time.Duration(*seconds*float64(time.Second)))
}

func release(from []int8) string {
	var b strings.Builder
	for _, c := range from {
		if c == 0 {
			break
		}
		b.WriteByte(byte(c))
	}
	return b.String()
}

// run has a program, and all that it starts, use shortcuts.
func (w *world) run(ctx context.Context, command []string, stdout, stderr io.Writer) (err error) {
	if w.shortcuts, err = openShortcuts(w.cgroup, 0); err != nil {
		return err
	}
	c := exec.CommandContext(ctx, command[0], command[1:]...)
	c.Stdout, c.Stderr = stdout, stderr
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	return c.Run()
}

// measure times all legs, turn by turn.
func (w *world) measure(ctx context.Context, out io.Writer, turns int, length time.Duration) error {
	if turns == 0 {
		return nil
	}
	if err := w.cut(); err != nil {
		return err
	}
	for _, n := range []int{1 << 10, largest} {
		for _, rate := range []int{1000, 0} {
			if err := w.load(ctx, out, turns, length, rate, n); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *world) load(ctx context.Context, out io.Writer, turns int, length time.Duration, rate, n int) error {
	all, err := w.legs()
	if err != nil {
		return err
	}
	for _, l := range all {
		defer l.Close()
		if err := l.start(); err != nil {
			return err
		}
	}
	for range turns {
		for _, l := range all {
			if err := l.turn(ctx, length, rate, n); err != nil {
				return err
			}
		}
	}
	asked := "all that goes through"
	if rate > 0 {
		asked = fmt.Sprintf("%d/s", rate)
	}
	fmt.Fprintf(out, "\n1 KiB asked, %d KiB answered, %s\tp50 us\tp99 us\tCPU us, both ends\tof loopback's\tn\n", n>>10, asked)
	for i, l := range all {
		beside := all[0]
		if i >= 4 {
			beside = all[4] // that with TLS
		}
		l.print(out, beside)
	}
	return nil
}
