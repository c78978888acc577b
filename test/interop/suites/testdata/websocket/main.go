// Command websocket serves and calls by github.com/coder/websocket. A client
// says of each case "ok" or "FAIL".
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
)

const limit = 32 << 20

func main() {
	var err error
	if os.Args[1] == "serve" {
		err = serve(os.Args[2])
	} else {
		err = call("ws://" + os.Args[2] + "/")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "websocket:", err)
		os.Exit(1)
	}
}

// serve echoes; at /close/CODE it closes with that code, at /plain it declines.
func serve(address string) error {
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/plain" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		c, err := websocket.Accept(w, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionContextTakeover, Subprotocols: []string{"echo"}})
		if err != nil {
			return
		}
		defer c.CloseNow()
		c.SetReadLimit(limit)
		var code websocket.StatusCode
		if _, err := fmt.Sscanf(r.URL.Path, "/close/%d", &code); err == nil {
			c.Close(code, "as asked")
			return
		}
		for {
			kind, in, err := c.Reader(r.Context())
			if err != nil {
				return
			}
			out, err := c.Writer(r.Context(), kind)
			if err != nil {
				return
			}
			if _, err := io.Copy(out, in); err != nil || out.Close() != nil {
				return
			}
		}
	}))
}

func call(url string) error {
	failed := false
	for _, c := range []struct {
		name string
		run  func(context.Context, string) error
	}{
		{"text and binary", texts}, {"16 MiB in one message", large}, {"fragments", fragments}, {"ping and pong", ping},
		{"compression", compressed}, {"close codes", codes}, {"subprotocol", subprotocol}, {"50 at once", many}, {"declined", declined},
		{"close by the client", goodbye},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		err := c.run(ctx, url)
		cancel()
		if err != nil {
			failed = true
			fmt.Printf("FAIL %s: %v\n", c.name, err)
		} else {
			fmt.Printf("ok %s\n", c.name)
		}
	}
	if failed {
		return errors.New("cases have failed")
	}
	return nil
}

func dial(ctx context.Context, url string, o *websocket.DialOptions) (*websocket.Conn, error) {
	c, _, err := websocket.Dial(ctx, url, o)
	if err == nil {
		c.SetReadLimit(limit)
	}
	return c, err
}

func echo(ctx context.Context, c *websocket.Conn, kind websocket.MessageType, b []byte) error {
	sent := make(chan error, 1)
	go func() { sent <- c.Write(ctx, kind, b) }()
	k, got, err := c.Read(ctx)
	if err = errors.Join(err, <-sent); err == nil && (k != kind || !bytes.Equal(got, b)) {
		err = fmt.Errorf("%d bytes came back of %d, as %v", len(got), len(b), k)
	}
	return err
}

func with(ctx context.Context, url string, o *websocket.DialOptions, f func(*websocket.Conn) error) error {
	c, err := dial(ctx, url, o)
	if err != nil {
		return err
	}
	defer c.CloseNow()
	if err := f(c); err != nil {
		return err
	}
	return c.Close(websocket.StatusNormalClosure, "")
}

func texts(ctx context.Context, url string) error {
	return with(ctx, url, nil, func(c *websocket.Conn) error {
		for n := range 300 {
			if err := errors.Join(echo(ctx, c, websocket.MessageText, []byte(strings.Repeat("ü", n))), echo(ctx, c, websocket.MessageBinary, make([]byte, n*7))); err != nil {
				return err
			}
		}
		return nil
	})
}

func large(ctx context.Context, url string) error {
	return with(ctx, url, nil, func(c *websocket.Conn) error {
		return echo(ctx, c, websocket.MessageBinary, bytes.Repeat([]byte("0123456789abcdef"), 1<<20))
	})
}

func fragments(ctx context.Context, url string) error {
	return with(ctx, url, nil, func(c *websocket.Conn) error {
		w, err := c.Writer(ctx, websocket.MessageText)
		if err != nil {
			return err
		}
		var all bytes.Buffer
		for n := range 100 {
			part := strings.Repeat("f", n*50)
			all.WriteString(part)
			if _, err := io.WriteString(w, part); err != nil {
				return err
			}
		}
		if err := w.Close(); err != nil {
			return err
		}
		_, got, err := c.Read(ctx)
		if err == nil && !bytes.Equal(got, all.Bytes()) {
			err = fmt.Errorf("%d bytes came back of %d", len(got), all.Len())
		}
		return err
	})
}

func ping(ctx context.Context, url string) error {
	return with(ctx, url, nil, func(c *websocket.Conn) error {
		reading := c.CloseRead(ctx) // pongs are read here
		for range 50 {
			if err := c.Ping(ctx); err != nil {
				return err
			}
		}
		return reading.Err()
	})
}

func compressed(ctx context.Context, url string) error {
	return with(ctx, url, &websocket.DialOptions{CompressionMode: websocket.CompressionContextTakeover}, func(c *websocket.Conn) error {
		return errors.Join(echo(ctx, c, websocket.MessageText, bytes.Repeat([]byte("press"), 50_000)), echo(ctx, c, websocket.MessageText, []byte("again")))
	})
}

func codes(ctx context.Context, url string) error {
	for _, code := range []websocket.StatusCode{1000, 1001, 1003, 1008, 1011, 3000, 4999} {
		c, err := dial(ctx, fmt.Sprintf("%sclose/%d", url, code), nil)
		if err != nil {
			return err
		}
		_, _, err = c.Read(ctx)
		var closed websocket.CloseError
		if !errors.As(err, &closed) || closed.Code != code || closed.Reason != "as asked" {
			return fmt.Errorf("closed with %d: %v", code, err)
		}
		c.CloseNow()
	}
	return nil
}

func subprotocol(ctx context.Context, url string) error {
	return with(ctx, url, &websocket.DialOptions{Subprotocols: []string{"other", "echo"}}, func(c *websocket.Conn) error {
		if c.Subprotocol() != "echo" {
			return fmt.Errorf("subprotocol %q", c.Subprotocol())
		}
		return nil
	})
}

func many(ctx context.Context, url string) error {
	errs := make([]error, 50)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			errs[i] = with(ctx, url, nil, func(c *websocket.Conn) error {
				for range 20 {
					if err := echo(ctx, c, websocket.MessageText, []byte(fmt.Sprint(i))); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func declined(ctx context.Context, url string) error {
	_, resp, err := websocket.Dial(ctx, url+"plain", nil)
	if err == nil || resp == nil || resp.StatusCode != 403 {
		return fmt.Errorf("%+v, %v", resp, err)
	}
	return nil
}

func goodbye(ctx context.Context, url string) error {
	c, err := dial(ctx, url, nil)
	if err != nil {
		return err
	}
	return c.Close(4000, "bye")
}
