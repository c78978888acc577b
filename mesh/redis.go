package mesh

import (
	"fmt"

	"hauberk.dev/mesh/resp"
)

// redisCodec reads requests of Redis. A frame is the beginning of one, which is
// judged, or one argument after it, which goes the way of its beginning.
type redisCodec struct {
	command resp.Command
	more    bool // the frame is an argument
	size    int
	method  []byte
	known   bool // method is
	effect  resp.Effect
	buf     [2*resp.MaxName + 1]byte

	rest     int // arguments of the request that are to come
	dropping bool
	end      resp.End
}

func (c *redisCodec) measure(b []byte, _ bool) (size, look int, err error) {
	if c.more = c.rest > 0; c.more {
		c.size, look, err = resp.Argument(b)
		return c.size, look, err
	}
	c.command, err = resp.Begin(b)
	c.size = c.command.Size
	return c.size, c.command.Look, err
}

func (c *redisCodec) inspect([]byte, int) (kind rpcKind, answer bool, err error) {
	if c.more {
		return rpcMore, false, nil
	}
	c.method, c.known = c.command.Method(c.buf[:0])
	if c.effect = resp.EffectOf(c.method, c.command.Rest); c.effect == resp.Foreign {
		return 0, false, fmt.Errorf("redis: %s: what follows is not of this protocol; a port with protocol tcp passes it", c.method)
	}
	if !c.known { // too long to be read: it may be any
		c.effect = resp.Disorders
	}
	return rpcCall, true, nil
}

// asks is never so: answers of Redis are read by another codec.
func (c *redisCodec) asks([]byte) bool { return false }

func (c *redisCodec) target() (remote, error) {
	if !c.known {
		return remote{}, fmt.Errorf("the name of a command of none or more than %d bytes", resp.MaxName)
	}
	return remote{method: c.method, command: true}, nil
}

func (c *redisCodec) refuse(dst []byte, f fault, text string) []byte {
	code := "NOPERM"
	if f != faultDenied {
		code = "ERR"
	}
	return resp.AppendError(dst, code, text)
}

// alive is never asked for: a PING is a request like any other.
func (c *redisCodec) alive(dst []byte) []byte { return dst }

func (c *redisCodec) begin() { c.decide(false) }

func (c *redisCodec) skip() { c.decide(true) }

func (c *redisCodec) decide(dropping bool) {
	c.end.Begin(0)
	switch {
	case c.more:
		if c.rest--; !dropping {
			c.end.Begin(c.size)
		}
	default:
		c.rest, c.dropping = c.command.Rest, dropping
		if !dropping && c.command.Look < c.command.Size {
			c.end.Begin(c.size)
		}
	}
}

func (c *redisCodec) add(b []byte) error { return c.end.Add(b) }

func (c *redisCodec) progress() [3]uint32 {
	p := [3]uint32{uint32(c.rest), 0, c.end.Left()}
	if c.dropping {
		p[1] = 1
	}
	return p
}

func (c *redisCodec) resume(p [3]uint32) {
	c.rest, c.dropping = int(min(p[0], resp.MaxArguments)), p[1] != 0
	c.end.Resume(p[2])
}

func (c *redisCodec) passes() bool { return !c.dropping }

func (c *redisCodec) does() effect {
	switch c.effect {
	case resp.Opens:
		return effectOpens
	case resp.Closes:
		return effectCloses
	case resp.Disorders:
		return effectDisorders
	}
	return effectAnswer
}

func (c *redisCodec) answers() answerCodec { return &redisAnswers{} }

// redisAnswers follows what a server of Redis says.
type redisAnswers struct {
	answersOnly
	read resp.Answers
}

func (c *redisAnswers) measure(b []byte, _ bool) (size, look int, err error) {
	size, err = c.read.Measure(b)
	return size, 0, err // all of it passes unseen: no room is to be reserved
}

func (c *redisAnswers) begin()              { c.read.Begin() }
func (c *redisAnswers) add(b []byte) error  { return c.read.Add(b) }
func (c *redisAnswers) progress() [3]uint32 { return c.read.Progress() }
func (c *redisAnswers) resume(p [3]uint32)  { c.read.Resume(p) }
func (c *redisAnswers) within() bool        { return c.read.Within() }
func (c *redisAnswers) asked() bool         { return !c.read.Push() }
