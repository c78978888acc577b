package client_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/client"
)

// serve answers on a Unix socket as a control plane would.
func serve(t *testing.T, h http.Handler) *client.Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "admin.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h)
	srv.Listener.Close()
	srv.Listener = ln
	srv.Start()
	t.Cleanup(srv.Close)
	return client.New(socket)
}

func TestQuestions(t *testing.T) {
	var asked string
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		asked = strings.TrimSpace(r.Method + " " + r.URL.RequestURI() + " " + string(body))
		switch {
		case strings.HasPrefix(r.URL.Path, admin.PathStatus), strings.HasPrefix(r.URL.Path, admin.PathWhy), r.URL.Path == admin.PathRelease:
			io.WriteString(w, "{}")
		default:
			io.WriteString(w, "[]")
		}
	}))
	for _, q := range []struct {
		name string
		ask  func(context.Context) error
		want string
	}{
		{"status", func(ctx context.Context) error { _, err := c.Status(ctx); return err }, "GET /v1/status"},
		{"instances of all", func(ctx context.Context) error { _, err := c.Instances(ctx, ""); return err }, "GET /v1/instances"},
		{"instances", func(ctx context.Context) error { _, err := c.Instances(ctx, "bank"); return err }, "GET /v1/instances?namespace=bank"},
		{"incidents", func(ctx context.Context) error { _, err := c.Incidents(ctx, "bank"); return err }, "GET /v1/incidents?namespace=bank"},
		{"why", func(ctx context.Context) error { _, err := c.Why(ctx, "bank", "a&b"); return err }, "GET /v1/why?namespace=bank&subject=a%26b"},
		{"apply", func(ctx context.Context) error { _, err := c.Apply(ctx, []byte("kind: X")); return err }, "POST /v1/apply kind: X"},
		{"delete", func(ctx context.Context) error { _, err := c.Delete(ctx, []byte("kind: X")); return err }, "POST /v1/delete kind: X"},
		{"release", func(ctx context.Context) error {
			_, err := c.Release(ctx, "bank", "pay", "bank/web:1", strings.NewReader("tar"))
			return err
		}, "POST /v1/release?application=pay&image=bank%2Fweb%3A1&namespace=bank tar"},
		{"restart", func(ctx context.Context) error { return c.Restart(ctx, "bank", "web") }, "POST /v1/restart?namespace=bank&workload=web"},
		{"ledger", func(ctx context.Context) error { _, err := c.Ledger(ctx, 7, 2); return err }, "GET /v1/ledger?from=7&limit=2"},
		{"logs", func(ctx context.Context) error {
			r, err := c.Logs(ctx, "bank", "web", "", true)
			if err == nil {
				r.Close()
			}
			return err
		}, "GET /v1/logs?follow=true&namespace=bank&workload=web"},
	} {
		if err := q.ask(t.Context()); err != nil {
			t.Errorf("%s: %v", q.name, err)
		}
		if asked != q.want {
			t.Errorf("%s: asked %q, want %q", q.name, asked, q.want)
		}
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer http.HandlerFunc
		want   string
		refuse bool // the error is the control plane's own
	}{
		{"its own words", func(w http.ResponseWriter, _ *http.Request) { refuse(w, "NotReleased", "no release", "release it") }, "no release", true},
		{"a proxy's words", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "bad\x1b[2Jgateway", http.StatusBadGateway)
		}, `502 Bad Gateway: "bad\x1b[2Jgateway"`, false},
		{"no JSON", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }, "read answer to /v1/status", false},
		{"cut off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "{")
		}, "read answer to /v1/status: unexpected EOF", false},
		{"endless", func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i < 80; i++ {
				if _, err := w.Write(bytes.Repeat([]byte(" "), 1<<20)); err != nil {
					return
				}
			}
		}, "more than", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := serve(t, c.answer).Status(t.Context())
			var refused *admin.Error
			if err == nil || !strings.Contains(err.Error(), c.want) || errors.As(err, &refused) != c.refuse {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
}

func refuse(w http.ResponseWriter, reason, message, fix string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusForbidden)
	json.NewEncoder(w).Encode(admin.Error{Reason: reason, Message: message, Fix: fix})
}

func TestNothingListens(t *testing.T) {
	dir := t.TempDir()
	if _, err := client.New(filepath.Join(dir, "absent.sock")).Status(t.Context()); !errors.Is(err, client.ErrNotRunning) {
		t.Errorf("absent socket: %v", err)
	}
	stale := filepath.Join(dir, "stale.sock")
	ln, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close()
	if _, err := client.New(stale).Exec(t.Context(), admin.Exec{}, client.Stdio{}); !errors.Is(err, client.ErrNotRunning) {
		t.Errorf("stale socket: %v", err)
	}
}

// sandbox answers an exec with a script of frames once it has seen the end of
// standard input.
func sandbox(t *testing.T, script func(frame func(kind byte, payload []byte), in string, sizes []client.Size, raw io.Writer)) *client.Client {
	return serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != admin.StreamProtocol || r.URL.Path != admin.PathExec {
			refuse(w, "BadRequest", "no upgrade", "")
			return
		}
		var ask admin.Exec
		if err := json.NewDecoder(r.Body).Decode(&ask); err != nil || len(ask.Args) == 0 {
			refuse(w, "BadRequest", "args: none", "name a command")
			return
		}
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+admin.StreamProtocol+"\r\n\r\n")
		in, sizes := "", []client.Size{{Rows: ask.Rows, Cols: ask.Cols}}
		for {
			kind, payload, err := admin.ReadFrame(buf)
			if err != nil {
				return
			}
			if kind == admin.FrameResize {
				sizes = append(sizes, client.Size{Rows: binary.BigEndian.Uint16(payload), Cols: binary.BigEndian.Uint16(payload[2:])})
				continue
			}
			if len(payload) == 0 {
				break
			}
			in += string(payload)
		}
		script(func(kind byte, payload []byte) { _ = admin.WriteFrame(conn, kind, payload) }, in, sizes, conn)
	}))
}

func TestExec(t *testing.T) {
	c := sandbox(t, func(frame func(byte, []byte), in string, sizes []client.Size, _ io.Writer) {
		frame(admin.FrameStdout, []byte("out:"+in))
		frame(admin.FrameStderr, []byte("err"))
		frame(admin.FrameExit, binary.BigEndian.AppendUint32(nil, uint32(0xffffffff)))
	})
	var out, errs bytes.Buffer
	code, err := c.Exec(t.Context(), admin.Exec{Args: []string{"cat"}}, client.Stdio{In: strings.NewReader("hello"), Out: &out, Err: &errs})
	if err != nil || code != -1 || out.String() != "out:hello" || errs.String() != "err" {
		t.Errorf("code %d, %v, out %q, err %q", code, err, &out, &errs)
	}
}

func TestExecResizes(t *testing.T) {
	got := make(chan []client.Size, 1)
	c := sandbox(t, func(frame func(byte, []byte), _ string, sizes []client.Size, _ io.Writer) {
		got <- sizes
		frame(admin.FrameExit, make([]byte, 4))
	})
	sizes, in := make(chan client.Size), newGate()
	go func() { sizes <- client.Size{Rows: 40, Cols: 120}; sizes <- client.Size{}; in.open() }()
	if _, err := c.Exec(t.Context(), admin.Exec{Args: []string{"sh"}, TTY: true, Rows: 24, Cols: 80}, client.Stdio{In: in, Resize: sizes}); err != nil {
		t.Fatal(err)
	}
	s := <-got
	if len(s) < 2 || s[0] != (client.Size{Rows: 24, Cols: 80}) || s[1] != (client.Size{Rows: 40, Cols: 120}) {
		t.Errorf("sizes are %v", s)
	}
}

// gate is an input that ends when it is opened.
type gate struct{ opened chan struct{} }

func newGate() gate                       { return gate{make(chan struct{})} }
func (g gate) open()                      { close(g.opened) }
func (g gate) Read(p []byte) (int, error) { <-g.opened; return 0, io.EOF }

func TestExecEnds(t *testing.T) {
	for _, c := range []struct {
		name, want string
		script     func(frame func(byte, []byte), raw io.Writer)
	}{
		{"refused inside", "contained", func(frame func(byte, []byte), _ io.Writer) {
			frame(admin.FrameError, []byte(`{"reason":"Contained","message":"the instance is contained"}`))
		}},
		{"without a word", "without an exit code", func(func(byte, []byte), io.Writer) {}},
		{"malformed code", "3 bytes", func(frame func(byte, []byte), _ io.Writer) { frame(admin.FrameExit, []byte("abc")) }},
		{"malformed error", `"no json"`, func(frame func(byte, []byte), _ io.Writer) { frame(admin.FrameError, []byte("no json")) }},
		{"not a frame", "read frame", func(_ func(byte, []byte), raw io.Writer) { io.WriteString(raw, "HTTP/1.1 400 ") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			cl := sandbox(t, func(frame func(byte, []byte), _ string, _ []client.Size, raw io.Writer) { c.script(frame, raw) })
			_, err := cl.Exec(t.Context(), admin.Exec{Args: []string{"x"}}, client.Stdio{Out: io.Discard, Err: io.Discard})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
}

func TestExecRefused(t *testing.T) {
	c := sandbox(t, nil)
	_, err := c.Exec(t.Context(), admin.Exec{}, client.Stdio{})
	var refused *admin.Error
	if !errors.As(err, &refused) || refused.Fix != "name a command" {
		t.Errorf("error is %v", err)
	}
}

func TestExecInterrupted(t *testing.T) {
	c := sandbox(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	in := newGate()
	defer in.open()
	_, err := c.Exec(ctx, admin.Exec{Args: []string{"sleep"}}, client.Stdio{In: in})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
}
