package alone

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/transcode"
)

// maxCallsJSON is how many calls of one connection are requests in JSON at once: each
// takes a connection to the server.
const maxCallsJSON = 1024

// callsJSON checks a call whose calls become requests in JSON.
func (r *reading) callsJSON(at string, l *Listener, x *Call, c *Config, upstreams []string) {
	t := x.Transcode
	if l.Protocol != "bolt" {
		r.fault(at+".transcode", "goes with protocol bolt")
	}
	if t.To != toJSON {
		r.fault(at+".transcode.to", "%q: calls become requests; write to: json", t.To)
	}
	if t.Descriptors != "" || t.Bolt == nil {
		r.fault(at+".transcode", "use bolt and no descriptors: arguments in protobuf are not read")
	}
	if strings.ContainsAny(t.Path, "?#") || !strings.HasPrefix(t.Path, "/") {
		r.fault(at+".transcode.path", "%q is no path; write for example /books, to which /METHOD is added", t.Path)
	}
	if t.Bolt != nil {
		r.callsOf(at, x, t)
	}
	if x.Deadline != "" {
		r.fieldName(at+".deadline", x.Deadline)
	}
	for _, u := range c.Upstreams {
		for _, name := range upstreams {
			if u.Name == name && u.Protocol != "http" && u.Protocol != "http2" {
				r.fault(at+".transcode", "upstream %q speaks %s; write protocol: http or http2", u.Name, u.Protocol)
			}
			if u.Name == name && u.ProxyProtocol != "" {
				r.fault(at+".transcode", "upstream %q has proxy_protocol, whose connections are one client's; leave it out", u.Name)
			}
		}
	}
}

// callsOf checks that the service can be called at its paths.
func (r *reading) callsOf(at string, x *Call, t *Transcode) {
	s := t.Bolt.service()
	if err := s.Check(); err != nil {
		r.fault(at+".transcode.bolt", "%v", err)
	}
	name, version, _ := strings.Cut(s.Name, ":")
	if x.Service != "*" && !strings.HasSuffix(x.Service, "*") && x.Service != name || x.Version != "" && x.Version != version {
		r.fault(at+".transcode.bolt.service", "%q is not what the call is for: service %q, version %q", s.Name, x.Service, x.Version)
	}
	var sample http1.Message
	if err := sample.Request(fmt.Appendf(nil, "POST / HTTP/1.1\r\nHost: %s\r\n\r\n", x.host())); err != nil {
		r.fault(at+".host", "%q: %v; name the host that the server serves", x.host(), err)
	}
	for _, m := range s.Methods {
		path := t.Path + "/" + m.Name
		if _, err := http1.AppendPath(nil, nil, []byte(path), false); err != nil || http1.CheckField(m.Name, "") != nil || strings.ContainsAny(path, " \"<>^`{|}?#") {
			r.fault(at+".transcode.bolt.methods", "%q makes %q, which is no path that all servers read alike", m.Name, path)
		}
	}
}

// host is what servers of JSON are asked for.
func (c *Call) host() string {
	switch {
	case c.Host != "":
		return c.Host
	case c.Upstream == "" && len(c.Split) > 0:
		return c.Split[0].Upstream
	}
	return c.Upstream
}

// toJSON has a call become a request, whose answer is waited for elsewhere. frame is
// the reader's.
func (x *rpcClient) toJSON(c *rpcUnderway, e *callEnv, frame []byte) error {
	target, err := e.target()
	if len(c.name) == 0 { // the listener's routes asked nothing
		c.name = e.appendName(c.name)
	}
	if err != nil {
		return c.refuse(rpcUnclear, balance.Cancelled, "what the call is for cannot be read: "+err.Error())
	}
	extent, err := bolt.Size(frame)
	if err != nil {
		return c.refuse(rpcUnclear, balance.Cancelled, err.Error())
	}
	f := bolt.Parse(frame, extent)
	service := c.route.json
	switch name, version, _ := strings.Cut(service.Name, ":"); {
	case f.Codec != bolt.Hessian2:
		return c.refuse(rpcUnclear, balance.Cancelled, fmt.Sprintf("codec %d: only Hessian is read", f.Codec))
	case string(target.service) != name || string(target.version) != version:
		return c.refuse(rpcNoRoute, balance.Cancelled, fmt.Sprintf("the route is for %s", service.Name))
	case x.under.Load() > maxCallsJSON:
		return c.refuse(rpcTooMany, balance.Cancelled, fmt.Sprintf("over %d calls of one connection at once", maxCallsJSON))
	}
	m, body, err := service.AppendCall(nil, f.Content, maxAnswerJ)
	if err == nil && m.Name != string(target.method) {
		err = errors.New("the call is for two methods")
	}
	if err != nil {
		return c.refuse(rpcUnclear, balance.Cancelled, err.Error())
	}
	request, err := x.request(c, m, f.Header, body)
	if err != nil {
		return c.refuse(rpcUnclear, balance.Cancelled, err.Error())
	}
	n := len(request)
	if !x.p.held.take(n) {
		return c.refuse(rpcTooMany, balance.Cancelled, errHeld.Error())
	}
	c.up = c.route.choose()
	hash := c.route.hash(x)
	go func() {
		defer x.p.held.give(n)
		x.askJSON(c, m, hash, request)
	}()
	return nil
}

// request is the request that a call becomes, with the fields of the frame's header.
func (x *rpcClient) request(c *rpcUnderway, m *transcode.Signature, header bolt.Header, body []byte) ([]byte, error) {
	config := c.route.config
	b := fmt.Appendf(make([]byte, 0, len(body)+len(header)+512), "POST %s/%s HTTP/1.1\r\nHost: %s\r\n%s", config.Transcode.Path, m.Name, config.host(), acceptsJ)
	b = append(append(append(b, "X-Forwarded-For: "...), x.clientText...), "\r\n"...)
	if name := config.Deadline; name != "" {
		b = appendField(b, name, strconv.FormatInt(max(time.Until(c.until).Milliseconds(), 1), 10))
	}
	for {
		key, value, rest, more, err := header.Next()
		if err != nil {
			return nil, err
		}
		if !more {
			return appendJSON(b, "POST", body), nil
		}
		header = rest
		tells := len(key) == len(config.Deadline) && hyphenated(key, config.Deadline)
		if value == nil || tells || ofBolt(key) || hopByHop(key) || forwarded(key) || ofMessage(key) {
			continue
		}
		if err := http1.CheckField(string(key), string(value)); err != nil {
			return nil, fmt.Errorf("the frame's header: %w", err)
		}
		b = appendField(b, string(key), string(value))
		if len(b) > maxHead {
			return nil, fmt.Errorf("the frame's header makes a head of over %d bytes", maxHead)
		}
	}
}

// ofBolt are keys of a header that tell of the frame, and not of the call.
func ofBolt(key []byte) bool {
	const head = "sofa_head_"
	return equalFold(key, "service") || len(key) >= len(head) && equalFold(key[:len(head)], head)
}

// askJSON sends a request and answers the call with what comes back.
func (x *rpcClient) askJSON(c *rpcUnderway, m *transcode.Signature, hash uint64, request []byte) {
	ctx, cancel := context.WithDeadline(x.p.context(), c.until)
	defer cancel()
	j := &exchangeJSON{method: "POST", head: request, held: &x.p.answers}
	defer j.free()
	errand := errand{hash: hash, began: c.began, until: c.until, most: time.Duration(c.route.config.Timeout), to: func(e *endpoint) { c.asked = e }}
	err := c.up.ask(ctx, &errand, func(srv *server) error {
		if err := j.with(ctx, srv); err != nil {
			srv.close()
			return err
		}
		if j.answer.Close {
			srv.close()
		} else {
			srv.keep(time.Now())
		}
		return j.failed()
	})
	var frame []byte
	if err == nil {
		frame, err = c.reply(m, j)
	}
	if err != nil {
		c.refuse(c.faultOf(err), balance.Cancelled, err.Error())
		return
	}
	if !c.frame.oneWay {
		err = x.out.add(frame)
	}
	if errors.Is(err, errHeld) {
		c.refuseAnswer(err)
		return
	}
	if err != nil {
		x.out.close() // it does not read, or is gone
	}
	c.sent(len(frame), 200, balance.Success, "")
}

// reply is the frame that says what a good answer does.
func (c *rpcUnderway) reply(m *transcode.Signature, j *exchangeJSON) ([]byte, error) {
	content, err := c.route.json.AppendReply(nil, m, j.body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errAnswer, err)
	}
	var pairs [][2]string
	for i := range j.answer.Fields {
		if f := &j.answer.Fields[i]; !hopByHop(f.Name) && !ofAnswer(f.Name) && !ofBolt(f.Name) {
			pairs = append(pairs, [2]string{string(f.Name), string(f.Value)})
		}
	}
	return bolt.AppendReply(nil, &c.frame.bolt, transcode.ResponseClass, pairs, content)
}

// faultOf is how bolt says what became of a request.
func (c *rpcUnderway) faultOf(err error) rpcFault {
	var said *httpError
	switch {
	case errors.As(err, &said):
		switch said.status {
		case 404, 405, 501:
			return rpcNoRoute
		case 429, 503:
			return rpcTooMany
		case 408, 504:
			return rpcLate
		case 502:
			return rpcBroken
		}
		return rpcFailed
	case errors.Is(err, errAnswer):
		return rpcFailed
	case !time.Now().Before(c.until):
		return rpcLate
	case errors.Is(err, balance.ErrOverflow), errors.Is(err, errBusy), errors.Is(err, errHeld):
		return rpcTooMany
	case errors.Is(err, balance.ErrNoEndpoint), errors.Is(err, errUnsent):
		return rpcNoServer
	}
	return rpcBroken
}
