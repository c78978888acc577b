// Command hauberkd is the control plane: it serves the API, keeps the ledger,
// guards the gate, signs tickets and identities, and tells nodes what to do.
//
// It needs no privilege and reaches no sandbox itself; hauberk-node does.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"hauberk.dev/control"
	"hauberk.dev/internal/overdue"
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
	var c control.Config
	f := flag.NewFlagSet("hauberkd", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&c.State, "state", "/var/lib/hauberk/control", "folder of everything that must survive; its owner alone may read it")
	f.StringVar(&c.Run, "run", "/run/hauberk/control", "folder of sockets")
	f.StringVar(&c.API, "listen", "127.0.0.1:7443", "address of the Kubernetes-style API")
	f.StringVar(&c.Door, "node-listen", "127.0.0.1:7444", "address nodes talk to")
	f.StringVar(&c.TrustDomain, "trust-domain", "hauberk.local", "trust domain of every identity issued here")
	f.BoolVar(&c.InsecureGuardOff, "insecure-guard-off", false, "give identities to sandboxes without a Guard, to prove that checks notice")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("read arguments: %q: none are taken; see hauberkd -h", f.Args())
	}
	c.Log = stderr
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

// endTime is after how long a stop is late, and the log tells what it waits for.
const endTime = 15 * time.Second
