package http2

import (
	"errors"
	"io"
	"time"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// ErrFrozen is what Run returns of a connection that was frozen.
var ErrFrozen = wire.ErrFrozen

// readSize holds the largest frame with its header.
const readSize = maxFrame + h2frame.HeaderLen

// What of the peer's greeting has come.
const (
	begunPreface  = 1 // a client's
	begunSettings = 2
)

// Freeze stops the connection as it is; the peer is told nothing. Run returns
// ErrFrozen once nothing moves any more, which wants the transport to be frozen
// too: its Read is to return an error that is wire.ErrFrozen, its Write is not to
// wait and not to fail. Save then reads the connection out. If the connection was
// ending, and its peer had no more time to read, Run returns what it always does,
// and there is nothing to save.
func (c *Conn) Freeze() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen {
		return
	}
	c.frozen = true
	close(c.frost)
	for _, t := range []*time.Timer{c.pulsing, c.linger} {
		if t != nil {
			t.Stop()
		}
	}
}

func (c *Conn) isFrozen() bool {
	select {
	case <-c.frost:
		return true
	default:
		return false
	}
}

// rests tells whether a frozen connection goes on when it is resumed. The writer
// and the reader have ended.
func (c *Conn) rests() bool {
	c.mu.Lock()
	rests := c.frozen && (c.err == nil || c.farewell)
	c.mu.Unlock()
	if rests {
		c.busy.Wait()
	}
	return rests
}

// stop freezes or ends the connection for what reading it has returned.
func (c *Conn) stop(err error) {
	if errors.Is(err, wire.ErrFrozen) {
		c.Freeze()
		return
	}
	c.end(err)
}

// endUnlessFrozen ends a connection for a reason that waits, if need be, until it
// is resumed.
func (c *Conn) endUnlessFrozen(err error) {
	c.mu.Lock()
	if c.frozen {
		c.closing = c.closing || err == ErrClosed
		c.mu.Unlock()
		return
	}
	c.busy.Add(1)
	defer c.busy.Done()
	c.endLocked(err)
}

// giveUp ends the moment a peer has to read the last frames.
func (c *Conn) giveUp() {
	c.mu.Lock()
	if c.frozen {
		c.mu.Unlock()
		return
	}
	c.farewell = false
	c.busy.Add(1)
	defer c.busy.Done()
	c.mu.Unlock()
	c.t.Abort()
}

// shutdown ends this side's half, when all is written.
func (c *Conn) shutdown() {
	c.mu.Lock()
	shut := c.shut
	c.shut = true
	c.mu.Unlock()
	if !shut {
		c.t.CloseWrite()
	}
}

// readAhead gives first what was read before the connection was resumed.
type readAhead struct {
	t io.Reader
	b []byte
}

func (a *readAhead) Read(p []byte) (int, error) {
	if len(a.b) == 0 {
		return a.t.Read(p)
	}
	n := copy(p, a.b)
	if a.b = a.b[n:]; len(a.b) == 0 {
		a.b = nil
	}
	return n, nil
}

// part is what was left of a frame or a header block when reading stopped.
type part struct {
	data *Stream // takes the next n bytes, with which it may end
	n    int
	end  bool
	skip int // bytes after those that nobody takes
	// frames is set for a header block that was begun; Conn.block holds it.
	head   h2frame.Header
	self   bool
	frames int
}

// goOn reads the rest of a frame that was begun before the connection was
// resumed.
func (c *Conn) goOn() error {
	p := c.part
	c.part = part{}
	if p == (part{}) {
		return nil
	}
	c.mid.Store(true)
	var err error
	switch {
	case p.frames > 0:
		err = c.continued(p.head, p.self, p.frames)
	case p.data != nil:
		err = c.passData(p.data, p.n, p.skip, p.end)
	default:
		err = c.discard(p.skip)
	}
	if err = c.stand(err); err != nil {
		return err
	}
	c.mid.Store(false)
	c.stage.Add(1)
	return nil
}
