package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"hauberk.dev/internal/outlog"
	"hauberk.dev/shim/client"
)

// Stdio is what a process reads and writes. A nil In sends nothing and keeps
// the process's input open, a nil writer drops what comes.
type Stdio struct {
	In       io.Reader
	Out, Err io.Writer
}

// Stream is a connection to the streams of a process.
type Stream struct {
	conn *client.Stream
}

// Attach connects to the first process: from then on none of its output is
// missed. Several may be attached at once; one that does not read slows the
// process down.
func (b *Sandbox) Attach(ctx context.Context) (*Stream, error) {
	if !b.exists() {
		return nil, fmt.Errorf("attach to %s: %w", b.id, ErrNotFound)
	}
	s, err := client.Attach(ctx, b.socket(), false)
	if errors.Is(err, client.ErrGone) {
		return nil, fmt.Errorf("attach to %s: %w", b.id, ErrNotRunning)
	}
	if err != nil {
		return nil, fmt.Errorf("attach to %s: %w", b.id, err)
	}
	return &Stream{s}, nil
}

// Run copies until the process's output ends, ctx does, or reading In fails.
// Reading In may go on for as long as In does not return.
func (s *Stream) Run(ctx context.Context, std Stdio) error {
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	typed := make(chan error, 1)
	if std.In != nil {
		go func() {
			if err := s.conn.Send(std.In); err != nil {
				typed <- err
			}
		}()
	}
	read := make(chan error, 1)
	go func() { read <- s.conn.Receive(std.Out, std.Err) }()
	var err error
	select {
	case err = <-read:
	case err = <-typed:
		s.Close()
		<-read
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// Close hangs up; the process goes on.
func (s *Stream) Close() error { return s.conn.Close() }

// LogOptions choose what of a sandbox's output is shown.
type LogOptions struct {
	// Tail is how many lines to begin with; negative is all.
	Tail int
	// Since leaves out what is older.
	Since time.Time
	// Follow goes on until the sandbox has ended.
	Follow bool
	// Timestamps puts its time before each line.
	Timestamps bool
}

// Logs copies what the first process has written and is kept: 16 MiB at least.
func (b *Sandbox) Logs(ctx context.Context, o LogOptions, out, errs io.Writer) error {
	if !b.exists() {
		return fmt.Errorf("read logs of %s: %w", b.id, ErrNotFound)
	}
	read := outlog.Options{Tail: o.Tail, Since: o.Since, Follow: o.Follow}
	if o.Follow {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		read.Ended = b.quiet(ctx)
	}
	fresh := map[io.Writer]bool{out: true, errs: true}
	err := outlog.Read(ctx, b.log(), read, func(l outlog.Line) error {
		w := out
		if l.Stream == outlog.Stderr {
			w = errs
		}
		text := l.Text
		if o.Timestamps && fresh[w] {
			text = append([]byte(l.At.Format("2006-01-02T15:04:05.000000000Z07:00 ")), text...)
		}
		fresh[w] = len(l.Text) > 0 && l.Text[len(l.Text)-1] == '\n'
		_, err := w.Write(text)
		return err
	})
	if err != nil {
		return fmt.Errorf("read logs of %s: %w", b.id, err)
	}
	return nil
}

// quiet is closed once the first process writes no more.
func (b *Sandbox) quiet(ctx context.Context) <-chan struct{} {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s, err := b.Attach(ctx)
		if err != nil {
			return // it has ended
		}
		_ = s.Run(ctx, Stdio{}) // however it ends, it has
		_ = s.Close()
	}()
	return ended
}

// Resize sets the size of the first process's terminal.
func (b *Sandbox) Resize(ctx context.Context, rows, cols uint16) error {
	return b.with(ctx, "resize", func(s *client.Shim) error { return s.Resize(ctx, b.id, "", rows, cols) })
}
