package alone

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Bounds of what the access log may cost.
const (
	logBuffer = 1 << 20 // bytes waiting; what comes then is dropped and counted
	logEvery  = time.Second
)

// accessLog notes requests. Nobody waits for the disk: lines are gathered and
// written by one goroutine, and dropped where it does not keep up.
type accessLog struct {
	json    bool
	w       io.WriteCloser
	dropped atomic.Uint64

	mu      sync.Mutex
	pending []byte
	spare   []byte
	wake    chan struct{}
	stop    chan struct{}
	done    chan struct{}
}

type keepOpen struct{ io.Writer }

func (keepOpen) Close() error { return nil }

// openLog opens the log; nil means none.
func openLog(c AccessLog) (*accessLog, error) {
	if c.Path == "" {
		return nil, nil
	}
	var w io.WriteCloser = keepOpen{os.Stdout}
	if c.Path != "-" {
		// Without O_NONBLOCK a FIFO that nobody reads would keep the reload for ever.
		f, err := os.OpenFile(c.Path, os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_NONBLOCK, 0o640)
		if errors.Is(err, syscall.ENXIO) {
			return nil, fmt.Errorf("access_log.path: %q is a FIFO that nobody reads; start its reader first", c.Path)
		}
		if err != nil {
			return nil, fmt.Errorf("open access log: %w", err)
		}
		w = f
	}
	l := &accessLog{json: c.Format == "json", w: w, wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	go l.run()
	return l, nil
}

func (l *accessLog) add(line []byte) {
	l.mu.Lock()
	if len(l.pending)+len(line) > logBuffer {
		l.mu.Unlock()
		l.dropped.Add(1)
		return
	}
	l.pending = append(l.pending, line...)
	half := len(l.pending) > logBuffer/2
	l.mu.Unlock()
	if half {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}

func (l *accessLog) run() {
	defer close(l.done)
	tick := time.NewTicker(logEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-l.wake:
		case <-l.stop:
			l.write()
			l.w.Close()
			return
		}
		l.write()
	}
}

func (l *accessLog) write() {
	l.mu.Lock()
	b := l.pending
	l.pending = l.spare[:0]
	l.mu.Unlock()
	if len(b) > 0 {
		l.w.Write(b) // a full disk stops no request
	}
	l.mu.Lock()
	l.spare = b[:0]
	l.mu.Unlock()
}

// close writes what there is, unless nobody takes it: a reload, or the last request of
// the configuration before, does not wait for who reads a pipe.
func (l *accessLog) close() {
	close(l.stop)
	late := time.NewTimer(logEvery)
	defer late.Stop()
	select {
	case <-l.done:
	case <-late.C:
		l.w.Close() // which ends the writing, but to the standard output
	}
}
