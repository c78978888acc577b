package alone

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/mesh/cache"
	"hauberk.dev/mesh/http1"
)

// Caching has a route store answers, and answer with them: RFC 9111.
type Caching struct {
	Valid                Duration `yaml:"valid"`                  // of answers that do not say
	StaleWhileRevalidate Duration `yaml:"stale_while_revalidate"` // of answers that do not say
	StaleIfError         Duration `yaml:"stale_if_error"`
	Largest              Size     `yaml:"largest"` // body
}

// CacheMemory is what all routes that store answers share.
type CacheMemory struct {
	Memory Size `yaml:"memory"`
}

const (
	defaultCache   = 64 << 20
	defaultLargest = 1 << 20
	maxCollapse    = 5 * time.Second // to wait for the answer to another's request
)

// storeRules are what the route says of the answer to a request.
func (a *action) storeRules(req *http1.Message) cache.Rules {
	c := a.route.Cache
	return cache.Rules{Valid: time.Duration(c.Valid), StaleWhileRevalidate: time.Duration(c.StaleWhileRevalidate), StaleIfError: time.Duration(c.StaleIfError),
		Largest: int64(c.Largest), Told: func(name string) bool { return a.passes(req, []byte(name)) }}
}

// passes says whether the server gets a field of a request as it came: what the proxy
// leaves out or writes itself does not tell answers apart.
func (a *action) passes(req *http1.Message, name []byte) bool {
	if hopByHop(name) || forwarded(name) || validator(name) || equalFold(name, "grpc-timeout") || a.toServer.drops(name) ||
		a.route.Deadline != "" && equalFold(name, a.route.Deadline) {
		return false
	}
	for i := range a.toServer.add {
		if equalFold(name, a.toServer.add[i].name) {
			return false
		}
	}
	for i := range req.Fields {
		if equalFold(req.Fields[i].Name, "connection") {
			for one := range bytes.SplitSeq(req.Fields[i].Value, []byte(",")) {
				if inList([][]byte{trim(one)}, name) {
					return false
				}
			}
		}
	}
	return true
}

// caching is what a session knows of the stored answer to its request.
type caching struct {
	on      bool
	key     []byte
	entry   *cache.Entry // that is asked about
	flight  *cache.Flight
	asked   time.Time
	storing bool
	body    []byte
	held    int64  // bytes of it, or of what it will be, that are counted in
	cookies []byte // fields of a 304 that are for this client alone
}

// forwardCached answers with what is stored, or passes the request on and stores
// the answer.
func (s *session) forwardCached(a *action) {
	st := s.p.cache
	s.cache = caching{key: s.appendKey(s.cache.key[:0], a)}
	if !safe(s.req.Method) {
		s.forward(a)
		s.changed(a, s.status)
		return
	}
	if s.peer != nil { // the server is told who asks, and no field says that its answer depends on it
		s.forward(a)
		return
	}
	for waited := false; ; waited = true {
		e, use := st.Look(time.Now(), s.cache.key, &s.req)
		switch use {
		case cache.Bypass:
			s.forward(a)
			return
		case cache.Forbidden:
			s.refuse(504, "nothing that may be used is stored, and the client wants nobody asked", "")
			return
		case cache.Fresh:
			s.stored(a, e, "hit")
			return
		case cache.Background:
			if f, lead := st.Lead(s.cache.key); lead {
				s.refresh(a, e, f)
			}
			s.stored(a, e, "hit")
			return
		}
		var f *cache.Flight
		if !waited { // who has waited once asks alone, and lets nobody wait
			var lead bool
			if f, lead = st.Lead(s.cache.key); !lead {
				s.waitFor(f, min(time.Duration(a.route.Timeout), s.p.collapse))
				continue
			}
		}
		s.cache.on, s.cache.entry, s.cache.flight = true, e, f
		s.extra = append(s.extra[:0], "Cache-Status: hauberk; fwd=uri-miss\r\n"...)
		if e != nil {
			s.extra = append(s.extra[:0], "Cache-Status: hauberk; fwd=stale\r\n"...)
		}
		s.forward(a)
		s.giveBack()
		f.Land()
		s.cache.on = false
		return
	}
}

// changed forgets what is stored of an address that a request has changed.
func (s *session) changed(a *action, status int) {
	if a.route.Cache != nil && !safe(s.req.Method) && status >= 200 && status < 400 {
		s.p.cache.Invalidate(time.Now(), s.cache.key)
	}
}

// safe says whether a request changes nothing: RFC 9110, section 9.2.1.
func safe(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS":
		return true
	}
	return false
}

// appendKey writes what an answer is stored under: the listener and the route, as
// another may go to other servers, and the whole address, with that which its server
// is asked for: it may differ from client to client.
func (s *session) appendKey(b []byte, a *action) []byte {
	b = append(append(b, s.l.address...), 0)
	b = append(append(b, a.name...), 0)
	b = append(append(b, s.route.Scheme...), "://"...)
	for _, c := range s.req.Host {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		b = append(b, c)
	}
	_, path, query := http1.SplitTarget(s.req.Target)
	b = append(append(b, path...), query...)
	if a.rewrite != nil {
		b = a.rewrite.Append(append(b, 1), &s.route)
	}
	return b
}

// waitFor waits for somebody else's request to end.
func (s *session) waitFor(f *cache.Flight, patience time.Duration) {
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-f.Done():
	case <-t.C:
	}
}

// stored answers with what is stored.
func (s *session) stored(a *action, e *cache.Entry, how string) {
	s.cache.on = false
	if err := s.resp.Response(e.Head, s.req.Method); err != nil { // never: it was read before
		s.refuse(500, "the stored answer cannot be read", "")
		return
	}
	now := time.Now()
	s.extra = strconv.AppendInt(append(s.extra[:0], "Age: "...), int64(e.Age(now)/time.Second), 10)
	s.extra = append(append(s.extra, "\r\nCache-Status: hauberk; "...), how...)
	s.extra = strconv.AppendInt(append(s.extra, "; ttl="...), int64(e.TTL(now)/time.Second), 10)
	s.extra = append(append(s.extra, "\r\n"...), s.cache.cookies...)
	if e.NotModified(&s.req) {
		s.notModified()
		return
	}
	z := s.squeezes(a)
	chunked, err := s.relayHead(a, z)
	if err == nil && string(s.req.Method) != "HEAD" {
		err = s.storedBody(a, e.Body, z, chunked)
	}
	if err != nil {
		s.final, s.aborted = true, true
		s.why = err.Error()
	}
}

// storedBody passes what is stored on in pieces, as a client may be slow.
func (s *session) storedBody(a *action, body []byte, z, chunked bool) error {
	var c *compressor
	if z {
		c = s.compressor(a)
		defer c.drop()
	}
	for part := range slices.Chunk(body, piece) {
		s.giveTime()
		if err := s.relayPart(part, c, chunked); err != nil {
			return err
		}
	}
	switch {
	case c != nil:
		return c.close()
	case chunked:
		return s.out.write(last)
	}
	return nil
}

// notModified answers that the client has what is stored: RFC 9110, section 15.4.5.
func (s *session) notModified() {
	s.status = 304
	s.conn.SetWriteDeadline(time.Now().Add(answerTime))
	b := append(s.out.buffer(), "HTTP/1.1 304 Not Modified\r\n"...)
	for i := range s.resp.Fields {
		f := &s.resp.Fields[i]
		for _, name := range [...]string{"cache-control", "content-location", "date", "etag", "expires", "vary", "last-modified"} {
			if equalFold(f.Name, name) && !s.action.toClient.drops(f.Name) {
				b = appendRaw(b, f)
			}
		}
	}
	s.out.kept(s.finish(append(b, s.extra...), -1))
}

// answered looks at the head of an answer that a cache has asked for. It reports
// whether the client has been answered with what is stored.
func (s *session) answered(a *action, srv *server) bool {
	c := &s.cache
	now := time.Now()
	switch e := c.entry; {
	case e == nil:
	case s.resp.Status == 304:
		c.keepCookies(a, &s.resp)
		e = s.p.cache.Renew(e, &s.req, &s.resp, c.asked, now, a.storeRules(&s.req))
		c.flight.Land() // before this client reads, however long that takes
		s.release(srv)
		s.stored(a, e, "hit; fwd=stale; fwd-status=304")
		return true
	case s.resp.Status >= 500 && s.resp.Status <= 504 && s.resp.Status != 501 && e.ForError(now):
		c.flight.Land()
		srv.close()
		s.up.drop()
		s.stored(a, e, "hit; fwd=stale; fwd-status="+strconv.Itoa(s.resp.Status))
		return true
	}
	cut := s.resp.Framing == http1.UntilClose && srv.two == nil // nobody could tell whether it is whole
	length := int64(0)
	if s.resp.Framing == http1.Length {
		length = s.resp.Length
	}
	c.storing = !cut && cache.Storable(now, &s.req, &s.resp, a.storeRules(&s.req)) && length <= int64(a.route.Cache.Largest) && s.hold(length)
	if !c.storing {
		c.flight.Land() // nobody need wait for it
		return false
	}
	c.body = make([]byte, 0, length)
	return false
}

// hold counts in what is to be stored, if there is room for it.
func (s *session) hold(n int64) bool {
	if !s.p.cache.Hold(n) {
		return false
	}
	s.cache.held += n
	return true
}

// giveBack counts it out.
func (s *session) giveBack() {
	s.p.cache.Give(s.cache.held)
	s.cache.held = 0
}

// keepCookies keeps the cookies that a 304 sets: they are not stored, and go to the
// client whose request it answers.
func (c *caching) keepCookies(a *action, resp *http1.Message) {
	for i := range resp.Fields {
		if f := &resp.Fields[i]; equalFold(f.Name, "set-cookie") && !a.toClient.drops(f.Name) {
			c.cookies = appendRaw(c.cookies, f)
		}
	}
}

// release puts a connection away whose answer had no body.
func (s *session) release(srv *server) {
	s.up.drop()
	if s.resp.Close {
		srv.close()
	} else {
		s.putAway(srv)
	}
}

// keepPart keeps a part of an answer that is to be stored.
func (s *session) keepPart(a *action, data []byte) {
	c := &s.cache
	n := int64(len(c.body) + len(data))
	if n > int64(a.route.Cache.Largest) || n > c.held && !s.hold(n-c.held) {
		c.storing, c.body = false, nil
		s.giveBack()
		c.flight.Land()
		return
	}
	c.body = append(c.body, data...)
}

// store stores an answer that has come to its end.
func (s *session) store(a *action) {
	if c := &s.cache; c.storing {
		c.storing = false
		s.p.cache.Put(c.key, &s.req, &s.resp, c.body, c.asked, time.Now(), a.storeRules(&s.req))
		s.giveBack() // it is counted where it is stored
		c.flight.Land()
		c.body = nil
	}
}

// unavailable answers that there is no server, or with what is stored if it may be
// used then.
func (s *session) unavailable(status int, why, hint string) {
	if e := s.cache.entry; s.cache.on && e != nil && s.status == 0 && e.ForError(time.Now()) {
		s.cache.flight.Land()
		s.why = why
		s.stored(s.action, e, "hit; fwd=stale")
		return
	}
	s.refuse(status, why, hint)
}

// refresh asks behind the client's back whether an answer is still good.
func (s *session) refresh(a *action, e *cache.Entry, f *cache.Flight) {
	up := a.choose()
	s.cache.on, s.cache.entry = true, e
	b, err := s.appendHead(nil, a, up, true)
	s.cache.on = false
	if err != nil || s.p.mirrors.Add(1) > maxMirrors {
		if err == nil {
			s.p.mirrors.Add(-1)
		}
		f.Land()
		return
	}
	head := append([]byte(nil), s.in.b[:s.in.hold]...)
	key, header, p := append([]byte(nil), s.cache.key...), s.header(), s.p
	p.serving.Go(func() {
		defer p.mirrors.Add(-1)
		defer f.Land()
		var req http1.Message
		if req.Request(head) != nil { // never: it was read before
			return
		}
		asked, rules := time.Now(), a.storeRules(&req)
		k := &keeper{largest: rules.Largest}
		copyTo(p.context(), up, header, "GET", b, k.take)
		switch {
		case k.m == nil:
		case k.m.Status == 304:
			p.cache.Renew(e, &req, k.m, asked, time.Now(), rules)
		case k.m.Framing == http1.UntilClose && !up.two(): // nobody could tell whether it is whole
		case !k.over && cache.Storable(time.Now(), &req, k.m, rules):
			p.cache.Put(key, &req, k.m, k.body, asked, time.Now(), rules)
		}
	})
}

// keeper keeps an answer that nobody waits for.
type keeper struct {
	largest int64
	m       *http1.Message // when it is whole; of bytes of its own
	body    []byte
	over    bool
}

// take takes a part of the body, or with the head what is whole.
func (k *keeper) take(data []byte, head *http1.Message) {
	if head == nil {
		if k.over = k.over || int64(len(k.body)+len(data)) > k.largest; !k.over {
			k.body = append(k.body, data...)
		}
		return
	}
	m := *head
	m.Fields = nil
	for _, f := range head.Fields {
		m.Fields = append(m.Fields, http1.Field{Name: append([]byte(nil), f.Name...), Value: append([]byte(nil), f.Value...)})
	}
	m.Reason = append([]byte(nil), head.Reason...)
	k.m = &m
}

// validators are the fields that ask whether an answer is still good.
func validator(name []byte) bool {
	return equalFold(name, "if-none-match") || equalFold(name, "if-modified-since")
}

func (c *caching) appendValidators(b []byte) []byte {
	if c.entry.ETag != "" {
		b = appendField(b, "If-None-Match", c.entry.ETag)
	}
	if c.entry.Since != "" {
		b = appendField(b, "If-Modified-Since", c.entry.Since)
	}
	return b
}

// purge forgets the stored answers whose address begins with prefix.
func (p *Proxy) purge(prefix string) int {
	return p.cache.Purge(time.Now(), func(key string) bool {
		return strings.HasPrefix(key[strings.LastIndexByte(key, 0)+1:], prefix)
	})
}
