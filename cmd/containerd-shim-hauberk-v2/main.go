// Command containerd-shim-hauberk-v2 runs containers of containerd in
// sandboxes. containerd starts it; hauberk-guest must lie beside it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"hauberk.dev/internal/gate"
	"hauberk.dev/shim"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) == 2 && os.Args[1] == "gate" { // of a sandbox that is run by hand
		if err := gate.Serve(ctx, os.Stdin, os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, "gate:", err)
			os.Exit(1)
		}
		return
	}
	if err := shim.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "containerd-shim-hauberk-v2:", err)
		os.Exit(1)
	}
}
