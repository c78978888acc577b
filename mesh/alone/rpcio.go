package alone

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of what connections of RPC hold.
const (
	maxOutbox  = 4 << 20   // waiting for a peer to read it
	maxRPCHeld = 256 << 20 // over a block of each connection: of calls, and again of answers
)

var (
	errUnread = errors.New("the peer does not read what is sent to it")
	errLong   = errors.New("the frame is over the limit")
	errHeld   = errors.New("connections hold too many bytes of frames")
)

// holding counts the bytes over a block that connections hold each.
type holding struct {
	n    atomic.Int64
	most int64
}

// take counts bytes in, if there may be so many.
func (h *holding) take(n int) bool {
	if h.n.Add(int64(n)) > h.most {
		h.n.Add(-int64(n))
		return false
	}
	return true
}

func (h *holding) give(n int) { h.n.Add(-int64(n)) }

// frameReader cuts what a connection says into whole frames.
type frameReader struct {
	conn    net.Conn
	wire    *wire
	most    int
	patient time.Duration // for the rest of a frame
	held    *holding

	pooled  *block
	b       []byte
	at, end int
	large   int
	skip    int          // bytes of a frame that is not taken
	halt    *atomic.Bool // stop reading where it rests; nil: never
	halted  bool         // the deadline that came with halt has been met
}

// begin says what has been read already, which fits a block.
func (r *frameReader) begin(early []byte) {
	if len(early) > 0 {
		r.pooled = blocks.Get().(*block)
		r.b = r.pooled[:]
		r.end = copy(r.b, early)
	}
}

// next waits for a whole frame. It is good until the next call. idle tells how long
// to wait for its first byte. With errHeld the frame is its beginning, and next goes
// on behind it.
func (r *frameReader) next(idle time.Time) (frame []byte, err error) {
	for waiting := false; ; {
		if n := min(r.skip, r.end-r.at); n > 0 {
			r.skip -= n
			r.at += n
		}
		size := 0
		if r.skip == 0 && r.end > r.at {
			if size, err = r.wire.size(r.b[r.at:r.end]); err != nil {
				return nil, err
			}
		}
		if size > 0 && r.end-r.at >= size {
			frame = r.b[r.at : r.at+size]
			r.at += size
			return frame, nil
		}
		if size > r.most {
			return nil, fmt.Errorf("%w: %d bytes; at most %d", errLong, size, r.most)
		}
		if !r.room(size) {
			frame = r.b[r.at:r.end]
			r.skip, r.at = size-len(frame), r.end
			return frame, errHeld
		}
		begun := r.end > r.at || r.skip > 0
		if begun && !waiting {
			r.conn.SetReadDeadline(time.Now().Add(r.patient))
			waiting = true
		} else if !begun {
			r.conn.SetReadDeadline(idle)
		}
		if r.halt != nil && r.halt.Load() && r.rests() { // it was told so before the deadline was set
			return nil, os.ErrDeadlineExceeded
		}
		n, err := r.conn.Read(r.b[r.end:])
		r.end += n
		if n == 0 && !r.halted && errors.Is(err, os.ErrDeadlineExceeded) && r.halt != nil && r.halt.Load() && !r.rests() {
			r.halted, waiting = true, false // it was told so in the middle of something large
			continue
		}
		if n == 0 && err != nil {
			if err == io.EOF && begun {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
}

// rests says whether another process can go on here.
func (r *frameReader) rests() bool { return r.skip == 0 && r.end-r.at <= maxUnread }

// room makes room for what comes next, of a frame of size bytes if that is known: no
// more is held than has come, or twice that.
func (r *frameReader) room(size int) bool {
	if r.pooled == nil {
		r.pooled = blocks.Get().(*block)
		r.b = r.pooled[:]
	}
	if r.at == r.end {
		r.at, r.end = 0, 0
		r.shrink(size)
	}
	if r.at > 0 && (r.end == len(r.b) || r.at+size > len(r.b)) {
		r.end = copy(r.b, r.b[r.at:r.end])
		r.at = 0
	}
	if r.end == len(r.b) { // the frame is longer
		n := min(size, 2*len(r.b))
		if !r.held.take(n) {
			return false
		}
		b := make([]byte, n)
		copy(b, r.b)
		r.held.give(r.large)
		r.b, r.large = b, n
	}
	return true
}

// shrink goes back to the small buffer.
func (r *frameReader) shrink(size int) {
	if r.large > 0 && size <= blockSize {
		r.held.give(r.large)
		r.large, r.b = 0, r.pooled[:]
	}
}

func (r *frameReader) free() {
	r.held.give(r.large)
	r.large = 0
	if r.pooled != nil {
		blocks.Put(r.pooled)
		r.pooled, r.b = nil, nil
	}
}

// outbox is what waits to be written to a connection, and the goroutine that does
// it: nobody waits for a peer that is slow to read.
type outbox struct {
	conn net.Conn
	held *holding
	kick chan struct{}
	done chan struct{}

	mu     sync.Mutex
	b      []byte
	large  int // bytes of b that are counted in held
	spare  []byte
	closed bool
	ending bool // closed when all is written
	others bool // then not even that: another process has the connection
}

func newOutbox(conn net.Conn, held *holding) *outbox {
	return &outbox{conn: conn, held: held, kick: make(chan struct{}, 1), done: make(chan struct{})}
}

// add has a frame written. It reports an error when the connection is not served
// any more, its peer does not read, or there is no room for what all peers do not.
func (o *outbox) add(frame []byte) error { return o.put(frame, blockSize) }

// say is add of the proxy's own words, for which a little more room is left.
func (o *outbox) say(frame []byte) error { return o.put(frame, 2*blockSize) }

// put takes a frame that needs not be counted in if no more than free wait with it.
func (o *outbox) put(frame []byte, free int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.closed || o.ending:
		return net.ErrClosed
	case len(o.b) > 0 && len(o.b)+len(frame) > maxOutbox:
		return errUnread
	case len(o.b)+len(frame) <= free:
	case !o.held.take(len(frame)):
		return errHeld
	default:
		o.large += len(frame)
	}
	o.b = append(o.b, frame...)
	o.wake()
	return nil
}

func (o *outbox) wake() {
	select {
	case o.kick <- struct{}{}:
	default:
	}
}

// finish closes the connection when all is written.
func (o *outbox) finish() {
	o.mu.Lock()
	o.ending = true
	o.mu.Unlock()
	o.wake()
}

// release ends the goroutine when all is written, and leaves the connection open.
func (o *outbox) release() {
	o.mu.Lock()
	o.ending, o.others = true, true
	o.mu.Unlock()
	o.wake()
}

// resume takes a release back.
func (o *outbox) resume(patience time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	o.ending, o.others = false, false
	o.done = make(chan struct{})
	go o.run(patience)
}

// close closes the connection at once.
func (o *outbox) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.conn.Close()
	o.wake()
}

// forget gives back what is not written any more.
func (o *outbox) forget() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.held.give(o.large)
	o.b, o.spare, o.large = nil, nil, 0
}

// run writes until the connection is closed.
func (o *outbox) run(patience time.Duration) {
	defer close(o.done)
	defer o.forget()
	for range o.kick {
		for {
			o.mu.Lock()
			if o.closed {
				o.mu.Unlock()
				return
			}
			b, large, ending, others := o.b, o.large, o.ending, o.others
			o.b, o.large = o.spare[:0], 0
			o.spare = nil
			o.mu.Unlock()
			if len(b) == 0 {
				if ending {
					if !others {
						o.close()
					}
					return
				}
				o.mu.Lock()
				o.spare = b
				o.mu.Unlock()
				break
			}
			o.conn.SetWriteDeadline(time.Now().Add(patience))
			_, err := o.conn.Write(b)
			o.held.give(large)
			if err != nil {
				o.close()
				return
			}
			if cap(b) > 2*blockSize {
				b = nil // one large frame is no reason to keep the room
			}
			o.mu.Lock()
			o.spare = b[:0]
			o.mu.Unlock()
		}
	}
}
