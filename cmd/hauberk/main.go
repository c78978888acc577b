// Command hauberk is what people type: it starts and stops an installation on
// this machine, releases images, and asks what happened and why.
//
// Everything about a running installation it learns from hauberkd, on a Unix
// socket; it signs no identity and starts no sandbox itself.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"hauberk.dev/cmd/hauberk/internal/command"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := command.Run(ctx, os.Args[1:], command.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
	stop()
	os.Exit(code)
}
