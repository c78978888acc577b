package alone

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"hauberk.dev/mesh/http1"
)

const (
	adminTimeout = 5 * time.Second
	maxAdmins    = 16 // at once
)

// listenAdmin opens the socket for people and their tools. It is its owner's
// alone. One that nobody listens on any more is replaced.
func listenAdmin(path string) (net.Listener, error) {
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another program is there", path)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		os.Remove(path)
	}
	old := syscall.Umask(0o177)
	ln, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return ln, nil
}

// serveAdmin answers GET /metrics and GET /status.
func (p *Proxy) serveAdmin(ctx context.Context) {
	room := make(chan struct{}, maxAdmins)
	for {
		c, err := p.admin.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			p.log.Warn("accept", "listener", "admin", "err", err)
			time.Sleep(acceptPause)
			continue
		}
		select {
		case room <- struct{}{}:
		default:
			c.Close()
			continue
		}
		p.running.Go(func() {
			stop := context.AfterFunc(ctx, func() { c.Close() })
			p.answerAdmin(c)
			stop()
			c.Close()
			<-room
		})
	}
}

func (p *Proxy) answerAdmin(c net.Conn) {
	in, out := http1.NewReader(c), bufio.NewWriter(c)
	for {
		c.SetDeadline(time.Now().Add(adminTimeout))
		h, err := in.Request()
		if err != nil {
			return
		}
		kind, body, status := "text/plain; charset=utf-8", []byte("not found: use GET /metrics or GET /status\n"), "404 Not Found"
		switch {
		case h.Framing != http1.NoBody || h.Method != "GET":
			body, status, h.Close = []byte("only GET without a body\n"), "405 Method Not Allowed", true
		case h.Target == "/metrics":
			kind, body, status = "text/plain; version=0.0.4", p.metrics(), "200 OK"
		case h.Target == "/status":
			kind, body, status = "application/json", p.describe(), "200 OK"
		}
		connection := ""
		if h.Close {
			connection = "Connection: close\r\n"
		}
		fmt.Fprintf(out, "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s\r\n%s", status, kind, len(body), connection, body)
		if out.Flush() != nil || h.Close {
			return
		}
	}
}

// describe says what is in force. It holds no key and no request.
func (p *Proxy) describe() []byte {
	w := p.enter()
	defer w.leave()
	return fmt.Appendf(nil, `{"generation":%d,"since":%q,"refused_reloads":%d,"connections":%d,"stopping":%t}`+"\n",
		p.stats.generation.Load(), w.made.UTC().Format(time.RFC3339), p.stats.badReloads.Load(), p.open.Load(), p.stopping.Load())
}
