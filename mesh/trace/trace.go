// Package trace carries the trace that a request belongs to from one hop to the
// next, and tells of the hop.
//
// It reads and writes the words of W3C Trace Context, of B3 (in one field or
// several) and of SOFATracer. What a client says of its trace is believed as
// far as ids go and no further. The package judges nothing.
package trace

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"math/rand/v2"
	"strings"
)

// Names of the fields, in lower case.
const (
	parentField    = "traceparent"
	b3Field        = "b3"
	b3Trace        = "x-b3-traceid"
	b3Span         = "x-b3-spanid"
	b3Parent       = "x-b3-parentspanid"
	b3Sampled      = "x-b3-sampled"
	b3Flags        = "x-b3-flags"
	sofaTraceField = "sofa-traceid"
	sofaSpanField  = "sofa-rpcid"
)

const (
	maxSofa  = 64  // bytes of an id of SOFATracer
	maxValue = 256 // of a field
)

// form is a set of ways to write a trace down.
type form uint8

const (
	w3c form = 1 << iota
	b3Single
	b3Multi
)

// Context is where a request stands in its trace.
type Context struct {
	Trace   [16]byte
	Span    [8]byte // of this hop
	Parent  [8]byte // of the hop before, zero at the beginning of a trace
	Sampled bool
	// SofaTrace and SofaSpan are SOFATracer's ids, which pass as they came.
	SofaTrace, SofaSpan string

	forms form
}

// Reader gathers the fields of a request that say something of its trace.
type Reader struct {
	parent, b3                  string
	trace, span, sampled, flags string
	sofaTrace, sofaSpan         string
}

// Field takes a field; other fields are none of its business.
func (r *Reader) Field(name, value string) {
	if len(name) > len(b3Parent) {
		return
	}
	to := (*string)(nil)
	switch {
	case strings.EqualFold(name, parentField):
		to = &r.parent
	case strings.EqualFold(name, b3Field):
		to = &r.b3
	case strings.EqualFold(name, b3Trace):
		to = &r.trace
	case strings.EqualFold(name, b3Span):
		to = &r.span
	case strings.EqualFold(name, b3Sampled):
		to = &r.sampled
	case strings.EqualFold(name, b3Flags):
		to = &r.flags
	case strings.EqualFold(name, sofaTraceField):
		to = &r.sofaTrace
	case strings.EqualFold(name, sofaSpanField):
		to = &r.sofaSpan
	}
	if to != nil {
		*to = value
	}
}

// Bytes is Field for a name and a value whose bytes stay whose they are. It copies
// what it takes, and nothing else.
func (r *Reader) Bytes(name, value []byte) {
	if len(name) > len(b3Parent) || len(name) < len(b3Field) || len(value) > maxValue {
		return
	}
	switch name[0] | 0x20 {
	case 't', 'b', 'x', 's':
		r.Field(string(name), string(value)) // the name does not stay
	}
}

// Next is the next hop of the trace that was read, or the first of a new one,
// of which perMille are sampled.
func (r *Reader) Next(perMille int) Context {
	var c Context
	switch {
	case r.readParent(&c):
		c.forms = w3c
	case r.readB3(&c):
		c.forms = b3Single
	case r.readMulti(&c):
		c.forms = b3Multi
	default:
		c.forms, c.Sampled = w3c, Sample(perMille)
		random(c.Trace[:])
	}
	if r.parent == "" {
		// A trace of SOFATracer has ids of another shape: it is the same one for
		// all its hops.
		if isSofa(r.sofaTrace) && c.Parent == [8]byte{} {
			sum := sha256.Sum256([]byte(r.sofaTrace))
			copy(c.Trace[:], sum[:])
		}
	}
	if isSofa(r.sofaTrace) {
		c.SofaTrace = r.sofaTrace
	}
	if isSofa(r.sofaSpan) {
		c.SofaSpan = r.sofaSpan
	}
	random(c.Span[:])
	return c
}

// Sample decides for a trace of which nobody did.
func Sample(perMille int) bool { return rand.IntN(1000) < perMille }

// random fills an id, which is never zero.
func random(b []byte) {
	for i := 0; i < len(b); i += 8 {
		v := rand.Uint64() | 1
		for k := range 8 {
			b[i+k] = byte(v >> (8 * k))
		}
	}
}

func isSofa(s string) bool {
	if s == "" || len(s) > maxSofa {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '.' && c != '-' {
			return false
		}
	}
	return true
}

// readParent reads traceparent: version, trace, span, flags.
func (r *Reader) readParent(c *Context) bool {
	s := r.parent
	if len(s) < 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' || s[:2] == "ff" || len(s) > 55 && (s[:2] == "00" || s[55] != '-') {
		return false
	}
	var version, flags [1]byte
	ok := unhex(version[:], s[:2]) && unhex(c.Trace[:], s[3:35]) && unhex(c.Parent[:], s[36:52]) && unhex(flags[:], s[53:55]) &&
		c.Trace != [16]byte{} && c.Parent != [8]byte{}
	if !ok {
		c.Trace, c.Parent = [16]byte{}, [8]byte{}
		return false
	}
	c.Sampled = flags[0]&1 != 0
	return true
}

// readB3 reads b3: trace, span, and maybe whether it is sampled and by whom it
// was asked for.
func (r *Reader) readB3(c *Context) bool {
	parts := strings.Split(r.b3, "-")
	if len(parts) < 2 || len(parts) > 4 {
		return false
	}
	sampled := ""
	if len(parts) > 2 {
		sampled = parts[2]
	}
	return readIDs(c, parts[0], parts[1], sampled == "1" || sampled == "d")
}

func (r *Reader) readMulti(c *Context) bool {
	return readIDs(c, r.trace, r.span, r.sampled == "1" || r.sampled == "true" || r.flags == "1")
}

// readIDs reads ids of B3, of which that of a trace may have half the length.
func readIDs(c *Context, trace, span string, sampled bool) bool {
	if len(trace) == 16 {
		trace = "0000000000000000" + trace
	}
	if !unhex(c.Trace[:], trace) || !unhex(c.Parent[:], span) || c.Trace == [16]byte{} || c.Parent == [8]byte{} {
		c.Trace, c.Parent = [16]byte{}, [8]byte{}
		return false
	}
	c.Sampled = sampled
	return true
}

// unhex reads lower-case hexadecimal of just the right length.
func unhex(to []byte, s string) bool {
	if len(s) != 2*len(to) || strings.ToLower(s) != s {
		return false
	}
	_, err := hex.Decode(to, []byte(s))
	return err == nil
}

// Replaces tells whether a field is written anew by Fields.
func (c *Context) Replaces(name []byte) bool {
	is := func(s string) bool { return len(name) == len(s) && strings.EqualFold(string(name), s) }
	switch c.forms {
	case w3c:
		return is(parentField)
	case b3Single:
		return is(b3Field)
	}
	return is(b3Trace) || is(b3Span) || is(b3Parent) || is(b3Sampled)
}

// Fields are what the next hop is told, in the words that the hop before used;
// of a new trace, those of W3C.
func (c *Context) Fields() [][2]string {
	trace, span, sampled := hex.EncodeToString(c.Trace[:]), hex.EncodeToString(c.Span[:]), "0"
	if c.Sampled {
		sampled = "1"
	}
	switch c.forms {
	case b3Single:
		return [][2]string{{b3Field, trace + "-" + span + "-" + sampled + "-" + hex.EncodeToString(c.Parent[:])}}
	case b3Multi:
		return [][2]string{{b3Trace, trace}, {b3Span, span}, {b3Parent, hex.EncodeToString(c.Parent[:])}, {b3Sampled, sampled}}
	}
	return [][2]string{{parentField, "00-" + trace + "-" + span + "-0" + sampled}}
}

// Rewrite writes the fields into the head of a request of HTTP/1, which is whole
// and well formed.
func (c *Context) Rewrite(head []byte) []byte {
	out := make([]byte, 0, len(head)+256)
	for first := true; len(head) > 2; first = false {
		end := bytes.IndexByte(head, '\n') + 1
		if end == 0 {
			break
		}
		line := head[:end]
		head = head[end:]
		if name, _, ok := bytes.Cut(line, []byte(":")); !first && ok && c.Replaces(name) {
			continue
		}
		out = append(out, line...)
	}
	return append(c.AppendFields(out), head...)
}

// AppendFields appends Fields as lines of a head of HTTP/1.
func (c *Context) AppendFields(b []byte) []byte {
	for _, f := range c.Fields() {
		b = append(append(append(append(b, f[0]...), ": "...), f[1]...), "\r\n"...)
	}
	return b
}

// Began says whether this hop is the first of its trace.
func (c *Context) Began() bool { return c.Parent == [8]byte{} && c.SofaTrace == "" }

// ID is the trace as people and collectors write it.
func (c *Context) ID() string { return hex.EncodeToString(c.Trace[:]) }
