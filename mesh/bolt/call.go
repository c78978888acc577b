package bolt

import (
	"errors"
	"fmt"

	"hauberk.dev/mesh/hessian"
)

const (
	classRequest   = "com.alipay.sofa.rpc.core.request.SofaRequest"
	classException = "com.alipay.remoting.rpc.exception.RpcServerException"

	fieldMethod  = "methodName"
	fieldService = "targetServiceUniqueName"
	maxFields    = 32 // of a SofaRequest
)

// Kind is what a frame means to who passes it on.
type Kind int

// The kinds.
const (
	KindCall  Kind = iota // to be judged
	KindAlive             // asks for a sign of life
	KindOther             // answers, or says that the connection ends
)

// Kind tells calls from the rest. SOFABolt goes by the command of a request,
// its port to JavaScript only by its type: what either could take for a call is
// one.
func (f *Frame) Kind() Kind {
	switch {
	case f.Type == Response:
		return KindOther
	case f.Command == Heartbeat:
		return KindAlive
	case f.Command == GoAway && f.Empty:
		return KindOther
	}
	return KindCall
}

// UnclearError is a request of which one cannot say for sure what it is for.
type UnclearError struct{ Why string }

func (e *UnclearError) Error() string { return e.Why }

func unclear(format string, args ...any) error {
	return &UnclearError{fmt.Sprintf(format, args...)}
}

// Target is what a request is for: the unique name of a service
// (interface:version, or interface:version:id) and a method of it.
type Target struct{ Service, Method []byte }

// Reader reads what requests are for. The zero value is ready; it may be used
// again and again.
type Reader struct {
	body  hessian.Reader
	names [maxFields][]byte
}

// Target tells what the request f is for. A SOFA server goes by the body where
// it is Hessian 2 and by the header where it is Protobuf; the header's service
// chooses threads and class loaders. If they differ the request is unclear.
func (r *Reader) Target(f *Frame) (t Target, err error) {
	if string(f.Class) != classRequest {
		return t, unclear("the request is a %.128q", f.Class)
	}
	n, err := f.Header.names()
	if err != nil {
		return t, err
	}
	switch f.Codec {
	case Hessian2:
		if t, err = r.inBody(f.Content); err != nil {
			return Target{}, unclear("the body: %v", err)
		}
	case Protobuf:
		t = Target{n.target, n.method}
	default:
		return t, unclear("codec %d", f.Codec)
	}
	if len(t.Service) == 0 || len(t.Method) == 0 {
		return Target{}, unclear("the request names no service or no method")
	}
	for _, other := range [...][]byte{n.service, n.target} {
		if other != nil && string(other) != string(t.Service) {
			return Target{}, unclear("the request is for %.128q and for %.128q", t.Service, other)
		}
	}
	if n.method != nil && string(n.method) != string(t.Method) {
		return Target{}, unclear("the request is for method %.128q and for %.128q", t.Method, n.method)
	}
	return t, nil
}

// inBody reads a SofaRequest up to both names. Arguments come after it.
func (r *Reader) inBody(content []byte) (t Target, err error) {
	dialect := hessian.Draft
	if len(content) > 0 && content[0] == 'C' {
		dialect = hessian.Final // which readers of the draft refuse
	}
	r.body.Reset(content, dialect)
	class, n, err := r.body.Object(r.names[:])
	if err != nil {
		return t, err
	}
	if string(class) != classRequest {
		return t, fmt.Errorf("class %.128q", class)
	}
	if err := once(r.names[:n]); err != nil {
		return t, err
	}
	for _, name := range r.names[:n] {
		switch string(name) {
		case fieldMethod:
			t.Method, err = r.body.String()
		case fieldService:
			t.Service, err = r.body.String()
		default:
			err = r.body.Skip()
		}
		if err != nil {
			return t, fmt.Errorf("field %.64q: %w", name, err)
		}
		if t.Method != nil && t.Service != nil {
			return t, nil
		}
	}
	return t, errors.New("no service or no method")
}

// once makes sure that no name a server would set twice is there twice.
func once(names [][]byte) error {
	methods, services := 0, 0
	for _, name := range names {
		switch string(name) {
		case fieldMethod:
			methods++
		case fieldService:
			services++
		}
	}
	if methods != 1 || services != 1 {
		return fmt.Errorf("%d fields for the method and %d for the service", methods, services)
	}
	return nil
}
