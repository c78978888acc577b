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

	"hauberk.dev/internal/overdue"
	"hauberk.dev/internal/unixsock"
	proxy "hauberk.dev/mesh/alone"
	"hauberk.dev/mesh/nginxconf"
)

// alone serves a file until ctx ends. SIGHUP reads the file again: one that is
// wrong changes nothing, and the log says why. With door another process may take
// this one's place there; with take this one takes that of another, and with both it
// does so if there is one.
func alone(ctx context.Context, path, door, take string, stderr io.Writer) error {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	c, err := proxy.Load(path)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	p, next, err := opened(ctx, c, door, take, log)
	if err != nil {
		return err
	}
	for _, l := range c.Listeners {
		log.Info("listening", "listener", l.Name, "address", p.Address(l.Name))
	}
	tellSupervisor(log)
	inTime := overdue.Tell(ctx, p.Patience()+endTime, func(stacks []byte) {
		fmt.Fprintf(stderr, "hauberk-mesh: not ended %v after it was asked to; all goroutines:\n%s\n", p.Patience()+endTime, stacks)
		os.Exit(1)
	})
	defer inTime()
	done := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-hangup:
				reload(p, path, log)
			case <-done:
				return
			}
		}
	}()
	giving, stop := context.WithCancel(ctx)
	given := make(chan error, 1)
	go func() {
		if next == nil {
			given <- nil
			return
		}
		given <- p.GiveOver(giving, next)
	}()
	err = p.Run(ctx)
	stop()
	close(done)
	<-ended
	return errors.Join(err, <-given)
}

// opened is a proxy with its sockets, its own or those of the process whose place it
// takes, and the socket where the next asks.
func opened(ctx context.Context, c *proxy.Config, door, take string, log *slog.Logger) (p *proxy.Proxy, next *net.UnixListener, err error) {
	if take != "" && (door == "" || somebody(take)) {
		return proxy.TakeOver(ctx, take, c, log)
	}
	if door != "" {
		if next, err = unixsock.Listen(door); err != nil {
			return nil, nil, err
		}
	}
	if p, err = proxy.Open(c, log); err != nil && next != nil {
		next.Close()
	}
	return p, next, err
}

func reload(p *proxy.Proxy, path string, log *slog.Logger) {
	c, err := proxy.Load(path)
	if err == nil {
		err = p.Reload(c)
	} else {
		p.Refused()
	}
	if err != nil {
		log.Error("reload refused: the old configuration stays", "file", path, "err", err)
		return
	}
	log.Info("reloaded", "file", path)
}

// check says everything that is wrong with a file.
func check(args []string, stderr io.Writer) error {
	if len(args) != 1 {
		return errors.New("check takes one file: hauberk-mesh check proxy.yaml")
	}
	_, err := proxy.Load(args[0])
	var faults *proxy.Faults
	if errors.As(err, &faults) {
		fmt.Fprintln(stderr, err)
		return fmt.Errorf("%s: %d faults", args[0], len(faults.All))
	}
	return err
}

// convert writes proxy.yaml for an nginx.conf. What cannot be converted is said by
// line, and refused unless part of it is asked for.
func convert(args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("hauberk-mesh convert", flag.ContinueOnError)
	flags.SetOutput(stderr)
	partial := flags.Bool("partial", false, "leave out what cannot be converted")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("convert takes one file: hauberk-mesh convert [--partial] nginx.conf")
	}
	text, err := os.ReadFile(flags.Arg(0))
	if err != nil {
		return err
	}
	yaml, problems, err := nginxconf.Convert(string(text))
	if err != nil {
		return err
	}
	for _, p := range problems {
		fmt.Fprintf(stderr, "%s: %s\n", flags.Arg(0), p)
	}
	if len(problems) > 0 && !*partial {
		return fmt.Errorf("%d lines of %s cannot be converted; --partial leaves them out", len(problems), flags.Arg(0))
	}
	_, err = io.WriteString(stdout, yaml)
	return err
}
