package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"sync"
	"syscall"
	"time"

	"hauberk.dev/api/admin"
)

// Stream joins a caller with a process whose streams the shim serves.
type Stream struct {
	conn net.Conn

	mu sync.Mutex // of writing
}

// Attach connects to the streams that are served under a name. From then on no
// output is missed. With wait it waits until they are.
func Attach(ctx context.Context, socket string, wait bool) (*Stream, error) {
	for {
		s, err := attach(ctx, socket)
		if err == nil || !wait || !errors.Is(err, ErrGone) {
			return s, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("attach: %w", context.Cause(ctx))
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func attach(ctx context.Context, socket string) (*Stream, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Now()) })
	defer stop()
	kind, payload, err := admin.ReadFrame(conn)
	switch {
	case ended(err):
		err = ErrGone // it has ended, or has too many clients
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err == nil && (kind != admin.FrameStdout || len(payload) > 0):
		err = fmt.Errorf("attach: greeted with frame %d of %d bytes", kind, len(payload))
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &Stream{conn: conn}, nil
}

// ended says whether an error is how a stream ends: what was sent before is
// read first, whatever its sender had left unread.
func ended(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed)
}

// Send hands on input until it ends; then the process sees its end. An error of
// the reader is returned, and the input left open. A process that has ended
// takes no input, which is no error.
func (s *Stream) Send(in io.Reader) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := in.Read(buf)
		if n > 0 && s.frame(buf[:n]) != nil {
			return nil
		}
		if errors.Is(err, io.EOF) {
			_ = s.frame(nil) // as above
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (s *Stream) frame(p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return admin.WriteFrame(s.conn, admin.FrameStdin, p)
}

// Receive copies output until it ends.
func (s *Stream) Receive(out, errs io.Writer) error {
	for {
		kind, payload, err := admin.ReadFrame(s.conn)
		if ended(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read output: %w", err)
		}
		w := out
		if kind == admin.FrameStderr {
			w = errs
		}
		if w == nil {
			continue
		}
		if _, err := w.Write(payload); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
}

// Close hangs up; the process goes on.
func (s *Stream) Close() error { return s.conn.Close() }
