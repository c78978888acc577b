package mesh

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"hauberk.dev/mesh/hbone"
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

type tcpSide struct{ *net.TCPConn }

func (t tcpSide) abort()  { abortTCP(t.TCPConn) }
func (t tcpSide) finish() { t.Close() }

func abortTCP(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

type streamSide struct{ *hbone.Stream }

func (s streamSide) abort()  { s.Reset(hbone.CodeConnect) }
func (s streamSide) finish() { s.Reset(hbone.CodeNone) } // nothing, after an orderly end

const bufferSize = 32 << 10

type buffer [hbone.Headroom + bufferSize]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

var errCut = errors.New("connection cut")

// splice moves bytes both ways until both halves have ended. sent counts what
// goes from a to b.
func splice(e *entry, a, b side) {
	var wg sync.WaitGroup
	wg.Go(func() { pump(e, b, a, &e.received) })
	pump(e, a, b, &e.sent)
	wg.Wait()
	a.finish()
	b.finish()
}

// pump moves one way. An orderly end closes the half only; anything else ends
// both connections, so that neither side takes the rest for complete.
func pump(e *entry, from, to side, count *atomic.Uint64) {
	err := move(e, from, to, count)
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		from.abort()
		to.abort()
	}
}

func move(e *entry, from, to side, count *atomic.Uint64) error {
	if s, ok := from.(streamSide); ok {
		_, err := s.WriteTo(&counter{e, to, count})
		return err
	}
	b := buffers.Get().(*buffer)
	defer buffers.Put(b)
	stream, framed := to.(streamSide)
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
