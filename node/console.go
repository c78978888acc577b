package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// logLimit bounds a workload's log file; one older file is kept beside it.
const logLimit = 4 << 20

// console keeps what a workload writes, in a file, and lets people follow it.
type console struct {
	path string

	mu      sync.Mutex
	file    *os.File
	size    int64
	changed chan struct{} // closed and replaced at every write
	ended   bool
}

func openConsole(path string) (*console, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open console: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open console: %w", err)
	}
	return &console{path: path, file: f, size: info.Size(), changed: make(chan struct{})}, nil
}

// Write never fails: a full disk costs log lines, not the workload.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return len(p), nil
	}
	if c.size+int64(len(p)) > logLimit {
		c.turnLocked()
	}
	n, _ := c.file.Write(p) // see above
	c.size += int64(n)
	close(c.changed)
	c.changed = make(chan struct{})
	return len(p), nil
}

// turnLocked begins a new file. If it cannot, the old one is cut instead.
func (c *console) turnLocked() {
	if os.Rename(c.path, c.path+".1") == nil {
		if f, err := os.OpenFile(c.path, os.O_CREATE|os.O_TRUNC|os.O_APPEND|os.O_WRONLY, 0o600); err == nil {
			c.file.Close()
			c.file, c.size = f, 0
			return
		}
		os.Rename(c.path+".1", c.path)
	}
	if c.file.Truncate(0) == nil {
		c.size = 0
	}
}

// close ends the console and everybody who follows it.
func (c *console) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return nil
	}
	c.ended = true
	close(c.changed)
	return c.file.Close()
}

// copyTo writes the log to w; with follow, until ctx ends or the console does.
// A follower that is slower than the log is turned twice misses what was turned.
func (c *console) copyTo(ctx context.Context, w io.Writer, follow bool) error {
	f, err := c.reader()
	if err != nil {
		return err
	}
	defer func() { f.Close() }()
	for {
		c.mu.Lock()
		changed, ended := c.changed, c.ended
		c.mu.Unlock()
		if _, err := io.Copy(w, f); err != nil {
			return fmt.Errorf("read console: %w", err)
		}
		if !follow {
			return nil
		}
		now, err := c.reopened(f)
		if err != nil {
			return err
		}
		if now != nil {
			_, err := io.Copy(w, f) // what was written before the turn
			f.Close()
			f = now
			if err != nil {
				return fmt.Errorf("read console: %w", err)
			}
			continue // what the new file has is not waited for
		}
		if ended {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// reader opens the log. Under the lock: in the middle of a turn there is none.
func (c *console) reader() (*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f, err := os.Open(c.path)
	if err != nil {
		return nil, fmt.Errorf("read console: %w", err)
	}
	return f, nil
}

// reopened returns the file now at the path if f is not it any more, or was cut.
func (c *console) reopened(f *os.File) (*os.File, error) {
	now, err := c.reader()
	if err != nil {
		return nil, err
	}
	a, errA := f.Stat()
	b, errB := now.Stat()
	at, errC := f.Seek(0, io.SeekCurrent)
	if err := errors.Join(errA, errB, errC); err != nil {
		now.Close()
		return nil, fmt.Errorf("read console: %w", err)
	}
	if os.SameFile(a, b) && at <= b.Size() {
		now.Close()
		return nil, nil
	}
	return now, nil
}
