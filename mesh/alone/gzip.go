package alone

import (
	"compress/gzip"
	"io"
	"strconv"
	"strings"
	"sync"
)

// squeezers are compressors at rest, by level.
var squeezers [gzip.BestCompression + 1]sync.Pool

// compressor writes a body compressed and chunked.
type compressor struct {
	out   *outflow
	plain bool // HTTP/2 frames it
	z     *gzip.Writer
	level int
}

// compression says whether an answer of that type and length (-1: not known) is
// to be compressed.
func (s *session) compression(a *action, kind string, length int64, whole bool) bool {
	g := a.route.Gzip
	if g == nil || !whole || s.req.Minor == 0 || string(s.req.Method) == "HEAD" || length >= 0 && length < int64(g.Min) {
		return false
	}
	return g.takes(kind) && accepts(&s.req, "gzip")
}

func (g *Gzip) takes(kind string) bool {
	kind, _, _ = strings.Cut(kind, ";")
	for _, t := range g.Types {
		if strings.EqualFold(strings.TrimSpace(kind), t) || t == "*" {
			return true
		}
	}
	return false
}

func (s *session) compressor(a *action) *compressor {
	level := a.route.Gzip.Level
	var to io.Writer = chunker{&s.out}
	if s.two != nil {
		to = pourer{&s.out}
	}
	z, ok := squeezers[level].Get().(*gzip.Writer)
	if ok {
		z.Reset(to)
	} else {
		z, _ = gzip.NewWriterLevel(to, level) // the level was checked
	}
	return &compressor{&s.out, s.two != nil, z, level}
}

func (c *compressor) Write(p []byte) (int, error) { return c.z.Write(p) }

// pass sends what has been compressed, so that the client need not wait for more.
func (c *compressor) pass() error { return c.z.Flush() }

func (c *compressor) close() error {
	if err := c.z.Close(); err != nil {
		return err
	}
	c.z.Reset(io.Discard)
	squeezers[c.level].Put(c.z)
	c.z = nil
	if c.plain {
		return nil
	}
	return c.out.write(last)
}

// drop forgets a compressor that did not come to its end.
func (c *compressor) drop() { c.z = nil }

// chunker writes what it gets in chunks.
type chunker struct{ out *outflow }

func (c chunker) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := writeChunk(c.out, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// pourer writes what it gets as it is.
type pourer struct{ out *outflow }

func (c pourer) Write(p []byte) (int, error) {
	if err := c.out.write(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func writeChunk(out *outflow, p []byte) error {
	const longest = 20 // of a chunk's line
	if b := out.buffer(); cap(b)-len(b) < longest {
		if err := out.flush(); err != nil {
			return err
		}
	}
	b := strconv.AppendInt(out.buffer(), int64(len(p)), 16)
	if err := out.kept(append(b, "\r\n"...)); err != nil {
		return err
	}
	if err := out.write(p); err != nil {
		return err
	}
	return out.write(crlf)
}

var (
	crlf = []byte("\r\n")
	last = []byte("0\r\n\r\n")
)
