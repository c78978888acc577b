package http2

import (
	"encoding/binary"

	"hauberk.dev/mesh/h2frame"
)

// mayReset takes a reset that comes from the peer or is its doing. Of a client's
// requests only those that were answered pay for some, else HEADERS with
// END_STREAM would earn what the reset after them costs.
func (c *Conn) mayReset() bool {
	if c.resets.left == 0 {
		c.mu.Lock()
		n := min(c.well, c.resets.most/2)
		c.well -= n
		c.mu.Unlock()
		c.resets.give(2 * n)
	}
	return c.resets.spend()
}

func (c *Conn) readReset(f h2frame.Header, p []byte) error {
	if len(p) != 4 {
		return h2frame.Fault(h2frame.CodeFrameSize, "RST_STREAM of %d bytes", len(p))
	}
	if !c.mayReset() {
		return h2frame.Fault(h2frame.CodeCalm, "streams are opened and reset too fast")
	}
	code := Code(binary.BigEndian.Uint32(p))
	c.mu.Lock()
	s := c.streams[f.Stream]
	if s == nil {
		err := c.notOpenLocked(f)
		c.unlock()
		return err
	}
	complete := s.peerEnded
	c.dropLocked(s, endTheirs)
	c.own = true
	c.unlock()
	mate := s.mate.Load()
	if mate == nil {
		s.resetByPeer(code)
		return nil
	}
	c.touch(mate.c)
	if c.client && complete {
		mate.stop(code) // it has all there is; only its sending is not wanted
	} else {
		mate.abandon(code)
	}
	return nil
}

func (c *Conn) readPing(f h2frame.Header, p []byte) error {
	switch {
	case f.Stream != 0:
		return h2frame.Fault(h2frame.CodeProtocol, "PING on stream %d", f.Stream)
	case len(p) != 8:
		return h2frame.Fault(h2frame.CodeFrameSize, "PING of %d bytes", len(p))
	case f.Has(h2frame.FlagAck):
		return nil
	}
	return c.reply(h2frame.Ping, h2frame.FlagAck, p)
}

// reply answers a frame that asks for it.
func (c *Conn) reply(kind, flags byte, p []byte) error {
	var b [h2frame.HeaderLen + 8]byte
	c.mu.Lock()
	fits := c.answerLocked(h2frame.Append(b[:0], kind, flags, 0, p))
	c.unlock()
	c.own = true
	return c.calm(fits)
}

func readPriority(f h2frame.Header, p []byte) error {
	switch {
	case f.Stream == 0:
		return h2frame.Fault(h2frame.CodeProtocol, "PRIORITY on stream 0")
	case len(p) != 5:
		return streamFault(f.Stream, h2frame.CodeFrameSize, "PRIORITY of %d bytes", len(p))
	case binary.BigEndian.Uint32(p)&0x7fffffff == f.Stream:
		return h2frame.Fault(h2frame.CodeProtocol, "stream %d depends on itself", f.Stream)
	}
	return nil
}

func (c *Conn) readSettings(f h2frame.Header, p []byte) error {
	switch {
	case f.Stream != 0:
		return h2frame.Fault(h2frame.CodeProtocol, "SETTINGS on stream %d", f.Stream)
	case len(p)%6 != 0 || f.Has(h2frame.FlagAck) && len(p) > 0:
		return h2frame.Fault(h2frame.CodeFrameSize, "SETTINGS of %d bytes", len(p))
	case len(p) > 6*h2frame.MaxSettings:
		return h2frame.Fault(h2frame.CodeCalm, "%d settings at once; at most %d", len(p)/6, h2frame.MaxSettings)
	case f.Has(h2frame.FlagAck):
		return nil
	}
	c.mu.Lock()
	var err error
	if !c.greeted { // who says nothing of streams takes any number
		c.greeted = true
		err = c.settingLocked(h2frame.SettingMaxStreams, MaxStreams)
	}
	for ; len(p) > 0 && err == nil; p = p[6:] {
		err = c.settingLocked(binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:]))
	}
	if err == nil {
		err = c.calm(c.answerLocked(h2frame.Append(nil, h2frame.Settings, h2frame.FlagAck, 0, nil)))
		c.fillLocked()
	}
	c.unlock()
	c.own = true
	return err
}

func (c *Conn) settingLocked(key uint16, v uint32) error {
	switch key {
	case h2frame.SettingTableSize:
		c.encoder.SetMaxDynamicTableSizeLimit(min(v, h2frame.TableSize))
		c.encoder.SetMaxDynamicTableSize(min(v, h2frame.TableSize))
	case h2frame.SettingPush:
		if v > 1 || v == 1 && c.client {
			return h2frame.Fault(h2frame.CodeProtocol, "ENABLE_PUSH of %d", v)
		}
	case h2frame.SettingMaxStreams:
		c.most = int(min(v, MaxStreams))
		for w := c.waiting.pop(); w != nil; w = c.waiting.pop() {
			c.ready.push(w) // and back, if there is no place yet
		}
	case h2frame.SettingWindow:
		if v > h2frame.MaxWindow {
			return h2frame.Fault(h2frame.CodeFlowControl, "initial window of %d", v)
		}
		for _, s := range c.streams {
			s.window += int64(v) - c.initial
			if s.window > h2frame.MaxWindow {
				return h2frame.Fault(h2frame.CodeFlowControl, "window of stream %d overflows", s.id)
			}
			c.unblockLocked(s)
		}
		c.initial = int64(v)
	case h2frame.SettingMaxFrame:
		if v < 16<<10 || v > 1<<24-1 {
			return h2frame.Fault(h2frame.CodeProtocol, "maximum frame of %d", v)
		}
	}
	return nil
}

// unblockLocked lets a stream go on whose window has grown.
func (c *Conn) unblockLocked(s *Stream) {
	if s.window > 0 && s.held > 0 && s.in == nil {
		c.ready.push(s)
	}
}

func (c *Conn) readWindow(f h2frame.Header, p []byte) error {
	if len(p) != 4 {
		return h2frame.Fault(h2frame.CodeFrameSize, "WINDOW_UPDATE of %d bytes", len(p))
	}
	n := int64(binary.BigEndian.Uint32(p) & 0x7fffffff)
	c.mu.Lock()
	defer c.unlock()
	if c.updates.left == 0 { // each frame sent pays for some
		n := min(c.frames-c.sent, uint64(c.updates.most/10))
		c.sent += n
		c.updates.give(int(10 * n))
	}
	if !c.updates.spend() {
		return h2frame.Fault(h2frame.CodeCalm, "too many WINDOW_UPDATE frames for what was sent")
	}
	if f.Stream != 0 {
		s := c.streams[f.Stream]
		switch {
		case s == nil:
			return c.notOpenLocked(f)
		case n == 0:
			return streamFault(f.Stream, h2frame.CodeProtocol, "WINDOW_UPDATE of nothing")
		}
		if s.window += n; s.window > h2frame.MaxWindow {
			return streamFault(f.Stream, h2frame.CodeFlowControl, "window overflow")
		}
		c.unblockLocked(s)
	} else {
		if n == 0 {
			return h2frame.Fault(h2frame.CodeProtocol, "WINDOW_UPDATE of nothing")
		}
		if c.window += n; c.window > h2frame.MaxWindow {
			return h2frame.Fault(h2frame.CodeFlowControl, "window of the connection overflows")
		}
		for s := c.blocked.pop(); s != nil; s = c.blocked.pop() {
			c.ready.push(s)
		}
	}
	before := len(c.out)
	c.fillLocked()
	c.own = c.own || len(c.out) > before || c.ready.first != nil
	return nil
}

func (c *Conn) readGoAway(f h2frame.Header, p []byte) error {
	switch {
	case f.Stream != 0:
		return h2frame.Fault(h2frame.CodeProtocol, "GOAWAY on stream %d", f.Stream)
	case len(p) < 8:
		return h2frame.Fault(h2frame.CodeFrameSize, "GOAWAY of %d bytes", len(p))
	case !c.afford():
		return h2frame.Fault(h2frame.CodeCalm, "too many GOAWAY frames")
	case !c.client:
		return nil // it opens no more streams; what is under way goes on
	}
	last := binary.BigEndian.Uint32(p) & 0x7fffffff
	c.mu.Lock()
	c.draining = true
	var gone []*Stream
	for id, s := range c.streams {
		if id > last {
			gone = append(gone, s)
		}
	}
	for _, l := range []*line{&c.ready, &c.waiting} {
		for s := l.first; s != nil; s = s.next {
			if s.id == 0 {
				gone = append(gone, s)
			}
		}
	}
	for _, s := range gone {
		c.dropLocked(s, endTheirs)
	}
	c.unlock()
	for _, s := range gone {
		if mate := s.mate.Load(); mate != nil {
			mate.abandon(h2frame.CodeRefused) // it was not looked at: the client may ask again
			c.touch(mate.c)
		} else {
			s.resetByPeer(h2frame.CodeRefused)
		}
	}
	if c.o.Draining != nil {
		c.o.Draining()
	}
	c.drained()
	return nil
}
