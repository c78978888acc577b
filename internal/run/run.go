// Package run starts the parts of a program together and ends them together.
//
// The first part to end ends the rest, and All returns only when every part
// has: a program that returned has no goroutine of its parts left. The package
// restarts nothing and catches no signal; that is the business of a main.
package run

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime/debug"
	"time"
)

// Task is one part of a program. Run blocks until the context ends or the part
// cannot go on.
type Task struct {
	Name string
	Run  func(context.Context) error
}

// All runs the tasks until the first of them ends, then cancels the context of
// the others and waits for them.
//
// The error names each task that failed. A task that returns nil or the
// context's own error after the context has ended did not fail; one that
// returns nil before that ended too early, and that is an error, because a
// program must not go on without one of its parts. A panic is an error of its
// task.
func All(ctx context.Context, tasks ...Task) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, len(tasks))
	for _, t := range tasks {
		go func() { ended <- t.outcome(ctx) }()
	}
	var errs []error
	for range tasks {
		errs = append(errs, <-ended)
		cancel()
	}
	return errors.Join(errs...)
}

// outcome runs the task and says what its end means.
func (t Task) outcome(ctx context.Context) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s: panic: %v\n%s", t.Name, p, debug.Stack())
		}
	}()
	err = t.Run(ctx)
	switch {
	case ctx.Err() != nil && (err == nil || errors.Is(err, ctx.Err())):
		return nil
	case err == nil:
		return fmt.Errorf("%s: ended before it was asked to", t.Name)
	}
	return fmt.Errorf("%s: %w", t.Name, err)
}

// HTTP serves srv on ln until the context ends, then gives requests under way
// the grace period before it closes their connections. It owns ln.
func HTTP(name string, srv *http.Server, ln net.Listener, grace time.Duration) Task {
	return Task{Name: name, Run: func(ctx context.Context) error {
		served := make(chan error, 1)
		go func() {
			if srv.TLSConfig != nil {
				served <- srv.ServeTLS(ln, "", "")
				return
			}
			served <- srv.Serve(ln)
		}()
		select {
		case err := <-served:
			return fmt.Errorf("serve %s: %w", ln.Addr(), err)
		case <-ctx.Done():
		}
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		err := srv.Shutdown(last)
		if err != nil { // out of grace: requests under way are cut
			err = srv.Close()
		}
		<-served
		return err
	}}
}
