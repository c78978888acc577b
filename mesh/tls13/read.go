package tls13

import (
	"errors"
	"fmt"
	"io"
)

const (
	// smallBuffer is what a connection starts with that has not carried much.
	smallBuffer = 2 << 10
	// largeBuffer holds the largest record and some of the next.
	largeBuffer = 18 << 10
	// maxUseless records in a row carry no data.
	maxUseless = 32
)

// Read returns what the peer has sent: io.EOF behind its close_notify only, and
// wire.ErrFrozen while the connection is frozen.
func (c *Conn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	for len(c.plain) == 0 {
		if c.readErr != nil {
			return 0, c.readErr
		}
		if err := c.next(); err != nil {
			if passes(err) {
				return 0, err
			}
			c.readErr = err
			var f *fault
			if errors.As(err, &f) {
				c.warn(f.alert)
			}
		}
	}
	n := copy(p, c.plain)
	c.plain = c.plain[n:]
	return n, nil
}

// next reads one record and does what it says.
func (c *Conn) next() error {
	if err := c.fill(headerLen); err != nil {
		return err
	}
	n := int(c.raw[c.at+3])<<8 | int(c.raw[c.at+4])
	if n > maxCipher {
		return refuse(alertOverflow, "%d bytes", n)
	}
	if err := c.fill(headerLen + n); err != nil {
		return err
	}
	record := c.raw[c.at : c.at+headerLen+n]
	c.at += len(record)
	kind, plain, err := c.in.open(record)
	if err != nil {
		return err
	}
	if c.in.seq == c.rekeyed {
		c.owe(2)
	}
	if kind != kindHandshake && (c.partial > 0 || c.skip > 0) {
		return refuse(alertUnexpected, "kind %d within a handshake message", kind)
	}
	if kind == kindData && len(plain) > 0 {
		c.plain, c.useless = plain, 0
		return nil
	}
	if c.useless++; c.useless > maxUseless {
		return refuse(alertUnexpected, "more than %d in a row without data", maxUseless)
	}
	switch kind {
	case kindData:
		return nil
	case kindAlert:
		return readAlert(plain)
	case kindHandshake:
		return c.readHandshake(plain)
	}
	return refuse(alertUnexpected, "kind %d", kind)
}

// fill reads until n bytes are there that have not been opened.
func (c *Conn) fill(n int) error {
	if c.at == c.end {
		c.at, c.end = 0, 0
	}
	if c.at+n > len(c.raw) {
		old := c.raw
		if n > len(c.raw) {
			size := smallBuffer
			if n > size {
				size = largeBuffer
			}
			c.raw = make([]byte, size)
		}
		c.end = copy(c.raw, old[c.at:c.end])
		c.at = 0
	}
	for c.end-c.at < n {
		got, err := c.wire.Read(c.raw[c.end:])
		c.end += got
		switch {
		case got > 0 || err == nil:
		case err == io.EOF:
			return fmt.Errorf("the peer has not said that it ends: %w", io.ErrUnexpectedEOF)
		default:
			return err
		}
	}
	return nil
}

func readAlert(p []byte) error {
	if len(p) != 2 {
		return refuse(alertDecode, "alert of %d bytes", len(p))
	}
	switch p[1] {
	case alertCloseNotify:
		return io.EOF
	case alertUserCancel:
		return nil // only a farewell: close_notify follows
	}
	return remote(p[1])
}

// readHandshake reads messages that come after the handshake. They may be
// spread over records and share them.
func (c *Conn) readHandshake(p []byte) error {
	if len(p) == 0 {
		return refuse(alertUnexpected, "empty handshake message")
	}
	for len(p) > 0 {
		if c.skip > 0 {
			n := min(c.skip, len(p))
			c.skip -= n
			p = p[n:]
			continue
		}
		c.message[c.partial] = p[0]
		c.partial++
		p = p[1:]
		if c.partial < 4 {
			continue
		}
		length := int(c.message[1])<<16 | int(c.message[2])<<8 | int(c.message[3])
		switch {
		case c.message[0] == messageTicket && c.client:
			c.partial, c.skip = 0, length // to resume with, which nobody does
		case c.message[0] != messageKeyUpdate:
			return refuse(alertUnexpected, "handshake message %d", c.message[0])
		case length != 1:
			return refuse(alertDecode, "key update of %d bytes", length)
		case c.partial == 5:
			c.partial = 0
			if err := c.readKeyUpdate(c.message[4], len(p)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Conn) readKeyUpdate(asked byte, behind int) error {
	switch {
	case asked > 1:
		return refuse(alertIllegal, "key update of kind %d", asked)
	case behind > 0:
		return refuse(alertUnexpected, "%d bytes behind a key update", behind)
	}
	if err := c.in.update(); err != nil {
		return &fault{alertInternal, err}
	}
	if asked == 1 {
		c.owe(1) // with the next data: who reads must not wait for room to write
	}
	return nil
}

// owe notes a key update to send. One that asks outdoes one that does not.
func (c *Conn) owe(what uint32) {
	for {
		have := c.owed.Load()
		if have >= what || c.owed.CompareAndSwap(have, what) {
			return
		}
	}
}
