// Package dubbo reads frames of Dubbo and of dubbo-thrift, and writes the few
// that a proxy says itself.
//
// It works on the bytes where they are: Size tells how long the frame is that
// begins a buffer, Parse cuts it up, Target tells which service and method a
// request is for. Dubbo's servers let the attachments at the end of a request
// replace what stands at its beginning, so all of it is read, within bounds,
// and what contradicts itself is an error. The package opens no connection and
// holds no policy.
package dubbo

import (
	"encoding/binary"
	"fmt"

	"hauberk.dev/mesh/hessian"
)

// Bounds of a frame.
const (
	HeaderLen = 16
	MaxBody   = 64 << 20
	MaxEvent  = 4 << 10 // of an event, which says next to nothing
)

const magic = 0xdabb

// Flags of a frame; the low five bits number the serialization.
const (
	flagRequest       = 0x80
	flagTwoWay        = 0x40
	flagEvent         = 0x20
	maskSerialization = 0x1f

	hessian2 = 2
)

// Status of a response.
type Status byte

// The statuses.
const (
	OK              Status = 20
	ClientTimeout   Status = 30
	ServerTimeout   Status = 31
	BadRequest      Status = 40
	BadResponse     Status = 50
	ServiceNotFound Status = 60
	ServiceError    Status = 70
	ServerError     Status = 80
	ClientError     Status = 90
	Exhausted       Status = 100 // no thread free
)

// SyntaxError is a frame that may not be passed on.
type SyntaxError struct{ Why string }

func (e *SyntaxError) Error() string { return "malformed dubbo frame: " + e.Why }

func malformed(format string, args ...any) error {
	return &SyntaxError{fmt.Sprintf(format, args...)}
}

// Size tells how long the frame is that begins with b; 0 means that more of b
// is needed to tell. What does not begin with the magic is an error: Dubbo's
// servers take it for a command of their console.
func Size(b []byte) (int, error) {
	if len(b) < HeaderLen {
		if len(b) > 0 && b[0] != magic>>8 || len(b) > 1 && b[1] != magic&0xff {
			return 0, malformed("it begins with %x", b[:min(len(b), 2)])
		}
		return 0, nil
	}
	if m := binary.BigEndian.Uint16(b); m != magic {
		return 0, malformed("it begins with %04x", m)
	}
	n := binary.BigEndian.Uint32(b[12:])
	if n > MaxBody {
		return 0, malformed("a body of %d bytes; at most %d", n, MaxBody)
	}
	if b[2]&flagEvent != 0 && n > MaxEvent {
		return 0, malformed("an event of %d bytes; at most %d", n, MaxEvent)
	}
	return HeaderLen + int(n), nil
}

// Kind is what a frame means to who passes it on.
type Kind int

// The kinds.
const (
	KindCall  Kind = iota // to be judged
	KindAlive             // asks for a sign of life
	KindOther             // answers, or tells of an event
)

// Frame is one frame, cut up. Its slices are parts of the buffer.
type Frame struct {
	Kind          Kind
	TwoWay        bool // the sender waits for an answer
	Serialization byte
	Status        Status // of a response
	ID            uint64
	Body          []byte // as much of it as is there
}

// Parse cuts up the frame of size bytes that begins with b. Its header must be
// there.
func Parse(b []byte, size int) Frame {
	flags := b[2]
	f := Frame{Kind: KindOther, TwoWay: flags&flagTwoWay != 0, Serialization: flags & maskSerialization, Status: Status(b[3]),
		ID: binary.BigEndian.Uint64(b[4:]), Body: b[HeaderLen:min(size, len(b))]}
	switch {
	case flags&flagRequest == 0:
	case flags&flagEvent == 0:
		f.Kind = KindCall
	case f.TwoWay:
		f.Kind = KindAlive
	}
	return f
}

// IsAnswer tells whether the frame that begins with b is the answer to a call. Its
// header must be there.
func IsAnswer(b []byte) bool { return b[2]&(flagRequest|flagEvent) == 0 }

// UnclearError is a request of which one cannot say for sure what it is for.
type UnclearError struct{ Why string }

func (e *UnclearError) Error() string { return e.Why }

func unclear(format string, args ...any) error {
	return &UnclearError{fmt.Sprintf(format, args...)}
}

// Target is what a request is for. Version and Group may be empty.
type Target struct{ Service, Version, Group, Method []byte }

// Reader reads what requests are for. The zero value is ready; it may be used
// again and again.
type Reader struct{ body hessian.Reader }

// Target tells what the request f is for. All of its body must be there.
func (r *Reader) Target(f *Frame) (Target, error) {
	if f.Serialization != hessian2 {
		return Target{}, unclear("serialization %d", f.Serialization)
	}
	r.body.Reset(f.Body, hessian.Final)
	t, err := r.head()
	if err == nil {
		err = r.attachments(&t)
	}
	if err != nil {
		return Target{}, unclear("the body: %v", err)
	}
	return t, nil
}

// head reads a body up to the attachments.
func (r *Reader) head() (t Target, err error) {
	var descriptor []byte
	for _, field := range [...]*[]byte{nil, &t.Service, &t.Version, &t.Method, &descriptor} {
		s, err := r.body.String()
		if err != nil {
			return t, err
		}
		if field != nil {
			*field = s
		}
	}
	if len(t.Service) == 0 || len(t.Method) == 0 {
		return t, fmt.Errorf("no service or no method")
	}
	n, err := parameters(descriptor)
	if err != nil {
		return t, err
	}
	if m := string(t.Method); m == "$invoke" || m == "$invokeAsync" {
		// The method that a generic call is for is its first argument.
		if n != 3 || !r.body.IsString() {
			return t, fmt.Errorf("a generic call without a method")
		}
		if t.Method, err = r.body.String(); err != nil {
			return t, err
		}
		n--
	}
	for range n {
		if err := r.body.Skip(); err != nil {
			return t, err
		}
	}
	return t, nil
}

// attachments reads the group, and makes sure that nothing read before is said
// otherwise: servers go by the attachments.
func (r *Reader) attachments(t *Target) error {
	there, err := r.body.Map()
	if err != nil || !there {
		return err
	}
	group := false
	for {
		more, err := r.body.More()
		if err != nil || !more {
			return err
		}
		key, err := r.body.String()
		if err != nil {
			return err
		}
		var want *[]byte
		switch string(key) {
		case "path":
			want = &t.Service
		case "version":
			want = &t.Version
		case "group":
			want = &t.Group
		default:
			if err := r.body.Skip(); err != nil {
				return err
			}
			continue
		}
		value, err := r.body.String()
		if err != nil {
			return err
		}
		if want == &t.Group && !group {
			t.Group, group = value, true
		}
		if string(value) != string(*want) {
			return fmt.Errorf("%s is %.128q and %.128q", key, *want, value)
		}
	}
}

// streams are parameters that Dubbo's Hessian leaves in the body for the
// program to read: what it then takes for the attachments stands inside them.
const streams = "Ljava/io/InputStream;"

// parameters counts those of a descriptor, which are written as for the JVM.
func parameters(d []byte) (n int, err error) {
	for len(d) > 0 {
		if d[0] == '[' {
			if d = d[1:]; len(d) == 0 {
				return 0, fmt.Errorf("the descriptor ends in an array")
			}
			continue
		}
		end := 1
		switch d[0] {
		case 'Z', 'B', 'C', 'S', 'I', 'J', 'F', 'D':
		case 'L':
			for end < len(d) && d[end-1] != ';' {
				end++
			}
			if d[end-1] != ';' || end < 3 || string(d[:end]) == streams {
				return 0, fmt.Errorf("parameter %.64q", d[:end])
			}
		default:
			return 0, fmt.Errorf("parameter %.64q", d)
		}
		d = d[end:]
		n++
	}
	return n, nil
}

const maxMessage = 1 << 10

// AppendError appends the response that refuses the request f.
func AppendError(dst []byte, f *Frame, status Status, message string) []byte {
	return appendResponse(dst, hessian2, status, f.ID, func(dst []byte) []byte {
		return hessian.AppendString(dst, message[:min(len(message), maxMessage)])
	})
}

// AppendAlive appends the answer to the heartbeat f.
func AppendAlive(dst []byte, f *Frame) []byte {
	return appendResponse(dst, flagEvent|hessian2, OK, f.ID, func(dst []byte) []byte { return append(dst, 'N') })
}

func appendResponse(dst []byte, flags byte, status Status, id uint64, body func([]byte) []byte) []byte {
	begin := len(dst)
	dst = append(dst, magic>>8, magic&0xff, flags, byte(status))
	dst = binary.BigEndian.AppendUint64(dst, id)
	dst = body(append(dst, 0, 0, 0, 0))
	binary.BigEndian.PutUint32(dst[begin+12:], uint32(len(dst)-begin-HeaderLen))
	return dst
}
