package mesh

import (
	"bytes"
	"fmt"
	"io"
	"sync"
)

const (
	frameBuffer = 16 << 10  // of each direction of a connection
	frameHold   = 128 << 10 // that a connection may hold of a frame without asking
	maxHeld     = 64 << 20  // beyond that, of all frames that wait to be judged
)

var frameBuffers = sync.Pool{New: func() any { return new([frameBuffer]byte) }}

// frameError is a frame that may not be passed on.
type frameError struct{ error }

func (e *frameError) Unwrap() error { return e.error }

// frames cuts a stream of bytes into frames that are decided on one by one, and
// keeps together what passes, so that it leaves in one write.
type frames struct {
	r       io.Reader
	codec   rpcCodec
	reserve func(int) bool
	blind   bool // frames pass without being looked at
	whole   bool // frames that fit the small buffer are waited for to their end

	pooled *[frameBuffer]byte
	buf    []byte
	// What lies before from is gone, up to at it passes, up to end it is new.
	from, at, end int
	left          int  // of the frame decided on, not there yet
	dropping      bool // that frame
	want          int  // bytes of a frame that must be there to go on
	held          int  // reserved
}

func newFrames(r io.Reader, c rpcCodec, reserve func(int) bool) *frames {
	s := &frames{r: r, codec: c, reserve: reserve, pooled: frameBuffers.Get().(*[frameBuffer]byte)}
	s.buf = s.pooled[:]
	return s
}

// framesState is where a cutter of frames stands, as plain data.
type framesState struct {
	Unread   []byte    `json:"unread,omitempty"` // of a frame that was not decided on
	Left     int       `json:"left,omitempty"`   // of one that was, to come
	Dropping bool      `json:"dropping,omitempty"`
	Sum      [3]uint32 `json:"sum,omitzero"`
}

// check refuses what no cutter can have come to.
func (s *framesState) check() error {
	if s.Left < 0 || s.Left > 1<<31 || len(s.Unread) > frameBuffer+frameHold+maxHeld {
		return fmt.Errorf("frames of which %d bytes are to come and %d unread", s.Left, len(s.Unread))
	}
	return nil
}

// state is where the frames stand between two reads. What passes has been sent.
func (s *frames) state() framesState {
	return framesState{Unread: bytes.Clone(s.buf[s.at:s.end]), Left: s.left, Dropping: s.dropping, Sum: s.codec.progress()}
}

// resume goes on where others stood.
func (s *frames) resume(from framesState) {
	if len(from.Unread) > len(s.buf) {
		s.grow(len(from.Unread))
	}
	s.end = copy(s.buf, from.Unread)
	s.left, s.dropping = from.Left, from.Dropping
	s.codec.resume(from.Sum)
}

func (s *frames) free() {
	s.shrink()
	frameBuffers.Put(s.pooled)
	s.buf = nil
}

// next returns what is there of a frame to decide on. size 0 means that there
// is none until more is read.
func (s *frames) next(deep bool) (b []byte, size int, err error) {
	if s.left > 0 {
		if err := s.advance(min(s.left, s.end-s.at)); err != nil || s.left > 0 {
			return nil, 0, err
		}
	}
	b = s.buf[s.at:s.end]
	if len(b) == 0 {
		return nil, 0, nil
	}
	size, look, err := s.codec.measure(b, deep)
	if err == nil && look > frameHold && look > len(b) && !s.hold(look) {
		// Others hold too much: the frame is judged by its head.
		size, look, err = s.codec.measure(b, false)
	}
	if s.whole && size <= frameBuffer {
		look = max(look, size)
	}
	switch {
	case err != nil:
		return nil, 0, &frameError{err}
	case size > 0 && !s.blind && len(b) < look:
		s.want = look
		return nil, 0, nil
	}
	return b, size, nil
}

// hold reserves room for a frame that is long to judge.
func (s *frames) hold(n int) bool {
	if n > s.held {
		if !s.reserve(n - s.held) {
			return false
		}
		s.held = n
	}
	return true
}

// pass decides that the frame goes on.
func (s *frames) pass(size int) error {
	s.codec.begin()
	s.left, s.dropping, s.want = size, false, 0
	return s.advance(min(size, s.end-s.at))
}

// drop decides that the frame does not. What passes has been sent.
func (s *frames) drop(size int) {
	s.left, s.dropping, s.want = size, true, 0
	s.advance(min(size, s.end-s.at))
}

// discard lets go of what is there and of the frame decided on. What passes has
// been sent.
func (s *frames) discard() {
	s.from, s.at, s.end, s.left, s.want = 0, 0, 0, 0, 0
}

func (s *frames) advance(n int) error {
	if !s.dropping {
		if err := s.codec.add(s.buf[s.at : s.at+n]); err != nil {
			return &frameError{err}
		}
	}
	s.at += n
	s.left -= n
	if s.dropping {
		s.from = s.at
	}
	return nil
}

// passed returns what is to be sent now.
func (s *frames) passed() []byte {
	b := s.buf[s.from:s.at]
	s.from = s.at
	return b
}

// partial tells whether a frame has begun that cannot be decided on yet.
func (s *frames) partial() bool { return s.left == 0 && s.end > s.at }

// within tells whether the stream stands in the middle of a frame.
func (s *frames) within() bool { return s.left > 0 || s.end > s.at }

// fill reads more. What passes has been sent.
func (s *frames) fill() error {
	switch {
	case s.at == s.end:
		s.from, s.at, s.end = 0, 0, 0
		s.shrink()
	case s.want > len(s.buf):
		s.grow(s.want)
	case s.end == len(s.buf) || s.at+s.want > len(s.buf):
		s.end = copy(s.buf, s.buf[s.at:s.end])
		s.from, s.at = 0, 0
	}
	n, err := s.r.Read(s.buf[s.end:])
	s.end += n
	if n > 0 {
		return nil
	}
	return err
}

// grow makes room for a frame that is longer to judge than the buffer.
func (s *frames) grow(n int) {
	b := make([]byte, n)
	s.end = copy(b, s.buf[s.at:s.end])
	s.from, s.at, s.buf = 0, 0, b
}

// shrink goes back to the small buffer, when nothing is in the large one.
func (s *frames) shrink() {
	s.buf = s.pooled[:]
	if s.held > 0 {
		s.reserve(-s.held)
		s.held = 0
	}
}

// reserve counts what connections hold of frames that are long to judge. A
// negative number gives back.
func (p *Proxy) reserve(bytes int) bool {
	if p.held.Add(int64(bytes)) > maxHeld && bytes > 0 {
		p.held.Add(int64(-bytes))
		return false
	}
	return true
}
