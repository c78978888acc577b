// Package outlog keeps what a process writes: lines in the format that
// Kubernetes reads, in one bounded file and the one before it.
//
// A line is "TIME STREAM F TEXT"; P in place of F says that the text goes on in
// the next line, so that bytes come back as they were written. It does not
// decide how long a log is kept.
package outlog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The streams.
const (
	Stdout = "stdout"
	Stderr = "stderr"
)

// maxText is how much of what was written one line holds.
const maxText = 16 << 10

// before is what is added to the name of the file that was full.
const before = ".1"

// Writer appends to a log. It may be used by several goroutines.
type Writer struct {
	path string
	most int64
	now  func() time.Time

	mu   sync.Mutex
	file *os.File
	size int64
}

// Open opens a log to append to it. Of what is written, the last most bytes at
// least, and at most twice that, are kept.
func Open(path string, most int64) (*Writer, error) {
	if most <= 0 {
		return nil, fmt.Errorf("open log %s: a size of %d bytes", path, most)
	}
	w := &Writer{path: path, most: most, now: time.Now}
	return w, w.open()
}

func (w *Writer) open() error {
	f, err := os.OpenFile(w.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		return errors.Join(fmt.Errorf("open log: %w", err), f.Close())
	}
	w.file, w.size = f, st.Size()
	return nil
}

// Write keeps bytes of a stream.
func (w *Writer) Write(stream string, p []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return fmt.Errorf("write log %s: %w", w.path, os.ErrClosed)
	}
	var out []byte
	at := w.now().UTC().Format(time.RFC3339Nano)
	for len(p) > 0 {
		text, tag := p[:min(len(p), maxText)], byte('P')
		if i := bytes.IndexByte(text, '\n'); i >= 0 {
			text, tag = text[:i], 'F'
			p = p[i+1:]
		} else {
			p = p[len(text):]
		}
		out = fmt.Appendf(out, "%s %s %c ", at, stream, tag)
		out = append(append(out, text...), '\n')
	}
	if w.size > 0 && w.size+int64(len(out)) > w.most {
		if err := w.rotateLocked(); err != nil {
			return err
		}
	}
	n, err := w.file.Write(out)
	w.size += int64(n)
	if err != nil {
		return fmt.Errorf("write log: %w", err)
	}
	return nil
}

func (w *Writer) rotateLocked() error {
	err := errors.Join(w.file.Close(), os.Rename(w.path, w.path+before))
	w.file = nil
	if err != nil {
		return fmt.Errorf("turn log over: %w", err)
	}
	return w.open()
}

// Close closes the log. It may be called again.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file = nil
	return err
}

// Remove removes a log.
func Remove(path string) error {
	var errs []error
	for _, p := range []string{path, path + before} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
