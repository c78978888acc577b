// Command hauberkd is the control plane: it serves the API, keeps the ledger,
// guards the gate, signs tickets and identities, and tells nodes what to do.
//
// It needs no privilege and reaches no sandbox itself; hauberk-node does.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"hauberk.dev/control"
	"hauberk.dev/internal/overdue"
	"hauberk.dev/plan"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "hauberkd:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stderr io.Writer) error {
	c, err := settings(args, stderr)
	if err != nil {
		return err
	}
	inTime := overdue.Tell(ctx, endTime, func(stacks []byte) {
		fmt.Fprintf(stderr, "hauberkd: not ended %v after it was asked to; all goroutines:\n%s\n", endTime, stacks)
	})
	defer inTime()
	d, err := control.Open(ctx, c)
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// settings reads the arguments.
func settings(args []string, stderr io.Writer) (control.Config, error) {
	c := control.Config{Log: stderr}
	f := flag.NewFlagSet("hauberkd", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&c.State, "state", "/var/lib/hauberk/control", "folder of everything that must survive; its owner alone may read it")
	f.StringVar(&c.Run, "run", "/run/hauberk/control", "folder of sockets")
	f.StringVar(&c.API, "listen", "127.0.0.1:7443", "address of the Kubernetes-style API")
	f.StringVar(&c.Door, "node-listen", "127.0.0.1:7444", "address nodes talk to")
	f.StringVar(&c.TrustDomain, "trust-domain", "hauberk.local", "trust domain of every identity issued here")
	f.BoolVar(&c.InsecureGuardOff, "insecure-guard-off", false, "give identities to sandboxes without a Guard, to prove that checks notice")
	observing(f, &c)
	if err := f.Parse(args); err != nil {
		return c, err
	}
	if f.NArg() > 0 {
		return c, fmt.Errorf("read arguments: %q: none are taken; see hauberkd -h", f.Args())
	}
	if c.Observe != nil && c.Observe.LogCollector != nil && c.Observe.LogCollector.Address == "" {
		return c, errors.New("read arguments: --mesh-log-ca goes with --mesh-log-collector")
	}
	return c, nil
}

// observing adds the arguments that say what proxies tell of requests.
func observing(f *flag.FlagSet, c *control.Config) {
	f.Func("mesh-log", "have proxies write a line for each request: text or json; none by default", func(format string) error {
		if format != "text" && format != "json" {
			return fmt.Errorf("%q: want text or json", format)
		}
		observe(c).Log = format
		return nil
	})
	f.Func("mesh-log-collector", "have proxies tell this collector of OTLP over HTTP of each request: host:port", func(address string) error {
		if _, _, err := net.SplitHostPort(address); err != nil {
			return err
		}
		logCollector(c).Address = address
		return nil
	})
	f.Func("mesh-log-ca", "file of the authorities, in PEM, that have signed the certificate of --mesh-log-collector; without it that is spoken to in the clear", func(path string) error {
		text, err := os.ReadFile(path)
		logCollector(c).Authorities = string(text)
		return err
	})
	f.Func("mesh-traces", "have proxies carry traces on, and tell spans to this collector of OTLP over HTTP: host:port, or none to tell nobody", func(collector string) error {
		if traces(c); collector == "none" {
			return nil
		}
		if _, _, err := net.SplitHostPort(collector); err != nil {
			return err
		}
		traces(c).Collector = collector
		return nil
	})
	f.Func("mesh-sample", "how many of 1000 traces that begin at a proxy are sampled, with --mesh-traces; 0 by default", func(text string) error {
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 || n > 1000 {
			return fmt.Errorf("%q: want 0 to 1000", text)
		}
		traces(c).PerMille = n
		return nil
	})
}

func observe(c *control.Config) *plan.Observe {
	if c.Observe == nil {
		c.Observe = &plan.Observe{}
	}
	return c.Observe
}

func logCollector(c *control.Config) *plan.Collector {
	o := observe(c)
	if o.LogCollector == nil {
		o.LogCollector = &plan.Collector{}
	}
	return o.LogCollector
}

func traces(c *control.Config) *plan.Traces {
	o := observe(c)
	if o.Traces == nil {
		o.Traces = &plan.Traces{}
	}
	return o.Traces
}

// endTime is after how long a stop is late, and the log tells what it waits for.
const endTime = 15 * time.Second
