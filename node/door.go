package node

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/internal/run"
	"hauberk.dev/vm"
)

// serveDoor answers the control plane: exec and logs. Nobody else is let in.
func (n *Node) serveDoor(ctx context.Context) error {
	ln, err := net.Listen("tcp", n.conf.Door)
	if err != nil {
		return fmt.Errorf("open node door: %w: free the address or choose another --door", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+wire.PathExec, n.exec)
	mux.HandleFunc("GET "+wire.PathLogs, n.logs)
	mux.HandleFunc("GET "+wire.PathEvents, n.events)
	mux.HandleFunc("GET "+wire.PathTap, n.tap)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10}
	return run.HTTP("door", srv, tls.NewListener(ln, n.keys.serverTLS()), time.Second).Run(ctx)
}

func refuse(w http.ResponseWriter, status int, reason string, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(wire.Error{Reason: reason, Message: err.Error()}) // a peer that left is told nothing
}

func (n *Node) logs(w http.ResponseWriter, r *http.Request) {
	a, ok := n.find(r.FormValue("instance"))
	if !ok {
		refuse(w, http.StatusNotFound, "UnknownInstance", fmt.Errorf("instance %q does not run on %s", r.FormValue("instance"), n.conf.Name))
		return
	}
	c, ok := a.body.(interface{ Console() *console })
	if !ok || c.Console() == nil {
		refuse(w, http.StatusNotFound, "NoLogs", fmt.Errorf("instance %q has written nothing yet", a.id))
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	flusher := flushWriter{w, http.NewResponseController(w)}
	n.note(c.Console().copyTo(r.Context(), flusher, r.FormValue("follow") == "true"))
}

type flushWriter struct {
	io.Writer
	rc *http.ResponseController
}

func (f flushWriter) Write(p []byte) (int, error) {
	n, err := f.Writer.Write(p)
	if err != nil {
		return n, err
	}
	return n, f.rc.Flush()
}

// exec runs a process in a running instance and connects it to the stream of
// package admin.
func (n *Node) exec(w http.ResponseWriter, r *http.Request) {
	var in wire.Exec
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		refuse(w, http.StatusBadRequest, "BadRequest", fmt.Errorf("decode exec: %w", err))
		return
	}
	a, ok := n.find(in.Instance)
	if !ok {
		refuse(w, http.StatusNotFound, "UnknownInstance", fmt.Errorf("instance %q does not run on %s", in.Instance, n.conf.Name))
		return
	}
	b, ok := a.body.(*sandbox)
	if !ok || a.isFrozen() {
		refuse(w, http.StatusConflict, "Frozen", fmt.Errorf("instance %q is contained: nothing runs in it", in.Instance))
		return
	}
	p, err := b.exec(r.Context(), in)
	if err != nil {
		refuse(w, http.StatusConflict, "ExecRefused", err)
		return
	}
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		refuse(w, http.StatusInternalServerError, "NoUpgrade", err)
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Time{})
	fmt.Fprintf(buf, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: %s\r\nConnection: Upgrade\r\n\r\n", admin.StreamProtocol)
	if err := buf.Flush(); err != nil {
		n.note(fmt.Errorf("exec in %s: %w", in.Instance, err))
		return
	}
	n.note(attach(p, conn, buf.Reader, a.ice))
}

// guestProcess is a process in a guest, as attach needs it; *vm.Process is one.
type guestProcess interface {
	Stdout() io.Reader
	Stderr() io.Reader
	Write([]byte) (int, error)
	CloseStdin(context.Context) error
	Resize(ctx context.Context, rows, cols uint16) error
	SignalAll(context.Context, syscall.Signal) error
	Signal(context.Context, syscall.Signal) error
	Wait(context.Context) (vm.ExitStatus, error)
	Discard()
}

// attach connects a process with a stream until the process ends. If the
// person goes away the process is hung up on; if the instance is frozen the
// person is told, for nothing in it will ever answer.
func attach(p guestProcess, w io.Writer, r *bufio.Reader, ice <-chan struct{}) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var mu sync.Mutex
	send := func(kind byte, b []byte) error {
		mu.Lock()
		defer mu.Unlock()
		return admin.WriteFrame(w, kind, b)
	}
	go func() {
		defer cancel()
		feed(ctx, p, r)
	}()
	var outputs sync.WaitGroup
	for kind, from := range map[byte]io.Reader{admin.FrameStdout: p.Stdout(), admin.FrameStderr: p.Stderr()} {
		outputs.Go(func() {
			if _, err := io.Copy(frameWriter{kind, send}, from); err != nil {
				p.Discard()
				cancel()
			}
		})
	}
	frozen := make(chan struct{})
	go func() {
		select {
		case <-ice:
			close(frozen)
			cancel()
		case <-ctx.Done():
		}
	}()
	status, err := p.Wait(ctx)
	select {
	case <-frozen:
		p.Discard()
		return sendError(send, "Contained", "the instance was contained: its machine is frozen and answers nobody")
	default:
	}
	if err != nil {
		hangup, stop := context.WithTimeout(context.Background(), 5*time.Second)
		defer stop()
		p.Discard()
		return errors.Join(fmt.Errorf("exec: %w", err), p.Signal(hangup, syscall.SIGHUP), p.Signal(hangup, syscall.SIGKILL))
	}
	drained := make(chan struct{})
	go func() { outputs.Wait(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(2 * time.Second): // a child that lives on holds the stream
		p.Discard()
	}
	return send(admin.FrameExit, binary.BigEndian.AppendUint32(nil, uint32(int32(status.Code))))
}

func sendError(send func(byte, []byte) error, reason, message string) error {
	b, err := json.Marshal(admin.Error{Reason: reason, Message: message, Fix: "`hauberk incidents` says what it did, `hauberk restart` replaces it"})
	if err != nil {
		return fmt.Errorf("exec: %w", err)
	}
	return send(admin.FrameError, b)
}

// feed passes on what the person types until they go away.
func feed(ctx context.Context, p guestProcess, r io.Reader) {
	for {
		kind, payload, err := admin.ReadFrame(r)
		if err != nil {
			return
		}
		switch {
		case kind == admin.FrameStdin && len(payload) == 0:
			err = p.CloseStdin(ctx)
		case kind == admin.FrameStdin:
			_, err = p.Write(payload)
		case kind == admin.FrameResize && len(payload) == 4:
			err = p.Resize(ctx, binary.BigEndian.Uint16(payload), binary.BigEndian.Uint16(payload[2:]))
		}
		if err != nil && ctx.Err() != nil {
			return
		}
	}
}

type frameWriter struct {
	kind byte
	send func(byte, []byte) error
}

func (f frameWriter) Write(p []byte) (int, error) {
	for at := 0; at < len(p); at += admin.MaxFrame {
		if err := f.send(f.kind, p[at:min(at+admin.MaxFrame, len(p))]); err != nil {
			return at, err
		}
	}
	return len(p), nil
}
