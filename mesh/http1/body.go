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
	r.Begin(h)
	return r.Continue(out)
}

// Begin has the reader Continue with the body that belongs to a head.
func (r *Reader) Begin(h *Head) { r.body.Start(h.Framing, h.Length) }

// Continue copies the rest of a body of which the reader has copied a part, or
// that it was told of by Resume. It may be called again after an error of the
// connection that was none.
func (r *Reader) Continue(out *bufio.Writer) error {
	for !r.body.Ended() {
		b, _ := r.R.Peek(r.R.Buffered())
		_, used, err := r.body.Next(b)
		if err != nil {
			return err
		}
		if _, err := out.Write(b[:used]); err != nil {
			return err
		}
		r.R.Discard(used)
		if used > 0 || r.body.Ended() {
			continue
		}
		if err := out.Flush(); err != nil {
			return err
		}
		if _, err := r.R.Peek(len(b) + 1); err == io.EOF {
			return r.body.End()
		} else if err != nil {
			return err
		}
	}
	return nil
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

// checkTrailer refuses a field that would change the framing or the routing of
// the message it follows, or who sends it (RFC 9110 section 6.5.1): some servers
// put trailers among the fields that were judged.
func checkTrailer(line []byte) error {
	name, value, ok := bytes.Cut(line[:len(line)-2], []byte(":"))
	if !ok || !isToken(name) || !isValue(value) {
		return malformed("trailer field %.40q", name)
	}
	for _, no := range [...]string{"Content-Length", "Transfer-Encoding", "Host", "Connection", "Upgrade", "Expect", "TE", "Authorization", "Proxy-Authorization", "Cookie"} {
		if is(name, no) {
			return malformed("%s in a trailer", name)
		}
	}
	return nil
}
