// Package overdue lets a program that does not end in time say why: what each of its
// goroutines is doing.
//
// It ends nothing; that is for whoever is told.
package overdue

import (
	"context"
	"runtime"
	"sync"
	"time"
)

// Tell passes tell what every goroutine is doing, patience after ctx has ended,
// unless the returned stop was called before. stop waits until tell has returned
// or will not be called.
func Tell(ctx context.Context, patience time.Duration, tell func(stacks []byte)) (stop func()) {
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-ctx.Done():
		case <-over:
			return
		}
		select {
		case <-time.After(patience):
			tell(stacks())
		case <-over:
		}
	}()
	return sync.OnceFunc(func() { close(over); <-done })
}

// stacks of all goroutines, up to a megabyte of them.
func stacks() []byte {
	b := make([]byte, 1<<20)
	return b[:runtime.Stack(b, true)]
}
