package http2

import (
	"fmt"
	"runtime"
	"sync"

	"hauberk.dev/mesh/h2frame"
)

// write is the goroutine that writes what nobody has written at once.
func (c *Conn) write() {
	defer close(c.written)
	for {
		ending := false
		select {
		case <-c.kick:
		case <-c.done:
			ending = true
		case <-c.frost:
			return
		}
		if !ending && c.several() {
			runtime.Gosched() // those of them that are about to send go into the same write
		}
		for {
			more, err := c.writeSome()
			if err != nil {
				c.end(fmt.Errorf("write: %w", err))
			}
			if !more {
				break
			}
		}
		if c.isFrozen() { // what is left is in the state
			return
		}
		if ending {
			c.shutdown()
			return
		}
	}
}

// writeSome writes what there is, and tells whether there may be more.
func (c *Conn) writeSome() (more bool, err error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.mu.Lock()
	if c.frozen {
		c.unlock()
		return false, nil
	}
	c.fillLocked()
	b := c.out
	c.out, c.answers = nil, 0
	c.unlock()
	if len(b) == 0 {
		return false, nil
	}
	_, err = c.t.Write(b)
	putBuffer(b)
	return err == nil, err
}

// several says whether there is more than one request under way.
func (c *Conn) several() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams) > 1
}

// wake has the goroutine that writes look for something to write.
func (c *Conn) wake() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// push has written what there is: by the caller, who does not wait for it. Where more
// than so many requests are under way, others of them may have something for the same
// write, and who writes is woken.
func (c *Conn) push(most int) {
	if c.prompt == nil || !c.writeNow(most) {
		c.wake()
	}
}

// writeNow writes as much as there is room for, and tells whether nothing is left.
func (c *Conn) writeNow(most int) bool {
	if !c.writing.TryLock() {
		return false
	}
	defer c.writing.Unlock()
	c.mu.Lock()
	if c.frozen || c.err != nil || !c.started || len(c.streams) > most {
		c.mu.Unlock()
		return false
	}
	c.busy.Add(1) // it is not frozen in the middle
	defer c.busy.Done()
	c.fillLocked()
	b, answers, more := c.out, c.answers, c.ready.first != nil
	c.out, c.answers = nil, 0
	c.unlock()
	if len(b) == 0 {
		return !more
	}
	n := c.prompt.WriteNow(b)
	if n == len(b) {
		putBuffer(b)
		return !more
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	b = b[:copy(b, b[n:])]
	c.answers += min(answers, len(b))
	after := c.out
	c.out = append(b, after...) // it goes before what has come meanwhile
	if after != nil {
		putBuffer(after)
	}
	return false
}

// unlock lets go of the lock, and then gives the mates of streams whose data
// has left the room for more: no two connections are locked at once.
func (c *Conn) unlock() {
	for len(c.credits) > 0 {
		c.settleCredits()
	}
	c.mu.Unlock()
}

// settleCredits gives some of the room back. It lets go of the lock meanwhile.
func (c *Conn) settleCredits() {
	var some [16]credit
	n := copy(some[:], c.credits)
	c.credits = c.credits[:copy(c.credits, c.credits[n:])]
	c.mu.Unlock()
	for _, k := range some[:n] {
		if k.of != nil {
			k.of.Sent(k.n)
		} else {
			k.to.consumed(k.n)
		}
	}
	c.mu.Lock()
}

// buffers hold frames ready to be written. An idle connection has none.
var buffers = sync.Pool{New: func() any { return new([outFull + maxSend + h2frame.HeaderLen]byte) }}

func takeBuffer() []byte { return buffers.Get().(*[outFull + maxSend + h2frame.HeaderLen]byte)[:0] }

func putBuffer(b []byte) {
	const size = outFull + maxSend + h2frame.HeaderLen
	if cap(b) == size { // one that has grown is left to the collector
		buffers.Put((*[size]byte)(b[:size]))
	}
}

func (c *Conn) outLocked() []byte {
	if c.out == nil {
		return takeBuffer()
	}
	return c.out
}

// answerLocked queues a frame that the peer has caused. One who does not read
// them is given up: it reports whether that is so.
func (c *Conn) answerLocked(frame []byte) (fits bool) {
	c.answers += len(frame)
	c.out = append(c.outLocked(), frame...)
	return c.answers <= maxAnswers
}
