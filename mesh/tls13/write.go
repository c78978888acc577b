package tls13

import (
	"errors"
	"sync"
	"time"
)

const (
	sealed    = headerLen + maxPlain + 1 + tagLen // the largest record of ours
	keyUpdate = headerLen + 5 + 1 + tagLen
	together  = 4 // records in one write
)

type (
	oneRecord  [keyUpdate + sealed]byte
	allRecords [together * (keyUpdate + sealed)]byte
)

var (
	ones = sync.Pool{New: func() any { return new(oneRecord) }}
	alls = sync.Pool{New: func() any { return new(allRecords) }}
)

// Write sends p, in whole records. While the connection is frozen they are
// sealed and kept.
func (c *Conn) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	n := 0
	for n < len(p) {
		k, err := c.send(p[n:])
		if err != nil {
			return n, err
		}
		n += k
	}
	return n, nil
}

// send sends up to so many records of p at once and says how much that is.
func (c *Conn) send(p []byte) (int, error) {
	if len(p) <= maxPlain {
		b := ones.Get().(*oneRecord)
		defer ones.Put(b)
		return c.sendIn(b[:0], p)
	}
	b := alls.Get().(*allRecords)
	defer alls.Put(b)
	return c.sendIn(b[:0], p[:min(len(p), together*maxPlain)])
}

func (c *Conn) sendIn(b, p []byte) (n int, err error) {
	switch {
	case c.writeErr != nil:
		return 0, c.writeErr
	case c.ended:
		return 0, errEnded
	}
	for n < len(p) && err == nil {
		record := p[n:min(len(p), n+maxPlain)]
		if b, err = c.renew(b); err == nil {
			b, err = c.out.seal(b, kindData, record)
		}
		n += len(record)
	}
	if err == nil {
		_, err = c.wire.Write(b)
	}
	if err != nil {
		// Part of a record may be out, and no other can follow it.
		c.writeErr = err
		return 0, err
	}
	return n, nil
}

// renew appends a key update if one is due.
func (c *Conn) renew(b []byte) ([]byte, error) {
	due := c.owed.Swap(0)
	if due == 0 && c.out.seq < c.rekeyed {
		return b, nil
	}
	asks := byte(0)
	if due == 2 {
		asks = 1
	}
	b, err := c.out.seal(b, kindHandshake, []byte{messageKeyUpdate, 0, 0, 1, asks})
	if err == nil {
		err = c.out.update()
	}
	return b, err
}

// warn ends writing with an alert, if it can be sent without a wait.
func (c *Conn) warn(alert uint8) {
	if !c.writing.TryLock() {
		return // somebody waits for room
	}
	defer c.writing.Unlock()
	if c.writeErr != nil || c.ended {
		return
	}
	c.sayLocked(alert)
	c.writeErr = errors.New("the connection has failed")
}

// sayLocked sends an alert. The write deadline is gone then.
func (c *Conn) sayLocked(alert uint8) error {
	const warning, fatal = 1, 2
	level := byte(fatal)
	if alert == alertCloseNotify {
		level = warning
	}
	b := ones.Get().(*oneRecord)
	defer ones.Put(b)
	out, err := c.out.seal(b[:0], kindAlert, []byte{level, alert})
	if err == nil {
		c.wire.SetWriteDeadline(time.Now().Add(farewell))
		_, err = c.wire.Write(out)
	}
	return err
}

// CloseWrite tells the peer that nothing more is sent. Reading goes on.
func (c *Conn) CloseWrite() error {
	c.writing.Lock()
	defer c.writing.Unlock()
	switch {
	case c.writeErr != nil:
		return c.writeErr
	case c.ended:
		return nil
	}
	c.ended = true
	if err := c.sayLocked(alertCloseNotify); err != nil {
		c.writeErr = err
		return err
	}
	return nil
}

// Close ends the connection, with a close_notify if there is room for it, and
// after what was kept while it was frozen. A frozen one is let go of without a
// word.
func (c *Conn) Close() error {
	if !c.wire.Frozen() && c.writing.TryLock() {
		switch {
		case c.writeErr != nil:
		case c.ended:
			c.wire.SetWriteDeadline(time.Now().Add(farewell))
			c.wire.Write(nil) // waits for what is still on its way
		default:
			c.ended = true
			c.sayLocked(alertCloseNotify)
		}
		c.writing.Unlock()
	}
	return c.wire.Close()
}
