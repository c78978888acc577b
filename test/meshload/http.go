package meshload

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

// http1Request has a length if its number is even, else chunks.
func http1Request(b []byte, id uint64, size int) []byte {
	b = fmt.Appendf(b, "POST /%d HTTP/1.1\r\nHost: load\r\n", id)
	if id%2 == 0 {
		b = fmt.Appendf(b, "Content-Length: %d\r\n\r\n", size)
		return append(b, body(id, size)...)
	}
	b = append(b, "Transfer-Encoding: chunked\r\n\r\n"...)
	for rest := body(id, size); len(rest) > 0; {
		n := min(len(rest), 4000)
		b = fmt.Appendf(b, "%x\r\n", n)
		b = append(append(b, rest[:n]...), "\r\n"...)
		rest = rest[n:]
	}
	return append(b, "0\r\n\r\n"...)
}

func http1Answer(r *bufio.Reader, id uint64, size int) error {
	resp, err := http.ReadResponse(r, &http.Request{Method: "POST"})
	if err != nil {
		return err
	}
	err = checkHTTP(resp, id, size)
	if err == nil && resp.Close {
		return errClosing
	}
	return err
}

var errClosing = errors.New("answered well, but closes")

func checkHTTP(resp *http.Response, id uint64, size int) error {
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return err
	case resp.StatusCode != 200:
		return &Refused{fmt.Sprintf("%d %.300s", resp.StatusCode, got)}
	case resp.Header.Get("X-Id") != strconv.FormatUint(id, 10):
		return fmt.Errorf("asked %d, answered %q", id, resp.Header.Get("X-Id"))
	case !bytes.Equal(got, body(id, size)):
		return fmt.Errorf("%d: %d bytes came back, of %d, or others", id, len(got), size)
	}
	return nil
}

func serveHTTP(ln net.Listener, l *Ledger) func() {
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := strconv.ParseUint(r.URL.Path[1:], 10, 64)
		if err != nil {
			http.Error(w, err.Error(), 400)
			return
		}
		b, err := io.ReadAll(io.LimitReader(r.Body, MaxSize))
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		l.note(id)
		w.Header().Set("X-Id", r.URL.Path[1:])
		w.Write(b)
	})}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(ln)
	return func() { srv.Close() }
}

// http2Client speaks HTTP/2 with prior knowledge over one connection.
type http2Client struct {
	dial func() (net.Conn, error)
	raw  net.Conn
	conn *http.ClientConn
}

func (h *http2Client) open() error {
	if h.conn != nil && h.conn.Available() > 0 {
		return nil
	}
	h.Close()
	c, err := h.dial()
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	t := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}
	t.Protocols.SetUnencryptedHTTP2(true)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := t.NewClientConn(ctx, "http", "load:80")
	if err != nil {
		c.Close()
		return err
	}
	h.raw, h.conn = c, conn
	return nil
}

func (h *http2Client) request(ctx context.Context, id uint64, r io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, "POST", fmt.Sprintf("http://load/%d", id), r)
	if err != nil {
		return nil, err
	}
	return h.conn.RoundTrip(req)
}

func (h *http2Client) Ask(id uint64, size int) error {
	if err := h.open(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := h.request(ctx, id, bytes.NewReader(body(id, size)))
	if err == nil {
		err = checkHTTP(resp, id, size)
	}
	var no *Refused
	if err != nil && !errors.As(err, &no) {
		h.Close()
	}
	return err
}

func (h *http2Client) Abort(id uint64, size int, at uint8) {
	if h.open() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	part := io.Reader(bytes.NewReader(body(id, size)))
	if at < 128 { // ends in the middle of the body
		part = io.MultiReader(bytes.NewReader(body(id, size*int(at)/128)), readFunc(func([]byte) (int, error) {
			cancel()
			<-ctx.Done()
			return 0, ctx.Err()
		}))
	}
	if resp, err := h.request(ctx, id, part); err == nil {
		if at >= 128 {
			io.CopyN(io.Discard, resp.Body, int64(size)*int64(at-128)/128)
		}
		resp.Body.Close()
	}
	if at%5 == 0 {
		h.Close()
	}
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(b []byte) (int, error) { return f(b) }

func (h *http2Client) Close() {
	if h.conn != nil {
		h.raw.SetDeadline(time.Now())
		h.conn.Close()
		h.conn = nil
	}
}
