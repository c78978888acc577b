// Command hauberk-mesh is the proxy of a node. It faces the network, so it runs
// as a user of its own with no capability: every socket it uses comes from
// hauberk-node over the link. With -c it is a proxy by itself, told by a file,
// with sockets of its own; the two never meet in one process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/overdue"
	"hauberk.dev/internal/unixsock"
	"hauberk.dev/mesh"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "hauberk-mesh:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stderr io.Writer) error {
	if len(args) > 0 && args[0] == "check" {
		return check(args[1:], stderr)
	}
	if len(args) > 0 && args[0] == "convert" {
		return convert(args[1:], os.Stdout, stderr)
	}
	flags := flag.NewFlagSet("hauberk-mesh", flag.ContinueOnError)
	flags.SetOutput(stderr)
	config := flags.String("c", "", "serve alone, as this file says; see docs/proxy.md")
	path := flags.String("link", "/run/hauberk/mesh.sock", "socket to listen on for hauberk-node")
	limit := flags.Int("connections", 0, "connections open at once, per sandbox and direction; 0 means 1024")
	root := flags.Bool("allow-root", false, "run as root, for tests only")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || *limit < 0 {
		return fmt.Errorf("unexpected argument %q or negative --connections; see --help", flags.Args())
	}
	if os.Geteuid() == 0 && !*root {
		return errors.New("refuse to run as root: what faces the network must not be; start it as user hauberk-mesh")
	}
	if err := closeOff(); err != nil {
		return err
	}
	if *config != "" {
		return alone(ctx, *config, stderr)
	}
	ln, err := unixsock.Listen(*path)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	log.Info("listening for the node", "link", *path, "pid", os.Getpid())
	// Nothing here needs to be saved: if an end takes too long, it is told why
	// and made.
	inTime := overdue.Tell(ctx, endTime, func(stacks []byte) {
		fmt.Fprintf(stderr, "hauberk-mesh: not ended %v after it was asked to; all goroutines:\n%s\n", endTime, stacks)
		os.Exit(1)
	})
	defer inTime()
	return mesh.New(mesh.Options{Log: log, Connections: *limit}).Run(ctx, ln)
}

// endTime is how long the proxy may take to end.
const endTime = 10 * time.Second

// closeOff keeps keys in this process: no core dump, no look into its memory by
// other processes of its user, no way to privileges by exec.
func closeOff() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make memory private: %w", err)
	}
	// Of each thread its own. With cgo linked in, that is the launcher's to do.
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errno != 0 && errno != unix.ENOTSUP {
		return fmt.Errorf("give up new privileges: %w", errno)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("turn core dumps off: %w", err)
	}
	return nil
}
