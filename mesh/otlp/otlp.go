// Package otlp tells a collector of OpenTelemetry what was seen, by OTLP over
// HTTP: one connection, kept, in the clear or over TLS.
//
// It never makes who tells it something wait. What has no room is dropped and
// counted, and so is what the collector does not take. It holds the part of the
// protocol that logs of requests need, written by hand: neither the SDK nor gRPC is
// linked.
package otlp

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	"hauberk.dev/mesh/http1"
)

const (
	postTime = 5 * time.Second // for a request, from dialing to the end of its answer
	lastTime = 2 * time.Second // for what is on its way or left at the end
)

// Outlive is a context that ends a short while after another: for requests of who ends
// with that one, and has things to tell still.
func Outlive(ctx context.Context) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		late := time.NewTimer(lastTime)
		defer late.Stop()
		select {
		case <-late.C:
			cancel()
		case <-longer.Done():
		}
	})
	return longer, func() { stop(); cancel() }
}

// Poster sends requests to a collector, one after the other. It belongs to one
// goroutine.
type Poster struct {
	Address string      // host:port
	TLS     *tls.Config // nil: in the clear
	Path    string
	Type    string // of the content

	conn net.Conn
	in   *http1.Reader
}

// Post sends one request. A connection that was kept may have ended: then it is
// sent once more over a new one.
func (p *Poster) Post(ctx context.Context, body []byte) error {
	kept := p.conn != nil
	heard, err := p.post(ctx, body)
	if err != nil && kept && !heard && ctx.Err() == nil {
		_, err = p.post(ctx, body)
	}
	return err
}

// Close lets go of the connection.
func (p *Poster) Close() {
	if p.conn != nil {
		p.conn.Close()
		p.conn = nil
	}
}

// post reports whether the collector has answered.
func (p *Poster) post(ctx context.Context, body []byte) (heard bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, postTime)
	defer cancel()
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if p.conn == nil {
		if err := p.dial(ctx); err != nil {
			return false, fmt.Errorf("dial collector: %w", err)
		}
	}
	c := p.conn
	c.SetDeadline(time.Now().Add(postTime))
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	out := bufio.NewWriter(c)
	fmt.Fprintf(out, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", p.Path, p.Address, p.Type, len(body))
	out.Write(body)
	if err := out.Flush(); err != nil {
		return false, fmt.Errorf("tell collector: %w", err)
	}
	h, err := p.in.Response("POST")
	if err != nil {
		return false, fmt.Errorf("hear collector: %w", err)
	}
	status, closes := h.Status, h.Close
	if err := p.in.Forward(io.Discard, h); err != nil {
		return true, fmt.Errorf("hear collector: %w", err)
	}
	if closes {
		p.Close()
	}
	if status/100 != 2 {
		return true, errors.New("the collector answers " + strconv.Itoa(status))
	}
	return true, nil
}

func (p *Poster) dial(ctx context.Context) error {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", p.Address)
	if err != nil {
		return err
	}
	if p.TLS != nil {
		t := tls.Client(c, p.TLS)
		if err := t.HandshakeContext(ctx); err != nil {
			c.Close()
			return err
		}
		c = t
	}
	p.conn, p.in = c, http1.NewReader(c)
	return nil
}
