package tls13

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"

	"hauberk.dev/mesh/wire"
)

// progress is how far one direction of a stream has come. It stops when its
// connection freezes and goes on with the next.
type progress struct {
	left []byte
	done bool
	err  error
}

func (p *progress) write(c *Conn, tired func(int)) {
	for !c.wire.Frozen() && len(p.left) > 0 {
		n := min(len(p.left), 1+rand.IntN(3*maxPlain))
		if rand.IntN(3) == 0 {
			n = min(n, 100)
		}
		if _, err := c.Write(p.left[:n]); err != nil {
			p.err = fmt.Errorf("write: %w", err)
			return
		}
		p.left = p.left[n:]
		tired(n)
	}
	if len(p.left) == 0 && !p.done {
		p.done = true
		p.err = c.CloseWrite()
	}
}

func (p *progress) read(c *Conn, tired func(int)) {
	b := make([]byte, 1+rand.IntN(2*maxPlain))
	for !p.done {
		n, err := c.Read(b)
		if !bytes.Equal(b[:n], p.left[:min(n, len(p.left))]) {
			p.err = fmt.Errorf("other bytes with %d to come", len(p.left))
			return
		}
		p.left = p.left[n:]
		tired(n)
		switch {
		case errors.Is(err, wire.ErrFrozen):
			return
		case err == io.EOF && len(p.left) == 0:
			p.done = true
		case err != nil:
			p.err = fmt.Errorf("read with %d to come: %w", len(p.left), err)
			return
		}
	}
}
