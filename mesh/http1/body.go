package http1

import (
	"bufio"
	"bytes"
	"io"
)

const (
	maxChunkLine = 256
	maxTrailer   = 8 << 10
)

// Forward writes the head and copies the body that belongs to it, checking its
// framing on the way. A small message leaves in one write.
func (r *Reader) Forward(w io.Writer, h *Head) error {
	out, ok := w.(*bufio.Writer)
	if !ok {
		out = bufio.NewWriterSize(w, 16<<10)
	}
	if _, err := out.Write(h.Raw); err != nil {
		return err
	}
	if err := r.ForwardBody(out, h); err != nil {
		out.Flush()
		return err
	}
	return out.Flush()
}

// ForwardBody copies the body only. What has arrived is sent before more is
// waited for.
func (r *Reader) ForwardBody(out *bufio.Writer, h *Head) error {
	switch h.Framing {
	case Length:
		return r.copy(out, h.Length)
	case Chunked:
		return r.chunks(out)
	case UntilClose:
		for {
			if err := r.some(out, 1<<62); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *Reader) copy(out *bufio.Writer, n int64) error {
	for n > 0 {
		before := n
		if err := r.somePart(out, &n); err == io.EOF {
			return io.ErrUnexpectedEOF
		} else if err != nil {
			return err
		}
		if n == before {
			return io.ErrNoProgress
		}
	}
	return nil
}

func (r *Reader) some(out *bufio.Writer, limit int64) error { return r.somePart(out, &limit) }

// somePart copies what is buffered, up to *n, and lowers *n.
func (r *Reader) somePart(out *bufio.Writer, n *int64) error {
	if r.R.Buffered() == 0 {
		if err := out.Flush(); err != nil {
			return err
		}
		if _, err := r.R.Peek(1); err != nil {
			return err
		}
	}
	b, _ := r.R.Peek(int(min(int64(r.R.Buffered()), *n)))
	if _, err := out.Write(b); err != nil {
		return err
	}
	r.R.Discard(len(b))
	*n -= int64(len(b))
	return nil
}

// chunks copies a chunked body with its trailer.
func (r *Reader) chunks(out *bufio.Writer) error {
	for {
		line, err := r.line(out, maxChunkLine)
		if err != nil {
			return err
		}
		size, err := chunkSize(line)
		if err != nil {
			return err
		}
		if _, err := out.Write(line); err != nil {
			return err
		}
		if size == 0 {
			return r.trailer(out)
		}
		if err := r.copy(out, size); err != nil {
			return err
		}
		end, err := r.line(out, 2)
		if err != nil {
			return err
		}
		if _, err := out.Write(end); err != nil {
			return err
		}
	}
}

// line reads one line of at most limit bytes, with its end.
func (r *Reader) line(out *bufio.Writer, limit int) ([]byte, error) {
	if r.R.Buffered() == 0 {
		if err := out.Flush(); err != nil {
			return nil, err
		}
	}
	line, err := r.R.ReadSlice('\n')
	switch {
	case err == io.EOF:
		return nil, io.ErrUnexpectedEOF
	case err == bufio.ErrBufferFull || err == nil && len(line) > limit:
		return nil, malformed("line over %d bytes in a chunked body", limit)
	case err != nil:
		return nil, err
	case !bytes.HasSuffix(line, []byte("\r\n")) || bytes.IndexByte(line[:len(line)-2], '\r') >= 0:
		return nil, malformed("a line of a chunked body does not end in CR LF")
	}
	return line, nil
}

// chunkSize reads a chunk line. Extensions are passed on if they are plain.
func chunkSize(line []byte) (int64, error) {
	line = line[:len(line)-2]
	digits, ext, has := bytes.Cut(line, []byte(";"))
	if len(digits) == 0 || len(digits) > 15 || has && !isValue(ext) {
		return 0, malformed("chunk size %.40q", line)
	}
	var n int64
	for _, c := range digits {
		if !isHex(c) {
			return 0, malformed("chunk size %.40q", line)
		}
		n = n<<4 | int64(unhex(c))
	}
	return n, nil
}

// trailer copies the fields after the last chunk. Those that would change the
// framing or the routing of a message are refused.
func (r *Reader) trailer(out *bufio.Writer) error {
	for total := 0; ; {
		line, err := r.line(out, maxTrailer)
		if err != nil {
			return err
		}
		if total += len(line); total > maxTrailer {
			return malformed("trailer over %d bytes", maxTrailer)
		}
		if len(line) > 2 {
			if err := checkTrailer(line); err != nil {
				return err
			}
		}
		if _, err := out.Write(line); err != nil {
			return err
		}
		if len(line) == 2 {
			return nil
		}
	}
}

// checkTrailer refuses a field that would change the framing or the routing of
// the message it follows.
func checkTrailer(line []byte) error {
	name, value, ok := bytes.Cut(line[:len(line)-2], []byte(":"))
	if !ok || !isToken(name) || !isValue(value) {
		return malformed("trailer field %.40q", name)
	}
	if is(name, "Content-Length") || is(name, "Transfer-Encoding") || is(name, "Host") {
		return malformed("%s in a trailer", name)
	}
	return nil
}
