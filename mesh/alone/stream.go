package alone

import (
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"hauberk.dev/mesh/http2"
)

// maxHeldOut is what of a body may wait for the window of its receiver.
const maxHeldOut = 64 << 10

// stream is one end of an HTTP/2 stream, seen as a connection that carries one
// message of HTTP/1 each way: a session serves both protocols in one language,
// and every message is checked by the rules of the stricter. Bodies go without
// framing, as the end of a stream says that they are whole.
type stream struct {
	s    *http2.Stream // nil before the request of an upstream's end is sent
	read waiter
	room waiter

	rings *rings // of the connection; for the goroutine that reads it
	heard bool   // read is among them

	mu       sync.Mutex
	in       store
	text     int // bytes of in that are a head: no window counts them
	waits    int // bytes sent that wait for a window
	peerEnd  bool
	sentEnd  bool
	closed   bool
	err      error
	trailers []http2.Field // that came
	wake     net.Conn      // whoever is waited for instead
}

// Data takes bytes of a body.
func (t *stream) Data(p []byte, end bool) (used int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.peerEnd = t.peerEnd || end
	t.rings.add(t)
	if t.closed {
		return len(p)
	}
	t.in.write(p)
	return 0
}

// Trailers takes the last fields.
func (t *stream) Trailers(fields []http2.Field) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.peerEnd = true
	t.trailers = slices.Clone(fields)
	t.rings.add(t)
}

// Sent says that bytes have left that had to wait.
func (t *stream) Sent(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waits -= n
	t.room.signal()
}

// Lost says that the stream is over before its time.
func (t *stream) Lost(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
	t.read.signal()
	t.room.signal()
	if t.wake != nil {
		t.wake.SetDeadline(time.Unix(1, 0))
	}
}

// wakes has c woken when the stream is lost; nil has nobody woken.
func (t *stream) wakes(c net.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.wake = c
}

// lost is why the stream was lost, nil if it was not.
func (t *stream) lost() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// arrived is how much of the body is at hand, and whether that is all.
func (t *stream) arrived() (n int, whole bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.in.n, t.peerEnd && t.err == nil
}

// trailed says whether fields came after the body.
func (t *stream) trailed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.trailers != nil
}

// ending waits for the end of the stream, and returns what came with it.
func (t *stream) ending() ([]http2.Field, error) {
	for {
		t.mu.Lock()
		end, err, after := t.peerEnd, t.err, t.trailers
		if err == nil && t.closed {
			err = net.ErrClosed
		}
		t.mu.Unlock()
		if end {
			return after, nil
		}
		if err == nil {
			err = t.read.wait()
		}
		if err != nil {
			return nil, err
		}
	}
}

// Read reads what has come. The end is io.EOF only if it is one.
func (t *stream) Read(p []byte) (int, error) {
	for {
		t.mu.Lock()
		n := t.in.read(p)
		head := min(n, t.text)
		t.text -= head
		end, err, closed := t.peerEnd, t.err, t.closed
		t.mu.Unlock()
		switch {
		case n > head && !closed:
			t.s.Consumed(n - head)
			return n, nil
		case n > 0:
			return n, nil
		case closed:
			return 0, net.ErrClosed
		case end:
			return 0, io.EOF
		case err != nil:
			return 0, err
		}
		if err := t.read.wait(); err != nil {
			return 0, err
		}
	}
}

// send sends bytes of a body, and waits while too many wait for their window.
func (t *stream) send(p []byte, end bool) error {
	for {
		t.mu.Lock()
		waits, err := t.waits, t.err
		t.mu.Unlock()
		switch {
		case err != nil:
			return err
		case waits < maxHeldOut:
		default:
			if err := t.room.wait(); err != nil {
				return err
			}
			continue
		}
		part := p[:min(len(p), maxHeldOut)]
		t.mu.Lock()
		t.waits += len(part) // before any of it can be said to have left
		t.mu.Unlock()
		used := t.s.SendData(part, end && len(part) == len(p))
		t.mu.Lock()
		t.waits -= used
		t.mu.Unlock()
		if p = p[len(part):]; len(p) == 0 {
			return nil
		}
		t.s.Flush()
	}
}

// quit ends the stream: in good order if both sides have, else with code.
func (t *stream) quit(code http2.Code) {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return
	}
	t.closed = true
	left := t.in.n - t.text
	t.in.drop()
	s, sent, over := t.s, t.sentEnd, t.err != nil
	whole := t.peerEnd && sent
	t.wake = nil
	t.read.signal()
	t.room.signal()
	t.mu.Unlock()
	switch {
	case s == nil:
		return
	case !whole && !over && code == http2.CodeNone && sent:
		s.Stop()
	case !whole && !over:
		s.Reset(code)
	}
	if left > 0 {
		s.Consumed(left)
	}
}

// Close gives the stream up, if it is not over.
func (t *stream) Close() error {
	t.quit(http2.CodeCancel)
	return nil
}

// LocalAddr and RemoteAddr belong to the connection, which a stream does not tell.
func (t *stream) LocalAddr() net.Addr  { return nil }
func (t *stream) RemoteAddr() net.Addr { return nil }

// SetDeadline bounds reading and writing.
func (t *stream) SetDeadline(at time.Time) error {
	t.read.until(at)
	t.room.until(at)
	return nil
}

// SetReadDeadline bounds how long Read waits.
func (t *stream) SetReadDeadline(at time.Time) error { t.read.until(at); return nil }

// SetWriteDeadline bounds how long Write waits.
func (t *stream) SetWriteDeadline(at time.Time) error { t.room.until(at); return nil }

// store keeps what has come and was not read, in pooled blocks.
type store struct {
	parts []part
	n     int
	one   [1]part
}

type part struct {
	b        *block
	from, to int
}

func (s *store) write(p []byte) {
	if s.parts == nil {
		s.parts = s.one[:0]
	}
	s.n += len(p)
	for len(p) > 0 {
		if i := len(s.parts) - 1; i < 0 || s.parts[i].to == blockSize {
			s.parts = append(s.parts, part{b: blocks.Get().(*block)})
		}
		last := &s.parts[len(s.parts)-1]
		n := copy(last.b[last.to:], p)
		last.to += n
		p = p[n:]
	}
}

func (s *store) read(p []byte) (n int) {
	for n < len(p) && len(s.parts) > 0 {
		first := &s.parts[0]
		m := copy(p[n:], first.b[first.from:first.to])
		first.from += m
		n += m
		if first.from == first.to {
			blocks.Put(first.b)
			s.parts = slices.Delete(s.parts, 0, 1)
		}
	}
	s.n -= n
	return n
}

func (s *store) drop() {
	for i := range s.parts {
		blocks.Put(s.parts[i].b)
	}
	s.parts, s.n = nil, 0
}
