package http2

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"hauberk.dev/mesh/h2frame"
)

// What cannot be written at once is written in order by who waits, and what comes
// meanwhile after it.
func TestWriteNow(t *testing.T) {
	p := &narrow{tape: newTape()}
	c := Server(p, Options{})
	c.started = true
	var want []byte
	for i := range 50 {
		c.mu.Lock()
		b := fmt.Appendf(nil, "frame %d of those that wait;", i)
		c.answerLocked(b)
		c.mu.Unlock()
		want = append(want, b...)
		p.room = i % 40 // bytes; nothing, too
		done := c.writeNow(1)
		if rest := len(c.out); done != (rest == 0) || c.answers > rest || len(p.out)+rest != len(want) {
			t.Fatalf("after %d frames %d bytes are left, %d of answers, done %v", i, rest, c.answers, done)
		}
		if i%7 == 6 {
			if _, err := c.writeSome(); err != nil || c.answers != 0 {
				t.Fatal(err, c.answers)
			}
		}
	}
	for more := true; more; {
		more, _ = c.writeSome()
	}
	if !bytes.Equal(p.out, want) {
		t.Errorf("wrote %q", p.out)
	}
}

// narrow has room for so many bytes.
type narrow struct {
	*tape
	room int
}

func (p *narrow) WriteNow(b []byte) int {
	n, _ := p.Write(b[:min(len(b), p.room)])
	return n
}

// Nothing is written at once that is not to be written by that goroutine, or now.
func TestWriteNowNot(t *testing.T) {
	for name, set := range map[string]func(c *Conn){
		"frozen":      func(c *Conn) { c.Freeze() },
		"ended":       func(c *Conn) { c.err = ErrClosed },
		"not greeted": func(c *Conn) { c.started = false },
		"others ask":  func(c *Conn) { c.streams[1], c.streams[3] = &Stream{}, &Stream{} },
		"is written":  func(c *Conn) { c.writing.Lock() },
	} {
		p := newTape()
		c := Server(p, Options{})
		c.started = true
		c.out = h2frame.Append(takeBuffer(), h2frame.Ping, 0, 0, make([]byte, 8))
		set(c)
		if c.writeNow(1) || len(p.out) > 0 || len(c.out) != h2frame.HeaderLen+8 {
			t.Errorf("%s: %d bytes written", name, len(p.out))
		}
	}
}

// Large bodies go through whoever writes, both ways at once.
func TestBothWays(t *testing.T) {
	server := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(w, r.Body)
	})
	for _, waits := range []bool{false, true} {
		r := newRelay(t, server)
		r.waits.Store(waits)
		body := strings.Repeat("both ways, ", 300_000)
		resp, err := httpClient(t).Post("http://"+r.address(), "", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(got) != body {
			t.Errorf("%d of %d bytes, %v", len(got), len(body), err)
		}
	}
}
