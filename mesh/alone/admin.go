package alone

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"runtime"
	"strings"
	"time"

	"hauberk.dev/mesh/http1"
)

const (
	adminTimeout = 5 * time.Second
	maxAdmins    = 16 // at once
	maxFaults    = 64 // told of a configuration
)

// serveAdmin answers GET /metrics, GET /status, GET /readyz, PUT /config and DELETE /cache.
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
		kind, body, status := "text/plain; charset=utf-8", []byte("not found: use GET /metrics, GET /status, GET /readyz, PUT /config or DELETE /cache\n"), "404 Not Found"
		switch {
		case h.Method == "PUT" && h.Target == "/config" && h.Framing == http1.Length:
			kind = "application/json"
			if body, status, err = p.putConfig(in, out, h); err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(adminTimeout))
		case h.Method == "DELETE" && isCache(h.Target) && h.Framing == http1.NoBody:
			kind, body, status = "application/json", fmt.Appendf(nil, `{"purged":%d}`+"\n", p.purge(prefixOf(h.Target))), "200 OK"
		case h.Framing != http1.NoBody || h.Method != "GET":
			body, status, h.Close = []byte("only GET without a body, DELETE /cache, or PUT /config with its length\n"), "405 Method Not Allowed", true
		case h.Target == "/metrics":
			kind, body, status = "text/plain; version=0.0.4", p.metrics(), "200 OK"
		case h.Target == "/readyz":
			kind = "application/json"
			body, status = p.ready(time.Now())
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

// isCache says whether a target is what is stored, and prefixOf whose address begins
// with what.
func isCache(target string) bool {
	path, _, _ := strings.Cut(target, "?")
	return path == "/cache"
}

func prefixOf(target string) string {
	_, query, _ := strings.Cut(target, "?")
	v, err := url.ParseQuery(query)
	if err != nil {
		return "\x00" // of no address
	}
	return v.Get("prefix")
}

// refused is the answer to a configuration that is not taken: nothing of it is in
// force.
type refused struct {
	refusal
	Faults []Fault `json:"faults,omitempty"`
}

// putConfig puts a configuration in force that came over the socket, all of it or
// nothing. Paths in it are relative to those of the file the proxy began with.
func (p *Proxy) putConfig(in *http1.Reader, out *bufio.Writer, h *http1.Head) (body []byte, status string, err error) {
	if h.Length > maxConfig {
		h.Close = true
		body, err = json.Marshal(refused{refusal: refusal{Error: "Content Too Large", Reason: fmt.Sprintf("over %d MiB", maxConfig>>20)}})
		return body, "413 Content Too Large", err
	}
	if h.Expect {
		out.WriteString("HTTP/1.1 100 Continue\r\n\r\n")
		if err := out.Flush(); err != nil {
			return nil, "", err
		}
	}
	text := make([]byte, h.Length)
	if _, err := io.ReadFull(in.R, text); err != nil {
		return nil, "", err
	}
	c, err := Parse("config", p.world.Load().config.dir, text)
	if err == nil {
		c.told = text
		err = p.Reload(c)
	} else {
		p.Refused()
	}
	if err == nil {
		p.log.Info("configured over the admin socket", "digest", c.sum)
		return p.describe(), "200 OK", nil
	}
	p.log.Error("configuration refused: the one before stays", "err", err)
	answer := refused{refusal: refusal{Error: "Unprocessable Content", Reason: err.Error(), Hint: "nothing has changed; mend it and put it again"}}
	var faults *Faults
	if errors.As(err, &faults) {
		answer.Faults = faults.All[:min(len(faults.All), maxFaults)]
	}
	body, err = json.Marshal(answer)
	return append(body, '\n'), "422 Unprocessable Content", err
}

// describe says what is in force. It holds no key and no request.
func (p *Proxy) describe() []byte {
	w := p.enter()
	defer w.leave()
	return fmt.Appendf(nil, `{"generation":%d,"digest":%q,"since":%q,"refused_reloads":%d,"connections":%d,"goroutines":%d,"stopping":%t}`+"\n",
		p.stats.generation.Load(), w.config.sum, w.made.UTC().Format(time.RFC3339), p.stats.badReloads.Load(), p.open.Load(), runtime.NumGoroutine(), p.stopping.Load())
}
