package http1

import (
	"bytes"
	"errors"
	"io"
)

// Payload takes a body out of its framing as it arrives, at whatever bytes what
// arrives is split.
type Payload struct {
	framing Framing
	left    int64 // of the body, or of the chunk
	state   chunkState
	trailer int
	ended   bool
}

type chunkState uint8

const (
	chunkLine chunkState = iota
	chunkData
	chunkEnd
	chunkTrailer
)

// Start begins a body.
func (p *Payload) Start(f Framing, length int64) {
	*p = Payload{framing: f, left: length, ended: f == NoBody || f == Length && length == 0}
}

// Ended says that the body is complete.
func (p *Payload) Ended() bool { return p.ended }

// Left is how many bytes are still to come, if the framing tells.
func (p *Payload) Left() (n int64, known bool) { return p.left, p.framing == Length }

// Progress is how far a Payload has come, as plain data.
type Progress struct {
	Framing Framing `json:"framing"`
	Left    int64   `json:"left,omitempty"`
	State   uint8   `json:"state,omitempty"`
	Trailer int     `json:"trailer,omitempty"`
	Ended   bool    `json:"ended,omitempty"`
}

// Progress tells how far the body has come.
func (p *Payload) Progress() Progress {
	return Progress{p.framing, p.left, uint8(p.state), p.trailer, p.ended}
}

// Resume goes on with a body that has come so far.
func (p *Payload) Resume(g Progress) error {
	if g.Framing < NoBody || g.Framing > UntilClose || g.Left < 0 || g.State > uint8(chunkTrailer) || g.Trailer < 0 || g.Trailer > maxTrailer {
		return errors.New("resume body: it cannot have come so far")
	}
	*p = Payload{g.Framing, g.Left, chunkState(g.State), g.Trailer, g.Ended}
	return nil
}

// Next takes one piece of the body from the beginning of b. used bytes of b are
// done with; data is that part of them which is payload. Without data and not
// Ended, more bytes must come.
func (p *Payload) Next(b []byte) (data []byte, used int, err error) {
	switch {
	case p.ended:
		return nil, 0, nil
	case p.framing == UntilClose:
		return b, len(b), nil
	case p.framing == Length:
		data = b[:min(int64(len(b)), p.left)]
		p.left -= int64(len(data))
		p.ended = p.left == 0
		return data, len(data), nil
	}
	for {
		if p.state == chunkData {
			n := int(min(int64(len(b)-used), p.left))
			if n == 0 {
				return nil, used, nil
			}
			data = b[used : used+n]
			if p.left -= int64(n); p.left == 0 {
				p.state = chunkEnd
			}
			return data, used + n, nil
		}
		line, err := wholeLine(b[used:], p.state)
		if line == nil || err != nil {
			return nil, used, err
		}
		used += len(line)
		if err := p.line(line); err != nil || p.ended {
			return nil, used, err
		}
	}
}

// End says what the end of the connection means: io.ErrUnexpectedEOF inside a
// body that does not end so.
func (p *Payload) End() error {
	if p.ended || p.framing == UntilClose {
		p.ended = true
		return nil
	}
	return io.ErrUnexpectedEOF
}

// wholeLine is the line at the beginning of b, with its end, or nil.
func wholeLine(b []byte, s chunkState) ([]byte, error) {
	limit := maxChunkLine
	switch s {
	case chunkEnd:
		limit = 2
	case chunkTrailer:
		limit = maxTrailer
	}
	end := bytes.IndexByte(b[:min(len(b), limit)], '\n')
	switch {
	case end < 0 && len(b) >= limit:
		return nil, malformed("line over %d bytes in a chunked body", limit)
	case end < 0:
		return nil, nil
	case end == 0 || b[end-1] != '\r' || bytes.IndexByte(b[:end-1], '\r') >= 0:
		return nil, malformed("a line of a chunked body does not end in CR LF")
	}
	return b[:end+1], nil
}

func (p *Payload) line(line []byte) (err error) {
	switch p.state {
	case chunkLine:
		if p.left, err = chunkSize(line); err != nil {
			return err
		}
		p.state = chunkData
		if p.left == 0 {
			p.state = chunkTrailer
		}
	case chunkEnd:
		if len(line) != 2 {
			return malformed("a chunk is longer than it says")
		}
		p.state = chunkLine
	case chunkTrailer:
		if p.trailer += len(line); p.trailer > maxTrailer {
			return malformed("trailer over %d bytes", maxTrailer)
		}
		if len(line) == 2 {
			p.ended = true
			return nil
		}
		return checkTrailer(line)
	}
	return nil
}
