package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/internal/outlog"
)

// Who runs a sandbox without containerd has no daemon that copies its streams.
// Then the shim does: a stream named attach:///PATH is served on a Unix socket,
// to any number of clients that come and go, in the frames of package admin;
// and what was written is kept in a log, if the name ends with ?log=PATH&size=N.
// The same name stands for all streams of a process. With wait=1 the process
// starts when the first client is there, so that it misses nothing.

const (
	attachScheme  = "attach:"
	maxAttached   = 16
	defaultLogMax = 16 << 20
)

// hub joins a process with who is attached to it.
type hub struct {
	ln    *net.UnixListener
	log   *outlog.Writer // nil: nothing is kept
	in    *io.PipeReader
	write *io.PipeWriter
	wg    sync.WaitGroup

	mu      sync.Mutex
	outputs int // that have not ended
	clients map[net.Conn]struct{}
	first   chan struct{} // closed when somebody has come; nil if nobody waits
	closed  bool
}

// openHub serves a name for a number of outputs.
func openHub(ctx context.Context, name string, outputs int) (*hub, error) {
	h, err := serveHub(name, outputs)
	if err != nil || h.first == nil {
		return h, err
	}
	select {
	case <-h.first:
		return h, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-time.After(fifoTime):
		err = fmt.Errorf("nobody attaches within %v", fifoTime)
	}
	h.close()
	return nil, fmt.Errorf("open streams: %w", err)
}

func serveHub(name string, outputs int) (h *hub, err error) {
	u, err := url.Parse(name)
	if err != nil || u.Host != "" || !filepath.IsAbs(u.Path) {
		return nil, fmt.Errorf("open streams %.256q: want attach:///PATH", name)
	}
	h = &hub{outputs: outputs, clients: map[net.Conn]struct{}{}}
	h.in, h.write = io.Pipe()
	if u.Query().Get("wait") != "" {
		h.first = make(chan struct{})
	}
	come := h.first
	if log := u.Query().Get("log"); log != "" {
		size := int64(defaultLogMax)
		if s := u.Query().Get("size"); s != "" {
			if size, err = strconv.ParseInt(s, 10, 64); err != nil {
				return nil, fmt.Errorf("open streams %.256q: size %.64q: want a number of bytes", name, s)
			}
		}
		if h.log, err = outlog.Open(log, size); err != nil {
			return nil, fmt.Errorf("open streams: %w", err)
		}
	}
	if err := os.Remove(u.Path); err != nil && !errors.Is(err, os.ErrNotExist) { // of a shim that was killed
		return nil, errors.Join(fmt.Errorf("open streams: %w", err), h.closeLog())
	}
	if h.ln, err = net.ListenUnix("unix", &net.UnixAddr{Name: u.Path, Net: "unix"}); err != nil {
		return nil, errors.Join(fmt.Errorf("open streams: %w", err), h.closeLog())
	}
	if err := os.Chmod(u.Path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("open streams: %w", err), h.ln.Close(), h.closeLog())
	}
	h.wg.Go(func() { h.accept(come) })
	return h, nil
}

func (h *hub) closeLog() error {
	if h.log == nil {
		return nil
	}
	return h.log.Close()
}

// accept takes clients; come is closed with the first, if it is not nil.
func (h *hub) accept(come chan struct{}) {
	for {
		conn, err := h.ln.Accept()
		if err != nil {
			return // closed
		}
		h.mu.Lock()
		if h.closed || h.outputs == 0 || len(h.clients) >= maxAttached {
			h.mu.Unlock()
			conn.Close()
			continue
		}
		h.clients[conn] = struct{}{}
		// An empty frame says that from here on nothing is missed. A socket
		// that is new takes it at once.
		_ = admin.WriteFrame(conn, admin.FrameStdout, nil)
		h.wg.Go(func() { h.listen(conn) })
		h.mu.Unlock()
		if come != nil {
			close(come)
			come = nil
		}
	}
}

// listen hands on what a client types, until it leaves.
func (h *hub) listen(conn net.Conn) {
	defer h.drop(conn)
	for {
		kind, payload, err := admin.ReadFrame(conn)
		if err != nil {
			return
		}
		switch {
		case kind != admin.FrameStdin:
			return // it speaks something else
		case len(payload) == 0:
			_ = h.write.Close() // never fails
		default:
			_, _ = h.write.Write(payload) // a process that reads no more is no fault
		}
	}
}

func (h *hub) drop(conn net.Conn) {
	h.mu.Lock()
	delete(h.clients, conn)
	h.mu.Unlock()
	_ = conn.Close()
}

// tell gives bytes to the log and to all clients. One that reads slowly slows
// the process, as a pipe would; one that is gone does not.
func (h *hub) tell(kind byte, p []byte) {
	if h.log != nil {
		stream := outlog.Stdout
		if kind == admin.FrameStderr {
			stream = outlog.Stderr
		}
		_ = h.log.Write(stream, p) // a full disk must not end the process
	}
	h.mu.Lock()
	to := make([]net.Conn, 0, len(h.clients))
	for c := range h.clients {
		to = append(to, c)
	}
	h.mu.Unlock()
	for _, c := range to {
		for rest := p; len(rest) > 0; {
			n := min(len(rest), admin.MaxFrame)
			if admin.WriteFrame(c, kind, rest[:n]) != nil {
				_ = c.Close() // its listener drops it
				break
			}
			rest = rest[n:]
		}
	}
}

// output is one stream of the process.
func (h *hub) output(kind byte) io.WriteCloser { return &hubOutput{hub: h, kind: kind} }

type hubOutput struct {
	hub  *hub
	kind byte
	once sync.Once
}

// Write never fails: a process does not depend on who watches it.
func (o *hubOutput) Write(p []byte) (int, error) {
	o.hub.tell(o.kind, p)
	return len(p), nil
}

// Close ends the stream. With the last of a process its clients go.
func (o *hubOutput) Close() error {
	o.once.Do(func() {
		o.hub.mu.Lock()
		o.hub.outputs--
		last := o.hub.outputs == 0
		o.hub.mu.Unlock()
		if last {
			o.hub.close()
		}
	})
	return nil
}

// endInput says that nobody will type any more.
func (h *hub) endInput() { _ = h.write.Close() } // never fails

// close ends everything. It may be called again.
func (h *hub) close() {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return
	}
	h.closed = true
	clients := h.clients
	h.clients = map[net.Conn]struct{}{}
	h.mu.Unlock()
	_ = h.ln.Close()
	for c := range clients {
		_ = c.Close()
	}
	_ = h.in.Close()
	_ = h.write.Close()
	h.wg.Wait()
	_ = h.closeLog()
}

func attached(name string) bool { return strings.HasPrefix(name, attachScheme) }
