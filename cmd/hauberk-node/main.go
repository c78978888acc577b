// Command hauberk-node is the privileged agent of a machine: it boots
// sandboxes, opens their sockets for the mesh, tells their Guards what to
// enforce, and contains them.
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

	"hauberk.dev/internal/overdue"
	"hauberk.dev/node"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "hauberk-node:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stderr io.Writer) error {
	var c node.Config
	f := flag.NewFlagSet("hauberk-node", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&c.State, "state", "/var/lib/hauberk/node", "folder of the journal, images and kernel artefacts")
	f.StringVar(&c.Run, "run", "/run/hauberk/node", "folder of sockets and namespaces")
	f.StringVar(&c.Name, "name", "local", "name of this node")
	f.StringVar(&c.Join, "join", "/run/hauberk/control/admin.sock", "socket on which the control plane admits this node")
	f.StringVar(&c.Control, "control", "127.0.0.1:7444", "address of the control plane's node door")
	f.StringVar(&c.Door, "door", "127.0.0.1:7445", "address of this node's own door")
	f.StringVar(&c.Gateway, "gateway", "127.0.0.1:15008", "address of this node's mesh gateway (HBONE)")
	f.StringVar(&c.MeshLink, "mesh-link", "/run/hauberk/mesh/link.sock", "socket of hauberk-mesh")
	f.StringVar(&c.GuestAgent, "guest-agent", "", "the hauberk-guest program (default: beside this one)")
	f.StringVar(&c.Kernel, "kernel", "", "guest kernel: a series such as 6.12, or an image (default: the newest installed cloud kernel of Debian 12's own series)")
	f.IntVar(&c.Spares, "spares", 1, "machines kept ahead of demand, restored and paused, of each of the two sizes asked for last; 0 clones when asked")
	f.BoolVar(&c.KeepSandboxes, "keep-sandboxes", false, "leave sandboxes running when told to stop; the next start adopts them")
	f.BoolVar(&c.WithoutGuard, "without-guard", false, "boot sandboxes without the Guard, to prove that checks notice; every status says so")
	end := f.Bool("end", false, "end the sandboxes that an earlier run left, and exit")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("read arguments: %q: none are taken; see hauberk-node -h", f.Args())
	}
	c.Log = stderr
	inTime := overdue.Tell(ctx, endTime, func(stacks []byte) {
		fmt.Fprintf(stderr, "hauberk-node: not ended %v after it was asked to; all goroutines:\n%s\n", endTime, stacks)
	})
	defer inTime()
	if *end {
		return node.End(c)
	}
	n, err := node.Open(ctx, c)
	if err != nil {
		return err
	}
	return n.Run(ctx)
}

// endTime is after how long a stop is late, and the log tells what it waits for.
const endTime = 15 * time.Second
