package trace

import (
	"errors"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
)

// Keys of SOFATracer in the header of a frame of bolt. Attachments of Dubbo have
// them without the beginning.
const (
	sofaPrefix   = "rpc_trace_context."
	sofaTraceKey = "sofaTraceId"
	sofaSpanKey  = "sofaRpcId"
)

// maxPairs bounds what is read of a header or of attachments.
const maxPairs = 256

var errPairs = errors.New("too many pairs to look for a trace in")

// Call is where a call of bolt or Dubbo stands in its trace.
type Call struct {
	Context
	// Known says that the call has told its trace.
	Known bool
	// Parent of W3C as it stands in the frame, nil if it does not, or not so that
	// it can be written anew there.
	place []byte
	end   int // of the attachments
}

// OfBolt reads the header of a call of bolt. Its body is not looked at.
func OfBolt(h bolt.Header, perMille int) (Call, error) {
	var r Reader
	var c Call
	for n := 0; ; n++ {
		key, value, rest, ok, err := h.Next()
		if err == nil && n > maxPairs {
			err = errPairs
		}
		if err != nil {
			return c, err
		}
		if !ok {
			break
		}
		h = rest
		c.pair(&r, key, value, true)
	}
	c.read(&r, perMille)
	return c, nil
}

// OfDubbo reads the attachments of a call of Dubbo, whose frame must be there as a
// whole.
func OfDubbo(from *dubbo.Reader, f *dubbo.Frame, perMille int) (Call, error) {
	var r Reader
	var c Call
	n := 0
	end, err := from.Attachments(f, func(key, value []byte, inPlace bool) {
		if n++; n <= maxPairs {
			c.pair(&r, key, value, inPlace)
		}
	})
	if err == nil && n > maxPairs {
		err = errPairs
	}
	if err != nil {
		return Call{}, err
	}
	c.end = end
	c.read(&r, perMille)
	return c, nil
}

func (c *Call) pair(r *Reader, key, value []byte, inPlace bool) {
	if len(value) > maxValue {
		return
	}
	switch string(key) {
	case parentField:
		if r.parent = string(value); inPlace && c.place == nil {
			c.place = value
		} else {
			c.place = nil // there are two
		}
	case sofaTraceKey, sofaPrefix + sofaTraceKey:
		r.sofaTrace = string(value)
	case sofaSpanKey, sofaPrefix + sofaSpanKey:
		r.sofaSpan = string(value)
	case b3Field:
		r.b3 = string(value)
	}
}

func (c *Call) read(r *Reader, perMille int) {
	c.Context = r.Next(perMille)
	c.Known = !c.Began()
	if c.forms != w3c || c.Context.Parent == [8]byte{} || len(c.place) != parentLen {
		c.place = nil
	}
}

// parentLen is how long a traceparent is that we write.
const parentLen = 55

// Rewrite writes this hop into the frame where the one before stands. Its length
// stays. It says whether it has written; a sum over the frame is then to be renewed.
func (c *Call) Rewrite() bool {
	if c.place == nil {
		return false
	}
	copy(c.place, c.Fields()[0][1])
	return true
}

// ForBolt are the pairs that begin the trace in the header of a call of bolt, and
// ForDubbo in the attachments of one of Dubbo: SOFATracer's and those of W3C.
func (c *Call) ForBolt() [][2]string {
	return append(c.Fields(), [2]string{sofaPrefix + sofaTraceKey, c.ID()}, [2]string{sofaPrefix + sofaSpanKey, "0"})
}

// ForDubbo is told at ForBolt.
func (c *Call) ForDubbo() [][2]string {
	return append(c.Fields(), [2]string{sofaTraceKey, c.ID()}, [2]string{sofaSpanKey, "0"})
}

// Attachments is where in the body those of Dubbo end.
func (c *Call) Attachments() int { return c.end }
