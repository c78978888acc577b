package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/term"

	"hauberk.dev/sandbox"
)

// terminal is the one that this process was started on.
type terminal struct{ file *os.File }

// openTerminal finds it. With input, standard input must be one.
func (s *session) openTerminal(input bool) (*terminal, error) {
	if in, ok := s.In.(*os.File); ok && term.IsTerminal(int(in.Fd())) {
		return &terminal{in}, nil
	}
	if input {
		return nil, errors.New("standard input is no terminal: leave -t out")
	}
	if out, ok := s.Out.(*os.File); ok && term.IsTerminal(int(out.Fd())) {
		return &terminal{out}, nil
	}
	return &terminal{}, nil // it has no size, and nothing to be set
}

// onTerminal says whether somebody watches the output.
func (s *session) onTerminal() bool {
	out, ok := s.Out.(*os.File)
	return ok && term.IsTerminal(int(out.Fd()))
}

func (t *terminal) size() (rows, cols uint16) {
	if t.file == nil {
		return 0, 0
	}
	c, r, err := term.GetSize(int(t.file.Fd()))
	if err != nil {
		return 0, 0
	}
	return clamp(r), clamp(c)
}

// raw hands every key to the sandbox, Ctrl-C among them.
func (t *terminal) raw() (restore func(), err error) {
	if t.file == nil {
		return func() {}, nil
	}
	old, err := term.MakeRaw(int(t.file.Fd()))
	if err != nil {
		return nil, fmt.Errorf("set terminal to raw mode: %w", err)
	}
	return func() { _ = term.Restore(int(t.file.Fd()), old) }, nil
}

// joined is a process that this command is joined with.
type joined struct {
	stream *sandbox.Stream
	tty    *terminal // nil: it has none
	input  bool
	keys   string
	errs   io.Writer
	kill   func(context.Context, syscall.Signal) error
	resize func(ctx context.Context, rows, cols uint16) error
	wait   func(context.Context) (int, error)
	left   string // what is said when it is left running
}

// errDetached means that the keys were typed.
var errDetached = errors.New("detached")

// join passes input, output, signals and sizes until the process ends, and
// gives its code. The terminal is set back to what it was whatever happens.
func (s *session) join(ctx context.Context, j joined) (int, error) {
	defer j.stream.Close()
	// From here on a signal is the process's, not this command's.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	std := sandbox.Stdio{Out: s.Out, Err: j.errs}
	if j.input {
		std.In = s.In
	}
	if j.tty != nil {
		keys, err := parseKeys(j.keys)
		if err != nil {
			return 0, err
		}
		if std.In != nil {
			restore, err := j.tty.raw()
			if err != nil {
				return 0, err
			}
			defer restore()
			std.In = &watched{in: std.In, keys: keys}
		}
	}
	stop := j.signals(ctx)
	defer stop()
	err := j.stream.Run(ctx, std)
	if errors.Is(err, errDetached) {
		fmt.Fprintf(j.errs, "\r\n%s\r\n", j.left)
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return j.wait(ctx)
}

// proxied are the signals that are passed on.
var proxied = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2}

// signals passes signals and sizes on until it is stopped.
func (j joined) signals(ctx context.Context) (stop func()) {
	heard := make(chan os.Signal, 16)
	signal.Notify(heard, append([]os.Signal{syscall.SIGWINCH}, proxied...)...)
	ended, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		if j.tty != nil { // it may have changed since it was asked for
			j.fit(ctx)
		}
		for {
			select {
			case <-ended:
				return
			case sig := <-heard:
				if sig == syscall.SIGWINCH {
					j.fit(ctx)
				} else if n, ok := sig.(syscall.Signal); ok {
					_ = j.kill(ctx, n) // it may have ended
				}
			}
		}
	}()
	return func() {
		signal.Stop(heard)
		close(ended)
		<-done
	}
}

func (j joined) fit(ctx context.Context) {
	if j.tty == nil {
		return
	}
	if rows, cols := j.tty.size(); rows > 0 && cols > 0 {
		_ = j.resize(ctx, rows, cols) // it may have ended
	}
}

// watched is input in which keys that detach are looked for. What could be
// their beginning is held back until the next key tells.
type watched struct {
	in   io.Reader
	keys []byte
	seen int    // of the keys
	over []byte // read, and not handed on yet
	left bool   // the keys were typed
}

func (w *watched) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(w.over) == 0 {
		if w.left {
			return 0, errDetached
		}
		buf := make([]byte, len(p))
		n, err := w.in.Read(buf)
		w.left = slices.ContainsFunc(buf[:n], w.key) // what follows is nobody's
		if w.left {
			continue
		}
		if err != nil && len(w.over) == 0 {
			return 0, err
		}
	}
	n := copy(p, w.over)
	w.over = w.over[n:]
	return n, nil
}

// key takes one key and says whether it is the last of those looked for.
func (w *watched) key(c byte) bool {
	if len(w.keys) == 0 {
		w.over = append(w.over, c)
		return false
	}
	if c == w.keys[w.seen] {
		w.seen++
		return w.seen == len(w.keys)
	}
	w.over = append(w.over, w.keys[:w.seen]...)
	w.seen = 0
	if c == w.keys[0] {
		w.seen = 1
		return false
	}
	w.over = append(w.over, c)
	return false
}

// parseKeys reads keys as docker's users write them: letters and ctrl-LETTER,
// with commas between them.
func parseKeys(s string) ([]byte, error) {
	if s == "" || s == "none" {
		return nil, nil
	}
	var out []byte
	for k := range strings.SplitSeq(s, ",") {
		c, ctrl := strings.CutPrefix(k, "ctrl-")
		i := -1
		if len(c) == 1 {
			i = bytes.IndexByte([]byte("@abcdefghijklmnopqrstuvwxyz[\\]^_"), c[0])
		}
		switch {
		case ctrl && i >= 0:
			out = append(out, byte(i))
		case !ctrl && len(k) == 1:
			out = append(out, k[0])
		default:
			return nil, fmt.Errorf("key %q: want a letter or ctrl-LETTER", k)
		}
	}
	return out, nil
}
