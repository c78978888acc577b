package mesh

import (
	"fmt"
	"strconv"

	"hauberk.dev/mesh/hessian"
	"hauberk.dev/mesh/http2"
	"hauberk.dev/mesh/inspect"
)

// looked is what is kept of a request of HTTP/2 that is looked at.
type looked struct {
	asked inspect.Asked
	on    bool // its answer counts
	late  bool // so does its body
	kind  inspect.BodyKind
	body  []byte
	next  int
}

// look looks at the head of a request. It is true if the request was answered.
func (x *exchange2) look(s *http2.Stream, q *asked, h *http2.Head) bool {
	w := x.e.watch
	if w == nil || !w.ready() {
		return false
	}
	r := x.refusal(q)
	if left, shed := w.caller.Shed(w.a.p.analysis.now()); shed {
		answer2(s, q, w.shed(&r, left), r)
		return true
	}
	w.q.Begin(w.service, w.a.port, w.a.p.analysis.now())
	inspect.Target(&w.q, h.Method, h.Path)
	plain := true
	for i := range h.Fields {
		f := &h.Fields[i]
		if f.IsPseudo() && f.Name != ":authority" {
			continue
		}
		switch f.Name {
		case "content-encoding":
			plain = f.Value == "identity"
		case "grpc-encoding":
			plain = f.Value == "identity"
		}
		inspect.Field(&w.q, f.Name, f.Value)
	}
	v := w.q.Judge(w.caller)
	q.look = looked{asked: w.q.Asked(inspect.Hash(h.Path)), on: true, late: plain && !h.End && w.q.Wants() > 0, kind: bodyKind(h.ContentType)}
	if v.Action == inspect.None {
		return false
	}
	if status := w.act(w.caller, &v, said(h.Method, h.Path), &r); status != 0 {
		answer2(s, q, status, r)
		return true
	}
	return false
}

// data looks at a body on its way: whenever twice as much of it is there, and
// before its end goes on.
func (x *exchange2) data(s *http2.Stream, p []byte, end bool) {
	q, ok := s.Value.(*asked)
	if !ok || !q.look.late {
		return
	}
	w, l := x.e.watch, &q.look
	if !w.ready() {
		return
	}
	most := w.service.Wants()
	l.body = append(l.body, p[:min(len(p), max(0, most-len(l.body)))]...)
	done := end || len(l.body) >= most
	if !done && len(l.body) < max(l.next, 256) {
		return
	}
	l.next, l.late = 2*len(l.body), !done
	w.q.Resume(w.service, l.asked, w.a.p.analysis.now())
	w.q.Body(l.kind, l.body, -1)
	if done {
		l.body = nil
	}
	v := w.q.Judge(w.caller)
	if v.Action == inspect.None {
		return
	}
	r := x.refusal(q)
	if status := w.act(w.caller, &v, said(q.method, q.path), &r); status != 0 {
		l.late = false
		if fields, body, err := words2(q, status, r); err == nil {
			s.Refuse(fields, body)
		}
	}
}

// answered notes the answer to a request.
func (x *exchange2) answered(s *http2.Stream, status int, fields []http2.Field) {
	q, ok := s.Value.(*asked)
	if ok {
		x.a.sight.answered2(q, status, fields)
	}
	if !ok || !q.look.on || status != 0 && status < 200 {
		return
	}
	if q.grpc {
		at := -1
		for i := range fields {
			if fields[i].Name == "grpc-status" {
				at = i
			}
		}
		if at < 0 {
			return // it comes with the trailer
		}
		code, _ := strconv.Atoi(fields[at].Value)
		status = grpcMeans(code)
	} else if status == 0 {
		return
	}
	x.e.watch.answered(&q.look.asked, status)
}

// grpcMeans is the status of HTTP that says what a code of gRPC does.
func grpcMeans(code int) int {
	switch code {
	case 0:
		return 200
	case 5:
		return 404
	case 7:
		return 403
	case 12:
		return 501
	case 16:
		return 401
	}
	return 500
}

// call looks at a request of an RPC protocol, as far as it is there. The text
// refuses it.
func (w *watch) call(codec rpcCodec, size int) (refused string) {
	if w == nil || !w.ready() {
		return ""
	}
	hint := "; see: hauberk why " + w.a.sb.facts.Load().Instance
	if left, shed := w.caller.Shed(w.a.p.analysis.now()); shed {
		return fmt.Sprintf("overloaded: requests of %s were found out of the ordinary; ask again in %v%s", w.a.who.peerIdentity, left.Round(1e6), hint)
	}
	w.q.Begin(w.service, w.a.port, w.a.p.analysis.now())
	to, err := codec.target()
	if err == nil {
		w.q.Call(to.service, to.method)
	}
	switch c := codec.(type) {
	case *boltCodec:
		d := hessian.Draft
		if len(c.frame.Content) > 0 && c.frame.Content[0] == 'C' {
			d = hessian.Final
		}
		w.q.Body(inspect.Hessian, c.frame.Header, int64(size))
		w.arguments(c.frame.Content, d, size)
	case *dubboCodec:
		w.arguments(c.frame.Body, hessian.Final, size)
	case *thriftCodec:
		w.q.Body(inspect.Hessian, c.frame.Message, int64(size))
	}
	v := w.q.Judge(w.caller)
	if v.Action == inspect.None {
		return ""
	}
	what := to.what()
	if w.act(w.caller, &v, what, nil) == 0 {
		return ""
	}
	return fmt.Sprintf("refused to %s: %s: found %s%s", w.a.who.peerIdentity, what, v.Names(), hint)
}

// arguments looks at values of Hessian: which classes they are of, and the bytes
// at their beginning.
func (w *watch) arguments(b []byte, d hessian.Dialect, size int) {
	if w.reader == nil {
		w.reader = &hessian.Reader{Class: w.q.Class}
		w.reader.Text = func(piece []byte) {
			if w.reader.Offset() <= w.q.Wants()+len(piece) {
				w.q.Text(piece)
			}
		}
	}
	w.q.Body(inspect.Hessian, b, int64(size))
	w.reader.Reset(b, d)
	for w.reader.Offset() < len(b) && w.reader.Skip() == nil {
	}
}
