package mesh

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"hauberk.dev/mesh/hbone"
	"hauberk.dev/mesh/wire"
)

// side is one side of a spliced connection.
type side interface {
	io.ReadWriter
	// CloseWrite closes this side's sending half: the other reads to its end.
	CloseWrite() error
	// abort ends both halves at once, visibly: a reset, not an end.
	abort()
	// finish lets go of a side whose halves have ended.
	finish()
}

type tcpSide struct{ *wire.Conn }

func (t tcpSide) abort()  { t.Abort() }
func (t tcpSide) finish() { t.Close() }

type streamSide struct{ *hbone.Stream }

func (s streamSide) abort()  { s.Reset(hbone.CodeConnect) }
func (s streamSide) finish() { s.Reset(hbone.CodeNone) } // nothing, after an orderly end

// goneSide is a stream that has ended, of which something is still done with what
// it has brought.
type goneSide struct{}

func (goneSide) Read([]byte) (int, error)  { return 0, errGone }
func (goneSide) Write([]byte) (int, error) { return 0, errGone }
func (goneSide) CloseWrite() error         { return nil }
func (goneSide) abort()                    {}
func (goneSide) finish()                   {}

var errGone = errors.New("the stream has ended")

const bufferSize = 32 << 10

type buffer [hbone.Headroom + bufferSize]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

var errCut = errors.New("connection cut")

// halves are the directions of a spliced connection that have ended.
type halves struct {
	Out bool `json:"out,omitempty"` // from a to b
	In  bool `json:"in,omitempty"`
}

// splice moves bytes both ways until both halves have ended. sent counts what
// goes from a to b. h says which have ended before; what is returned, if it is
// frozen, which have now.
func splice(e *entry, a, b side, h halves) (frozen *halves) {
	var wg sync.WaitGroup
	var out, in ending
	if !h.In {
		wg.Go(func() { in = pump(e, b, a, &e.received) })
	}
	if !h.Out {
		out = pump(e, a, b, &e.sent)
	}
	wg.Wait()
	if out != endFailed && in != endFailed && (out == endFrozen || in == endFrozen) {
		return &halves{Out: out == endOrderly, In: in == endOrderly}
	}
	a.finish()
	b.finish()
	return nil
}

// ending is how a half stopped.
type ending int

const (
	endOrderly ending = iota
	endFailed
	endFrozen
)

// pump moves one way. An orderly end closes the half only; anything else ends
// both connections, so that neither side takes the rest for complete.
func pump(e *entry, from, to side, count *atomic.Uint64) ending {
	err := move(e, from, to, count)
	if err == nil {
		err = to.CloseWrite()
	}
	if errors.Is(err, wire.ErrFrozen) {
		return endFrozen
	}
	if err != nil {
		from.abort()
		to.abort()
		return endFailed
	}
	return endOrderly
}

func move(e *entry, from, to side, count *atomic.Uint64) error {
	if s, ok := from.(io.WriterTo); ok {
		_, err := s.WriteTo(&counter{e, to, count})
		return err
	}
	b := buffers.Get().(*buffer)
	defer buffers.Put(b)
	stream, framed := to.(framedWriter)
	for {
		n, err := from.Read(b[hbone.Headroom:])
		if n > 0 {
			if e.cut.Load() {
				return errCut
			}
			count.Add(uint64(n))
			var werr error
			if framed {
				_, werr = stream.WriteFramed(b[:hbone.Headroom+n])
			} else {
				_, werr = to.Write(b[hbone.Headroom : hbone.Headroom+n])
			}
			if werr != nil {
				return werr
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// counter counts what is written through it, and stops when the flow is cut.
type counter struct {
	e     *entry
	w     io.Writer
	count *atomic.Uint64
}

func (c *counter) Write(p []byte) (int, error) {
	if c.e.cut.Load() {
		return 0, errCut
	}
	c.count.Add(uint64(len(p)))
	return c.w.Write(p)
}
