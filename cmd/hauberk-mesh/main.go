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
	"net"
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
	admin := flags.String("admin", "", "Unix socket for GET /metrics; none by default")
	limit := flags.Int("connections", 0, "connections open at once, per sandbox and direction; 0 means 1024")
	door := flags.String("handover", "", "socket to listen on for a process that is to take this one's place; only this user and root may")
	take := flags.String("take-over", "", "take the place of the process that listens there for it, with its sockets and live connections")
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
	// Who reads the log may end before this does: that loses lines, and no request.
	signal.Ignore(syscall.SIGPIPE)
	if *config != "" {
		return alone(ctx, *config, *door, *take, stderr)
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	p := mesh.New(mesh.Options{Log: log, Connections: *limit, Requests: os.Stdout})
	ln, next, err := sockets(ctx, p, *path, *door, *take)
	if err != nil {
		return err
	}
	log.Info("listening for the node", "link", ln.Addr(), "pid", os.Getpid())
	// Nothing here needs to be saved: if an end takes too long, it is told why
	// and made.
	inTime := overdue.Tell(ctx, endTime, func(stacks []byte) {
		fmt.Fprintf(stderr, "hauberk-mesh: not ended %v after it was asked to; all goroutines:\n%s\n", endTime, stacks)
		os.Exit(1)
	})
	defer inTime()
	if *admin != "" {
		stop, err := serveAdmin(ctx, log, p, *admin, *take != "")
		if err != nil {
			return errors.Join(err, ln.Close())
		}
		defer stop()
	}
	if next == nil {
		return p.Run(ctx, ln)
	}
	given := make(chan error, 1)
	go func() { given <- p.GiveOver(ctx, next) }()
	return errors.Join(p.Run(ctx, ln), <-given)
}

// serveAdmin serves the socket for administrators until stop is called: at once or,
// where another process may have it still, once it can.
func serveAdmin(ctx context.Context, log *slog.Logger, p *mesh.Proxy, path string, later bool) (stop func(), err error) {
	metrics, err := unixsock.ListenStream(path)
	if err != nil && !later {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	served := make(chan error, 1)
	if err == nil {
		go func() { served <- p.ServeAdmin(ctx, metrics) }()
	} else {
		go func() { served <- serveAdminLater(ctx, log, p, path) }()
	}
	return func() { cancel(); <-served }, nil
}

// serveAdminLater opens the socket for administrators once the process whose place
// this one has taken has let go of it. That it cannot is no reason to end: live
// connections are here.
func serveAdminLater(ctx context.Context, log *slog.Logger, p *mesh.Proxy, path string) error {
	for until := time.Now().Add(2 * endTime); ; {
		ln, err := unixsock.ListenStream(path)
		if err == nil {
			return p.ServeAdmin(ctx, ln)
		}
		if time.Now().After(until) {
			log.Error("nobody can be told the counts", "err", err)
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// sockets opens the sockets for the node and for the next process, or takes those
// of the process whose place this one takes.
func sockets(ctx context.Context, p *mesh.Proxy, path, door, take string) (nodes, next *net.UnixListener, err error) {
	if take != "" {
		return p.TakeOver(ctx, take)
	}
	if nodes, err = unixsock.Listen(path); err != nil || door == "" {
		return nodes, nil, err
	}
	if next, err = unixsock.Listen(door); err != nil {
		nodes.Close()
	}
	return nodes, next, err
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
