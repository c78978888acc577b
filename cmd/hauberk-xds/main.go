// Command hauberk-xds has somebody else's control plane tell a proxy what to do:
// it asks an xDS server, and hands what it says to hauberk-mesh -c over the
// proxy's admin socket. It asks a SPIFFE Workload API for the proxy's certificates
// and hands them and their keys over on another socket, from memory to memory. It
// carries no traffic; without it the proxy goes on as it is.
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

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/run"
	"hauberk.dev/internal/unixsock"
	"hauberk.dev/xds"
	"hauberk.dev/xds/jwks"
	"hauberk.dev/xds/workload"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := program(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "hauberk-xds:", err)
		os.Exit(1)
	}
}

func program(ctx context.Context, args []string, stderr io.Writer) error {
	if len(args) > 0 && args[0] == "check" {
		if len(args) != 2 {
			return errors.New("check takes one file: hauberk-xds check xds.yaml")
		}
		_, err := load(args[1])
		return err
	}
	flags := flag.NewFlagSet("hauberk-xds", flag.ContinueOnError)
	flags.SetOutput(stderr)
	path := flags.String("c", "", "do what this file says; see docs/xds.md")
	root := flags.Bool("allow-root", false, "run as root, for tests only")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || *path == "" {
		return errors.New("want -c xds.yaml, or check xds.yaml; see --help")
	}
	if os.Geteuid() == 0 && !*root {
		return errors.New("refuse to run as root: what reads the words of other control planes must not be; start it as the user of the proxy")
	}
	c, err := load(*path)
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make memory private: %w", err)
	}
	return serve(ctx, c, slog.New(slog.NewTextHandler(stderr, nil)))
}

// serve runs what the file asks for until ctx ends.
func serve(ctx context.Context, c *config, log *slog.Logger) error {
	var tasks []run.Task
	var all told
	keys := &keeper{log: log}
	defer keys.clear()
	if c.Server != "" {
		more, err := follow(c, &all, keys, log)
		if err != nil {
			return err
		}
		tasks = append(tasks, more...)
	}
	if c.Workload != "" {
		client, err := workload.New(workload.Options{Endpoint: c.Workload, Take: keys.takeWorkload, Log: log})
		if err != nil {
			return err
		}
		all.workload = client
		tasks = append(tasks, run.Task{Name: "workload", Run: client.Run})
	}
	for i := range c.Keys {
		f, err := fetcher(&c.Keys[i], log)
		if err != nil {
			return fmt.Errorf("keys[%d]: %w", i, err)
		}
		all.fetchers = append(all.fetchers, f)
		tasks = append(tasks, run.Task{Name: "keys of " + c.Keys[i].URL, Run: f.Run})
	}
	if c.Identities != "" {
		ln, err := unixsock.ListenStream(c.Identities)
		if err != nil {
			return err
		}
		tasks = append(tasks, run.Task{Name: "identities", Run: func(ctx context.Context) error { return keys.hub.Serve(ctx, ln, log) }})
	}
	if c.Status != "" {
		ln, err := unixsock.ListenStream(c.Status)
		if err != nil {
			return err
		}
		tasks = append(tasks, run.Task{Name: "status", Run: func(ctx context.Context) error { return tell(ctx, ln, &all) }})
	}
	return run.All(ctx, tasks...)
}

func fetcher(k *issuerKeys, log *slog.Logger) (*jwks.Fetcher, error) {
	o := k.options()
	o.Log = log
	if k.CA != "" {
		var err error
		if o.Roots, err = roots(k.CA); err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
	}
	return jwks.New(o)
}

// follow is the client of a control plane, and the watch over the proxy.
func follow(c *config, all *told, keys *keeper, log *slog.Logger) ([]run.Task, error) {
	credentials, err := c.credentials()
	if err != nil {
		return nil, err
	}
	p := newCarrier(c, log)
	if err := p.begin(); err != nil {
		return nil, err
	}
	o := c.options()
	o.Credentials, o.Log, o.Apply, o.Check = credentials, log, p.apply, p.check
	if c.Identities != "" {
		o.Secrets = keys.takeEnvoy
		o.Local = func(name string) bool {
			_, certificate := c.Secrets[name]
			_, authorities := c.Authorities[name]
			return certificate || authorities
		}
	}
	client, err := xds.New(o)
	if err != nil {
		return nil, err
	}
	all.client, all.carrier = client, p
	return []run.Task{
		{Name: "xds", Run: client.Run},
		{Name: "proxy", Run: func(ctx context.Context) error { return p.watch(ctx, client.Again) }},
	}, nil
}
