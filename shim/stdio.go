package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/admin"
	"hauberk.dev/vm"
)

const (
	// fifoTime is how long a client may take to open its end.
	fifoTime = 10 * time.Second
	// lastInput is how long input that is on its way has when a client says
	// there will be no more.
	lastInput = 50 * time.Millisecond
	// lastOutput is what an exec's output has when its client deletes it: a
	// child of it that lives on may hold it open for good.
	lastOutput = 2 * time.Second
	// unreadRest is between two looks at whether output was read.
	unreadRest = 2 * time.Millisecond
)

// streams are the names of a process' input and output, as containerd gives
// them; none is no stream.
type streams struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

// stdio are the files of a process on this host.
type stdio struct {
	names  streams
	output [2]*output
	hub    *hub // if the streams are attached to
	wg     sync.WaitGroup

	mu     sync.Mutex
	input  *os.File // once somebody writes
	ended  bool     // no more input
	closed bool
}

// output is where one stream of a process goes.
type output struct {
	file io.WriteCloser
	// held is the reading end of a fifo, which nobody reads: a client that
	// leaves must not end the process.
	held *os.File
}

// taken waits until a fifo's reader has taken what was written, or left, but no
// longer than ctx. Clients of containerd 1.6 close theirs as soon as they hear
// of a process' end, read or not.
func (o *output) taken(ctx context.Context) {
	if o.held == nil {
		return
	}
	_ = o.held.Close() // nothing is written any more, and a reader that left must show
	for unread(o.file) && ctx.Err() == nil {
		time.Sleep(unreadRest)
	}
}

// unread says whether a reader has yet to read something of a fifo.
func unread(w io.Writer) (waits bool) {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) {
		at := []unix.PollFd{{Fd: int32(fd)}}
		if n, err := unix.Poll(at, 0); err != nil || n > 0 && at[0].Revents&unix.POLLERR != 0 {
			return // nobody reads
		}
		n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		waits = err == nil && n > 0
	})
	return err == nil && waits
}

func (o *output) close() {
	if o == nil {
		return
	}
	_ = o.file.Close() // may be closed already
	if o.held != nil {
		_ = o.held.Close()
	}
}

// open opens the output of a process; its client must be there. What it opened
// before it failed, close closes.
func (s *stdio) open(ctx context.Context) error {
	wanted := []string{s.names.Stdout, s.names.Stderr}
	if s.names.Terminal {
		wanted[1] = "" // one stream has it all
	}
	if attached(s.names.Stdout) {
		return s.attach(ctx, wanted)
	}
	for i, name := range wanted {
		if name == "" {
			continue
		}
		o, err := openOutput(ctx, name)
		if err != nil {
			return err
		}
		s.output[i] = o
	}
	if s.names.Stdin == "" {
		return nil
	}
	_, err := streamPath("stdin", s.names.Stdin)
	return err
}

// attach opens streams that clients attach to.
func (s *stdio) attach(ctx context.Context, wanted []string) (err error) {
	for _, name := range append(wanted, s.names.Stdin) {
		if name != "" && name != s.names.Stdout {
			return fmt.Errorf("open streams %.256q: want %.256q, or none", name, s.names.Stdout)
		}
	}
	outputs := 1
	if wanted[1] != "" {
		outputs = 2
	}
	if s.hub, err = openHub(ctx, s.names.Stdout, outputs); err != nil {
		return err
	}
	s.output[0] = &output{file: s.hub.output(admin.FrameStdout)}
	if outputs == 2 {
		s.output[1] = &output{file: s.hub.output(admin.FrameStderr)}
	}
	return nil
}

// streamPath is the path that a stream's name means. A bare one is a path.
func streamPath(what, name string) (string, error) {
	if strings.HasPrefix(name, "/") {
		return name, nil
	}
	u, err := url.Parse(name)
	if err != nil || u.Scheme != "file" && u.Scheme != "fifo" || u.Path == "" || u.Host != "" {
		return "", fmt.Errorf("open %s %.256q: want a path, fifo:// or file://: no program is run for logs", what, name)
	}
	return u.Path, nil
}

// openOutput opens a fifo, waiting for its reader, or a file to append to.
func openOutput(ctx context.Context, name string) (*output, error) {
	path, err := streamPath("output", name)
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(name, "file:") {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open output: %w", err)
		}
		return &output{file: f}, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, fifoTime, fmt.Errorf("nobody reads it within %v", fifoTime))
	defer cancel()
	for {
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			held, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
			if err != nil {
				return nil, errors.Join(fmt.Errorf("open output: %w", err), f.Close())
			}
			return &output{file: f, held: held}, nil
		}
		if !errors.Is(err, unix.ENXIO) { // there is no reader
			return nil, fmt.Errorf("open output: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("open output %s: %w", path, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// run copies until the process' streams end. It returns at once.
func (s *stdio) run(p *vm.Process) {
	s.goOn(p)
	if s.names.Stdin == "" {
		ctx, cancel := context.WithTimeout(context.Background(), fifoTime)
		defer cancel()
		_ = p.CloseStdin(ctx) // it may have ended
	}
}

// goOn is run for a process that ran before: its input is as it was.
func (s *stdio) goOn(p *vm.Process) {
	for i, from := range []io.Reader{p.Stdout(), p.Stderr()} {
		o := s.output[i]
		s.wg.Go(func() {
			if o != nil {
				_, _ = io.Copy(o.file, from) // a client that is gone is no fault
				ctx, cancel := context.WithTimeout(context.Background(), lastWords)
				o.taken(ctx)
				cancel()
				o.close()
			}
			_, _ = io.Copy(io.Discard, from)
		})
	}
	if s.names.Stdin != "" {
		go s.feed(p)
	}
}

// feed copies input to the process until its client or the process ends.
func (s *stdio) feed(p *vm.Process) {
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), fifoTime)
		defer cancel()
		_ = p.CloseStdin(ctx) // it may have ended
	}()
	if s.hub != nil {
		_, _ = io.Copy(p, s.hub.in)
		_ = s.hub.in.Close() // who types on is not kept waiting
		return
	}
	path, err := streamPath("stdin", s.names.Stdin)
	if err != nil {
		return
	}
	f, err := os.OpenFile(path, os.O_RDONLY, 0) // waits for a writer; endInput gives it one
	if err != nil {
		return
	}
	defer f.Close()
	s.mu.Lock()
	s.input = f
	if s.ended {
		_ = f.SetReadDeadline(time.Now().Add(lastInput))
	}
	s.mu.Unlock()
	_, err = io.Copy(p, f)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return
	}
	// The client said it is done: what it wrote before is in the pipe.
	_ = f.SetReadDeadline(time.Time{})
	_, _ = io.Copy(p, &present{f})
}

// present reads what is there and does not wait for more.
type present struct{ file *os.File }

func (r *present) Read(b []byte) (n int, err error) {
	raw, err := r.file.SyscallConn()
	if err != nil {
		return 0, err
	}
	var inner error
	err = raw.Read(func(fd uintptr) bool {
		n, inner = unix.Read(int(fd), b)
		return true
	})
	if err != nil || inner != nil || n <= 0 {
		return 0, io.EOF
	}
	return n, nil
}

// endInput says that there will be no more input than there is.
func (s *stdio) endInput() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endInputLocked()
}

func (s *stdio) endInputLocked() {
	if s.ended || s.names.Stdin == "" {
		return
	}
	s.ended = true
	if s.hub != nil {
		s.hub.endInput()
		return
	}
	if s.input != nil {
		_ = s.input.SetReadDeadline(time.Now().Add(lastInput))
		return
	}
	// Whoever waits for a writer gets one, for a moment.
	if path, err := streamPath("stdin", s.names.Stdin); err == nil {
		if f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0); err == nil {
			_ = f.Close()
		}
	}
}

// drain waits until all output is with its readers, but no longer than that.
func (s *stdio) drain(longest time.Duration) {
	done := make(chan struct{})
	go func() { s.wg.Wait(); close(done) }()
	late := time.NewTimer(longest)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
	}
}

// close ends all copying. It may be called again.
func (s *stdio) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	s.endInputLocked()
	for _, o := range s.output {
		o.close()
	}
	if s.hub != nil {
		s.hub.close()
	}
}
