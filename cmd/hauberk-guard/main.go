// Command hauberk-guard holds containers that share this node's kernel, such as
// runc's, to policies of the Guard. One process of it loads the programs; the
// others are its hooks, which a runtime calls before it starts a container.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"hauberk.dev/internal/unixsock"
	"hauberk.dev/node/share"
)

const usage = `usage:
  hauberk-guard check                      say whether this kernel lets the Guard in
  hauberk-guard link FILE                  fit the programs to this kernel, into a file
  hauberk-guard serve -bundle FILE         load them and serve the hooks
  hauberk-guard bind | unbind              hooks createRuntime and poststop; the state comes on standard input
  hauberk-guard policy CONTAINER [NAME]    put other policies in force, or the baseline
  hauberk-guard status CONTAINER
`

func main() {
	runtime.LockOSThread() // the kernel knows the loader by its first thread
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "hauberk-guard:", err)
		os.Exit(1)
	}
}

// settings are the flags of all commands.
type settings struct{ dir, policies, bundle, pins, node string }

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return errors.New("no command")
	}
	var s settings
	flags := flag.NewFlagSet("hauberk-guard "+args[0], flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&s.dir, "dir", "/run/hauberk-guard", "directory of the socket and of what is bound")
	flags.StringVar(&s.policies, "policies", "/etc/hauberk/guard", "directory of policies")
	flags.StringVar(&s.bundle, "bundle", "/var/lib/hauberk-guard/bundle", "file that link made")
	flags.StringVar(&s.pins, "pins", "/sys/fs/bpf/hauberk", "directory of what stays when the loader ends")
	flags.StringVar(&s.node, "node", "", "this node's name in records; the host's name if not set")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	hook := share.Hook{Socket: filepath.Join(s.dir, "sock"), Policies: s.policies}
	want := func(least, most int) error {
		if n := flags.NArg(); n < least || n > most {
			return fmt.Errorf("%s: %d arguments; see hauberk-guard without any", args[0], n)
		}
		return nil
	}
	switch args[0] {
	case "check":
		return errors.Join(want(0, 0), share.Supported(os.DirFS("/")))
	case "link":
		if err := want(1, 1); err != nil {
			return err
		}
		return link(flags.Arg(0))
	case "serve":
		if err := want(0, 0); err != nil {
			return err
		}
		return serve(ctx, s, stdout)
	case "bind":
		a, err := hook.Bind(stdin)
		return tell(stderr, a, err)
	case "unbind":
		return hook.Unbind(stdin)
	case "policy":
		if err := want(1, 2); err != nil {
			return err
		}
		a, err := hook.Change(flags.Arg(0), flags.Arg(1))
		return tell(stdout, a, err)
	case "status":
		if err := want(1, 1); err != nil {
			return err
		}
		a, err := hook.Status(flags.Arg(0))
		return tell(stdout, a, err)
	}
	fmt.Fprint(stderr, usage)
	return fmt.Errorf("command %q: no such thing", args[0])
}

func tell(w io.Writer, a share.Answer, err error) error {
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(a)
}

func link(path string) error {
	bundle, err := share.Link()
	if err != nil {
		return err
	}
	return os.WriteFile(path, bundle, 0o644)
}

// serve holds the Guard until ctx ends; what is bound stays in force after it.
func serve(ctx context.Context, s settings, stdout io.Writer) (err error) {
	if syscall.Gettid() != syscall.Getpid() {
		return syscall.Exec("/proc/self/exe", os.Args, os.Environ()) // another try
	}
	if err := share.Supported(os.DirFS("/")); err != nil {
		return err
	}
	if s.node == "" {
		if s.node, err = os.Hostname(); err != nil {
			return err
		}
	}
	bundle, err := os.ReadFile(s.bundle)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	ln, err := unixsock.Listen(filepath.Join(s.dir, "sock"))
	if err != nil {
		return err
	}
	defer ln.Close()
	if err := share.GiveUp(); err != nil {
		return err
	}
	l, err := share.Open(share.Options{Bundle: bundle, Pins: s.pins, State: filepath.Join(s.dir, "bound"), Node: s.node, Records: stdout})
	if err != nil {
		return err
	}
	return l.Run(ctx, ln)
}
