package hbone

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// Nothing comes of a frame before it is there as a whole, so that a connection
// frozen in the middle of one goes on with its first byte.

// more reads n bytes more of what is held.
func (h *Conn) more(n int) ([]byte, error) {
	at := len(h.held)
	h.held = slices.Grow(h.held, n)[:at+n]
	k, err := io.ReadFull(h.r, h.held[at:])
	h.held = h.held[:at+k]
	return h.held[at:], err
}

func (h *Conn) read() error {
	for !h.frozen.Load() {
		head, err := h.more(h2frame.HeaderLen)
		if err != nil {
			return err
		}
		f := h2frame.Parse(head)
		if f.Length > maxFrame {
			return h2frame.Fault(h2frame.CodeFrameSize, "frame of %d bytes", f.Length)
		}
		if !h.settled && f.Kind != h2frame.Settings {
			return h2frame.Fault(h2frame.CodeProtocol, "the first frame is not SETTINGS")
		}
		if f.Kind == h2frame.Data {
			if err := h.readData(f); err != nil {
				return err
			}
			h.held = h.held[:0]
			continue
		}
		payload, err := h.more(f.Length)
		if err != nil {
			return err
		}
		if err := h.readFrame(f, payload); err != nil {
			return err
		}
		h.settled = true
		if h.held = h.held[:0]; cap(h.held) > smallFrame {
			h.held = nil
		}
	}
	return wire.ErrFrozen
}

func (h *Conn) readFrame(f h2frame.Header, p []byte) error {
	switch f.Kind {
	case h2frame.Headers:
		return h.readHeaders(f, p)
	case h2frame.Reset:
		return h.readReset(f, p)
	case h2frame.Settings:
		return h.readSettings(f, p)
	case h2frame.Ping:
		if len(p) != 8 || f.Stream != 0 {
			return h2frame.Fault(h2frame.CodeFrameSize, "malformed PING")
		}
		if !f.Has(h2frame.FlagAck) {
			h.enqueue(h2frame.Append(nil, h2frame.Ping, h2frame.FlagAck, 0, p))
			break
		}
		h.answered(p)
	case h2frame.GoAway:
		return h.readGoAway(f, p)
	case h2frame.Window:
		return h.readWindow(f, p)
	case h2frame.Push:
		return h2frame.Fault(h2frame.CodeProtocol, "PUSH_PROMISE is not taken")
	case h2frame.Continuation:
		return h2frame.Fault(h2frame.CodeProtocol, "CONTINUATION without HEADERS")
	case h2frame.Priority:
		if len(p) != 5 || f.Stream == 0 {
			return h2frame.Fault(h2frame.CodeFrameSize, "malformed PRIORITY")
		}
	}
	return nil // unknown frames are to be ignored
}

// stream finds an open stream; nil if it is closed already. Frames on a stream
// that was never opened end the connection.
func (h *Conn) stream(id uint32) (*Stream, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.streams[id]; s != nil {
		return s, nil
	}
	mine := id%2 == 1 == h.client
	if id == 0 || mine && id >= h.nextID || !mine && id > h.lastID {
		return nil, h2frame.Fault(h2frame.CodeProtocol, "frame on stream %d, which is not open", id)
	}
	return nil, nil
}

func (h *Conn) readData(f h2frame.Header) error {
	s, err := h.stream(f.Stream)
	if err != nil {
		return err
	}
	// The network is read without a lock: a peer that stops in the middle of a
	// frame must not keep the stream from being ended.
	c := chunks.Get().(*chunk)
	if n, err := io.ReadFull(h.r, c.buf[:f.Length]); err != nil {
		h.held = append(h.held, c.buf[:n]...)
		chunks.Put(c)
		return err
	}
	c.n = f.Length
	if f.Has(h2frame.FlagPadded) {
		body, _, err := h2frame.Unpad(f, c.buf[:f.Length])
		if err != nil {
			return err
		}
		c.n = copy(c.buf[:], body)
	}
	h.received += int64(f.Length)
	if h.received > connWindow/4 {
		h.enqueue(h2frame.Append(nil, h2frame.Window, 0, 0, u32(uint32(h.received))))
		h.received = 0
	}
	if s == nil {
		chunks.Put(c)
		return nil
	}
	if err := s.receive(c, f.Length); err != nil {
		return err
	}
	if f.Has(h2frame.FlagEndStream) {
		s.peerDone()
	}
	return nil
}

func (h *Conn) readHeaders(f h2frame.Header, p []byte) error {
	block, _, err := h2frame.Unpad(f, p)
	if err != nil {
		return err
	}
	if block, err = h.continued(f, slices.Clip(block)); err != nil {
		return err
	}
	fields, ok, err := h.fields.read(block)
	if err != nil {
		return err
	}
	m := readMessage(fields)
	if !ok {
		m.malformed = "too many fields"
	}
	if h.client {
		return h.readResponse(f, m)
	}
	return h.readRequest(f, m)
}

// continued appends CONTINUATION frames until the block is whole.
func (h *Conn) continued(f h2frame.Header, block []byte) ([]byte, error) {
	for f.Flags&h2frame.FlagEndHeaders == 0 {
		head, err := h.more(h2frame.HeaderLen)
		if err != nil {
			return nil, err
		}
		next := h2frame.Parse(head)
		if next.Kind != h2frame.Continuation || next.Stream != f.Stream || next.Length == 0 && !next.Has(h2frame.FlagEndHeaders) {
			return nil, h2frame.Fault(h2frame.CodeProtocol, "HEADERS are not continued")
		}
		if len(block)+next.Length > maxBlock {
			return nil, h2frame.Fault(h2frame.CodeCalm, "header block over %d bytes", maxBlock)
		}
		more, err := h.more(next.Length)
		if err != nil {
			return nil, err
		}
		block = append(block, more...)
		f.Flags |= next.Flags & h2frame.FlagEndHeaders
	}
	return block, nil
}

func (h *Conn) readResponse(f h2frame.Header, m message) error {
	s, err := h.stream(f.Stream)
	if err != nil || s == nil {
		return err
	}
	if m.malformed != "" || m.status == "" {
		s.fail(fmt.Errorf("malformed response: %s", m.malformed), h2frame.CodeProtocol)
		return nil
	}
	if len(m.status) == 3 && m.status[0] == '1' {
		return nil // informational: the answer is yet to come
	}
	s.setStatus(m)
	if f.Has(h2frame.FlagEndStream) {
		s.peerDone()
	}
	return nil
}

func (h *Conn) readRequest(f h2frame.Header, m message) error {
	h.mu.Lock()
	if s := h.streams[f.Stream]; s != nil {
		h.mu.Unlock()
		// Trailers: they carry nothing for a tunnel but its end.
		if f.Has(h2frame.FlagEndStream) {
			s.peerDone()
			return nil
		}
		return h2frame.Fault(h2frame.CodeProtocol, "second HEADERS on stream %d", f.Stream)
	}
	if f.Stream%2 == 0 || f.Stream <= h.lastID {
		h.mu.Unlock()
		return h2frame.Fault(h2frame.CodeProtocol, "stream %d cannot be opened", f.Stream)
	}
	h.lastID = f.Stream
	if h.draining || len(h.streams) >= MaxStreams {
		h.mu.Unlock()
		h.enqueue(h2frame.Append(nil, h2frame.Reset, 0, f.Stream, u32(uint32(h2frame.CodeRefused))))
		return nil
	}
	s := h.addLocked(f.Stream, m.authority)
	s.Fields, s.fresh, s.peerEnded = m.other, true, f.Has(h2frame.FlagEndStream)
	if m.malformed != "" || m.method != "CONNECT" || m.authority == "" {
		s.malformed = "want CONNECT with an authority"
	}
	// A peer that opens and resets faster than handlers end is an attack.
	tooMany := h.handlers >= 2*MaxStreams
	if !tooMany {
		h.attendLocked(s)
	}
	h.mu.Unlock()
	if tooMany {
		return h2frame.Fault(h2frame.CodeCalm, "streams are opened and reset too fast")
	}
	return nil
}

// attendLocked starts the handler of a new stream.
func (h *Conn) attendLocked(s *Stream) {
	h.handlers++
	go func() {
		defer h.leave(&h.handlers)
		h.mu.Lock()
		begin, freezes := s.fresh && !h.frozen.Load(), h.freezes
		if begin {
			s.fresh = false
		}
		h.mu.Unlock()
		switch {
		case !begin: // whoever thaws the connection does
		case s.malformed != "":
			s.Refuse(400, s.malformed)
		default:
			h.handle(s)
			h.overUnlessFrozen(s, freezes)
		}
	}()
}

func (h *Conn) readReset(f h2frame.Header, p []byte) error {
	if len(p) != 4 {
		return h2frame.Fault(h2frame.CodeFrameSize, "malformed RST_STREAM")
	}
	s, err := h.stream(f.Stream)
	if err != nil || s == nil {
		return err
	}
	code := Code(binary.BigEndian.Uint32(p))
	h.remove(s)
	if code == h2frame.CodeNone && s.noMore() {
		h.mu.Lock()
		h.window.Broadcast()
		h.mu.Unlock()
		return nil
	}
	s.end(&ResetError{code})
	return nil
}

func (h *Conn) readSettings(f h2frame.Header, p []byte) error {
	if f.Stream != 0 || len(p)%6 != 0 || f.Has(h2frame.FlagAck) && len(p) > 0 {
		return h2frame.Fault(h2frame.CodeFrameSize, "malformed SETTINGS")
	}
	if len(p) > 6*h2frame.MaxSettings {
		return h2frame.Fault(h2frame.CodeCalm, "%d settings at once; at most %d", len(p)/6, h2frame.MaxSettings)
	}
	if f.Has(h2frame.FlagAck) {
		return nil
	}
	if err := h.applySettings(p); err != nil {
		return err
	}
	h.enqueue(h2frame.Append(nil, h2frame.Settings, h2frame.FlagAck, 0, nil))
	return nil
}

func (h *Conn) applySettings(p []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ; len(p) > 0; p = p[6:] {
		v := binary.BigEndian.Uint32(p[2:])
		switch binary.BigEndian.Uint16(p) {
		case h2frame.SettingMaxStreams:
			h.streamsM = int(min(v, MaxStreams))
		case h2frame.SettingWindow:
			if v > 1<<31-1 {
				return h2frame.Fault(h2frame.CodeFlowControl, "initial window of %d", v)
			}
			for _, s := range h.streams {
				if s.window += int64(v) - h.initial; s.window > 1<<31-1 { // RFC 9113, 6.9.2
					return h2frame.Fault(h2frame.CodeFlowControl, "window of stream %d overflows", s.id)
				}
			}
			h.initial = int64(v)
			h.window.Broadcast()
		case h2frame.SettingMaxFrame:
			if v < 16<<10 || v > 1<<24-1 {
				return h2frame.Fault(h2frame.CodeProtocol, "maximum frame of %d", v)
			}
			h.frame = sendFrame(v)
		}
	}
	return nil
}

func (h *Conn) readGoAway(f h2frame.Header, p []byte) error {
	if f.Stream != 0 || len(p) < 8 {
		return h2frame.Fault(h2frame.CodeFrameSize, "malformed GOAWAY")
	}
	last, code := binary.BigEndian.Uint32(p)&0x7fffffff, Code(binary.BigEndian.Uint32(p[4:]))
	h.mu.Lock()
	h.draining = true
	var gone []*Stream
	for id, s := range h.streams {
		if h.client && id > last {
			gone = append(gone, s)
			delete(h.streams, id)
		}
	}
	h.mu.Unlock()
	for _, s := range gone {
		s.end(&ResetError{h2frame.CodeRefused})
	}
	if code != h2frame.CodeNone {
		return fmt.Errorf("the peer ended the connection: http/2 error %d", code)
	}
	return nil
}

func (h *Conn) readWindow(f h2frame.Header, p []byte) error {
	if len(p) != 4 {
		return h2frame.Fault(h2frame.CodeFrameSize, "malformed WINDOW_UPDATE")
	}
	n := int64(binary.BigEndian.Uint32(p) & 0x7fffffff)
	if n == 0 {
		return h2frame.Fault(h2frame.CodeProtocol, "WINDOW_UPDATE of nothing")
	}
	if f.Stream != 0 {
		s, err := h.stream(f.Stream)
		if err != nil || s == nil {
			return err
		}
		h.mu.Lock()
		s.window += n
		over := s.window > 1<<31-1
		h.window.Broadcast()
		h.mu.Unlock()
		if over {
			s.fail(errors.New("window overflow"), h2frame.CodeFlowControl)
		}
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.send += n
	h.window.Broadcast()
	if h.send > 1<<31-1 {
		return h2frame.Fault(h2frame.CodeFlowControl, "connection window overflow")
	}
	return nil
}
