// Package flock lets one process at a time pass. The kernel frees a lock with
// the file that holds it, so a process that dies holds none.
package flock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const again = 5 * time.Millisecond

// Take waits for the lock of a file, which is made if it is missing, until ctx
// ends.
func Take(ctx context.Context, path string) (release func(), err error) {
	for {
		release, err := Try(path)
		if err != nil || release != nil {
			return release, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lock %s: %w", path, context.Cause(ctx))
		case <-time.After(again):
		}
	}
}

// Hold is Take for who hands the lock on: a process that inherits the file holds
// the lock too. Closing the file releases it.
func Hold(ctx context.Context, path string) (*os.File, error) {
	for {
		f, err := try(path)
		if err != nil || f != nil {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lock %s: %w", path, context.Cause(ctx))
		case <-time.After(again):
		}
	}
}

// Try takes the lock of a file if nobody has it; else release is nil.
func Try(path string) (release func(), err error) {
	f, err := try(path)
	if f == nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

func try(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case err == nil:
		return f, nil
	case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, unix.EINTR):
		return nil, f.Close()
	}
	return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
}
