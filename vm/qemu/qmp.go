package qemu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds on what QEMU may say. A guest that has broken it speaks with its
// mouth.
const (
	maxLine      = 16 << 10
	maxSaid      = 256 // of a text that ends in an error
	callDeadline = 10 * time.Second
)

var errHungUp = errors.New("monitor hung up")

// RefusedError is QEMU's refusal of a command.
type RefusedError struct {
	Command string
	Class   string // as QEMU says; not to be trusted, as Text
	Text    string
}

func (e *RefusedError) Error() string { return fmt.Sprintf("ask QEMU to %s: %q", e.Command, e.Text) }

// message is one line of QEMU's.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Event    string          `json:"event"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	ID uint64 `json:"id"`
}

// parseMessage reads one line. It is a greeting, an event, a result or an
// error, and only one of them.
func parseMessage(line []byte) (message, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("%w in %q", err, clip(string(line)))
	}
	kinds := 0
	for _, is := range []bool{m.Greeting != nil, m.Event != "", m.Return != nil, m.Error != nil} {
		if is {
			kinds++
		}
	}
	if kinds != 1 {
		return message{}, fmt.Errorf("no message: %q", clip(string(line)))
	}
	return m, nil
}

func clip(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxSaid)], "?") }

// monitor speaks QMP, QEMU's control protocol: one command at a time. Events
// are read and dropped, so that QEMU never has to keep them.
type monitor struct {
	conn    *net.UnixConn
	replies chan message  // at most one is asked for
	done    chan struct{} // closed when the reader has ended
	err     error         // why, once done is closed

	plugging sync.Mutex // held while a device changes

	mu   sync.Mutex // held while a command is under way
	last uint64
}

// openMonitor takes a connection, which is the monitor's from then on, and
// waits for QEMU's greeting.
func openMonitor(ctx context.Context, conn *net.UnixConn) (*monitor, error) {
	m := &monitor{conn: conn, replies: make(chan message, 1), done: make(chan struct{})}
	go m.read()
	ctx, cancel := context.WithTimeout(ctx, callDeadline)
	defer cancel()
	hello, err := m.next(ctx)
	if err == nil && hello.Greeting == nil {
		err = errors.New("it does not begin with a greeting")
	}
	if err == nil {
		err = m.execute(ctx, "qmp_capabilities", nil, nil)
	}
	if err != nil {
		m.Close()
		return nil, fmt.Errorf("greet QEMU: %w", err)
	}
	return m, nil
}

// Close ends the connection.
func (m *monitor) Close() error {
	err := m.conn.Close()
	<-m.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (m *monitor) read() {
	defer close(m.done)
	defer m.conn.Close()
	m.err = m.hear(m.conn)
}

// hear passes on what is not an event, until the stream ends or breaks.
func (m *monitor) hear(r io.Reader) error {
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 0, 1024), maxLine)
	for sc.Scan() {
		if len(bytes.TrimSpace(sc.Bytes())) == 0 {
			continue
		}
		msg, err := parseMessage(sc.Bytes())
		if err != nil {
			return fmt.Errorf("hear QEMU: %w", err)
		}
		if msg.Event != "" {
			continue
		}
		select {
		case m.replies <- msg:
		default:
			return errors.New("hear QEMU: more replies than commands")
		}
	}
	// One that is killed before it has read what it was asked resets.
	if err := sc.Err(); err != nil && !errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("hear QEMU: %w", err)
	}
	return errHungUp
}

func (m *monitor) next(ctx context.Context) (message, error) {
	select {
	case msg := <-m.replies:
		return msg, nil
	default:
	}
	select {
	case msg := <-m.replies:
		return msg, nil
	case <-m.done:
		select {
		case msg := <-m.replies: // its last words
			return msg, nil
		default:
			return message{}, m.err
		}
	case <-ctx.Done():
		// The reply may still come and would be taken for the next one's.
		m.conn.Close()
		return message{}, context.Cause(ctx)
	}
}

// execute runs one command and unpacks what it returns. Files go along. A
// command that is given up ends the connection.
func (m *monitor) execute(ctx context.Context, command string, arguments, result any, files ...*os.File) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, callDeadline)
	defer cancel()
	m.last++
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, m.last})
	if err != nil {
		return fmt.Errorf("ask QEMU to %s: %w", command, err)
	}
	if err := m.send(ctx, append(line, '\n'), files); err != nil {
		return fmt.Errorf("ask QEMU to %s: %w", command, err)
	}
	reply, err := m.next(ctx)
	switch {
	case err != nil:
		return fmt.Errorf("ask QEMU to %s: %w", command, err)
	case reply.ID != m.last:
		m.conn.Close()
		return fmt.Errorf("ask QEMU to %s: it answered another question", command)
	case reply.Error != nil:
		return &RefusedError{Command: command, Class: clip(reply.Error.Class), Text: clip(reply.Error.Desc)}
	case result != nil:
		if err := json.Unmarshal(reply.Return, result); err != nil {
			return fmt.Errorf("ask QEMU to %s: %w", command, err)
		}
	}
	return nil
}

func (m *monitor) send(ctx context.Context, line []byte, files []*os.File) error {
	if deadline, ok := ctx.Deadline(); ok {
		if err := m.conn.SetWriteDeadline(deadline); err != nil {
			return err
		}
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	n, _, err := m.conn.WriteMsgUnix(line, rights, nil)
	if err == nil && n < len(line) {
		_, err = m.conn.Write(line[n:])
	}
	return err
}

// Pause stops the guest's processors.
func (m *monitor) Pause(ctx context.Context) error { return m.execute(ctx, "stop", nil, nil) }

// Resume lets them go on.
func (m *monitor) Resume(ctx context.Context) error { return m.execute(ctx, "cont", nil, nil) }

// status is the run state of the machine.
func (m *monitor) status(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := m.execute(ctx, "query-status", nil, &s)
	return s.Status, err
}

// await asks until the answer is yes, more and more slowly.
func await(ctx context.Context, ask func() (bool, error)) error {
	for rest := time.Millisecond; ; rest = min(rest*3/2, 20*time.Millisecond) {
		if yes, err := ask(); yes || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(rest):
		}
	}
}
