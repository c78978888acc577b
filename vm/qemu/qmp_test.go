package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}` + "\n"

// pair is a connection with both ends here.
func pair(t testing.TB) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

// play is a QEMU that greets and then answers each command as told, %ID
// standing for the command's number.
func play(t testing.TB, answers ...string) *net.UnixConn {
	ours, theirs := pair(t)
	go func() {
		io.WriteString(theirs, greeting)
		sc := bufio.NewScanner(theirs)
		for _, a := range append([]string{`{"return": {}, "id": %ID}`}, answers...) {
			if !sc.Scan() {
				break
			}
			var c struct {
				ID json.Number `json:"id"`
			}
			json.Unmarshal(sc.Bytes(), &c)
			io.WriteString(theirs, strings.ReplaceAll(a, "%ID", c.ID.String())+"\n")
		}
		if len(answers) == 0 || answers[len(answers)-1] != "" {
			theirs.Close()
		}
	}()
	return ours
}

func TestMonitor(t *testing.T) {
	conn := play(t,
		`{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}`+"\n"+`{"return": {"status": "paused"}, "id": %ID}`,
		`{"error": {"class": "GenericError", "desc": "no such thing"}, "id": %ID}`)
	m, err := openMonitor(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if s, err := m.status(t.Context()); err != nil || s != "paused" {
		t.Errorf("status %q, %v", s, err)
	}
	var refused *RefusedError
	if err := m.Pause(t.Context()); !errors.As(err, &refused) || refused.Text != "no such thing" || refused.Command != "stop" {
		t.Errorf("error %v", err)
	}
	if err := m.Pause(t.Context()); err == nil {
		t.Error("a monitor that hung up obeyed")
	}
}

// TestHostileMonitor plays a QEMU that a guest has taken over.
func TestHostileMonitor(t *testing.T) {
	for name, c := range map[string]struct{ answer, says string }{
		"wrong number":    {`{"return": {}, "id": 99}`, "another question"},
		"unasked replies": {`{"return": {}, "id": %ID}` + strings.Repeat("\n"+`{"return": {}, "id": 7}`, 9), ""},
		"long line":       {`{"return": "` + strings.Repeat("x", maxLine) + `", "id": %ID}`, "too long"},
		"no JSON":         {`\x00\xff`, "invalid character"},
		"two at once":     {`{"return": {}, "event": "X", "id": %ID}`, "no message"},
		"nothing":         {`{}`, "no message"},
		"wrong type":      {`{"return": {"status": [1]}, "id": %ID}`, "cannot unmarshal"},
		"hangs up":        {`{"event": "SHUTDOWN"}`, errHungUp.Error()},
		"deep":            {strings.Repeat("[", maxLine-10), "depth"},
	} {
		m, err := openMonitor(t.Context(), play(t, c.answer))
		if err != nil {
			t.Fatal(err)
		}
		_, err = m.status(t.Context())
		if c.says == "" {
			_, err = m.status(t.Context()) // what came before it was asked counts for nothing
			c.says = "ask QEMU"
		}
		if err == nil || !strings.Contains(err.Error(), c.says) || len(err.Error()) > 600 {
			t.Errorf("%s: error %v, want one that says %q", name, err, c.says)
		}
		if err := m.Close(); err != nil {
			t.Errorf("%s: close: %v", name, err)
		}
	}
}

func TestSilentMonitor(t *testing.T) {
	ours, _ := pair(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := openMonitor(ctx, ours); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("greeting that never comes: %v", err)
	}
	m, err := openMonitor(t.Context(), play(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	late, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := m.Resume(late); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("answer that never comes: %v", err)
	}
	// An answer that comes late must not be taken for the next one's.
	if err := m.Pause(t.Context()); err == nil {
		t.Error("the monitor was used after an answer was given up")
	}
}

func FuzzQMP(f *testing.F) {
	for _, s := range []string{
		greeting, `{"return": {}, "id": 1}`, `{"event": "STOP"}`, `{"error": {"class": "x", "desc": "y"}}`,
		`{"return": {"status": "running"}, "id": 2}`, "", "{}", "\n\n", `{"QMP": null}`, `[]`, `{"id": 18446744073709551616}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		m := &monitor{replies: make(chan message, 1)}
		if err := m.hear(strings.NewReader(string(stream))); err == nil {
			t.Error("a stream ended without a reason")
		}
		select {
		case msg := <-m.replies:
			if msg.Event != "" {
				t.Error("an event was taken for a reply")
			}
		default:
		}
		if msg, err := parseMessage(stream); err == nil && msg.Error != nil {
			if r := (&RefusedError{"stop", msg.Error.Class, clip(msg.Error.Desc)}); len(r.Text) > 3*maxSaid {
				t.Errorf("error text of %d bytes", len(r.Text))
			}
		}
	})
}
