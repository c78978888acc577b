package alone

import (
	"errors"
	"io"
	"sync"

	"hauberk.dev/mesh/http1"
)

// blockSize holds the longest head and enough of a body besides.
const (
	blockSize = 32 << 10
	maxHead   = 16 << 10
)

type block [blockSize]byte

var blocks = sync.Pool{New: func() any { return new(block) }}

// inflow is a connection and what has been read of it. It holds a block only
// while there is something to hold.
type inflow struct {
	r    io.Reader
	b    *block
	hold int // bytes in front that stay: a head
	at   int // where what is not yet taken begins
	end  int
}

var errFull = errors.New("no room left")

func (f *inflow) take() {
	if f.b == nil {
		f.b = blocks.Get().(*block)
		f.hold, f.at, f.end = 0, 0, 0
	}
}

// release gives the block back, unless something is in it.
func (f *inflow) release() {
	if f.b != nil && f.at == f.end {
		f.drop()
	}
}

func (f *inflow) drop() {
	if f.b != nil {
		blocks.Put(f.b)
		f.b = nil
	}
	f.hold, f.at, f.end = 0, 0, 0
}

// waiting is what has been read and not taken.
func (f *inflow) waiting() []byte {
	if f.b == nil {
		return nil
	}
	return f.b[f.at:f.end]
}

// fill reads once. What is held stays where it is.
func (f *inflow) fill() error {
	f.take()
	if f.at == f.end {
		f.at, f.end = f.hold, f.hold
	}
	if f.end == len(f.b) && f.at > f.hold {
		n := copy(f.b[f.hold:], f.b[f.at:f.end])
		f.at, f.end = f.hold, f.hold+n
	}
	if f.end == len(f.b) {
		return errFull
	}
	n, err := f.r.Read(f.b[f.end:])
	f.end += n
	if n > 0 {
		return nil
	}
	if err == nil {
		return io.ErrNoProgress
	}
	return err
}

// rewind moves what is not taken to the front and holds nothing.
func (f *inflow) rewind() {
	if f.b == nil {
		return
	}
	n := copy(f.b[:], f.b[f.at:f.end])
	f.hold, f.at, f.end = 0, 0, n
}

// errHead is a head that is too long.
var errHead = errors.New("head is too long")

// head reads a whole message head and holds it. begun says whether anything of
// it has come.
func (f *inflow) head(limit int) (head []byte, begun bool, err error) {
	f.rewind()
	f.take()
	for looked := 0; ; {
		n, l, err := http1.HeadLength(f.b[:min(f.end, limit)], looked)
		if err != nil {
			return nil, true, err
		}
		if n > 0 {
			f.hold, f.at = n, n
			return f.b[:n], true, nil
		}
		if looked = l; f.end >= limit {
			return nil, true, errHead
		}
		if err := f.fill(); err != nil {
			if err == io.EOF && f.end > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, f.end > 0, err
		}
	}
}

// outflow gathers what is written, so that a small message leaves at once.
type outflow struct {
	w    io.Writer
	b    *block
	n    int
	sent int64
}

// buffer is room to append to; kept tells what was appended.
func (f *outflow) buffer() []byte {
	if f.b == nil {
		f.b = blocks.Get().(*block)
		f.n = 0
	}
	return f.b[:f.n]
}

// kept takes what was appended to buffer's bytes. Longer ones than a block are
// written.
func (f *outflow) kept(b []byte) error {
	if len(b) <= len(f.b) {
		f.n = len(b) // the same bytes: a block never grows in place
		return nil
	}
	f.n = 0
	return f.through(b)
}

func (f *outflow) write(p []byte) error {
	f.buffer()
	if f.n+len(p) <= len(f.b) {
		f.n += copy(f.b[f.n:], p)
		return nil
	}
	if err := f.flush(); err != nil {
		return err
	}
	if len(p) < len(f.b)/2 {
		f.n = copy(f.b[:], p)
		return nil
	}
	return f.through(p)
}

func (f *outflow) through(p []byte) error {
	n, err := f.w.Write(p)
	f.sent += int64(n)
	return err
}

func (f *outflow) flush() error {
	if f.n == 0 {
		return nil
	}
	n := f.n
	f.n = 0
	return f.through(f.b[:n])
}

func (f *outflow) drop() {
	if f.b != nil {
		blocks.Put(f.b)
		f.b = nil
	}
	f.n = 0
}
