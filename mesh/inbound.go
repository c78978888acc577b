package mesh

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/id"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/tls13"
	"hauberk.dev/mesh/wire"
)

// nameSuffix ends the server names by which a gateway is told whose
// certificate to show. All sandboxes of a node share its gateway's address, and
// HBONE names the destination only after the handshake, so the client says it
// in SNI: the sandbox's address with dashes. A client that sends none (Istio's)
// is taken to mean the address it has connected to, which is Istio's own rule;
// it takes effect once gateways listen on sandbox addresses.
const nameSuffix = ".sandbox.hauberk.internal"

func serverName(a netip.Addr) string {
	return strings.ReplaceAll(a.String(), ".", "-") + nameSuffix
}

func addressOf(serverName string, local net.Addr) (netip.Addr, error) {
	if serverName == "" {
		return addrPort(local).Addr(), nil
	}
	dashed, ok := strings.CutSuffix(serverName, nameSuffix)
	if !ok {
		return netip.Addr{}, fmt.Errorf("server name %q is no sandbox's", serverName)
	}
	a, err := netip.ParseAddr(strings.ReplaceAll(dashed, "-", "."))
	if err != nil || !a.Is4() {
		return netip.Addr{}, fmt.Errorf("server name %q is no sandbox's", serverName)
	}
	return a, nil
}

// inbound serves a connection to the gateway.
func (p *Proxy) inbound(c net.Conn) { p.welcome(wire.New(c.(*net.TCPConn)), c.RemoteAddr().String()) }

// welcome serves a connection of a proxy. source is its address; the connection
// has been counted as a handshake.
func (p *Proxy) welcome(raw *wire.Conn, source string) {
	shaken := sync.OnceFunc(func() { p.still.shakes(-1) })
	defer shaken()
	select {
	case p.shakes <- struct{}{}:
	default: // more strangers at the door than can be looked at
		raw.Close()
		p.events.add(api.Event{Kind: api.EventLimit, Source: source, Reason: fmt.Sprintf("%d handshakes at once", maxHandshakes)})
		return
	}
	g := &guestSide{p: p, raw: raw, source: source}
	ctx, cancel := context.WithTimeout(p.context(), handshakeTimeout)
	var err error
	g.tls, err = tls13.Server(ctx, g.raw, &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: g.config})
	cancel()
	<-p.shakes
	if err == nil && g.tls.ConnectionState().NegotiatedProtocol != "h2" {
		err = errors.New("the peer does not speak h2")
	}
	if err != nil {
		raw.Close()
		g.refused(err)
		return
	}
	g.gone(hbone.Serve(g.tls, g.serve, func(h *hbone.Conn) {
		g.attach(h)
		shaken()
	}))
}

// gone forgets the connection, unless it was frozen: whoever holds all may not
// have looked for it yet, and forgets it then.
func (g *guestSide) gone(err error) {
	if g.entry != nil && !errors.Is(err, wire.ErrFrozen) {
		g.p.registry.remove(g.entry)
	}
}

// guestSide is one connection to the gateway, for one sandbox.
type guestSide struct {
	p      *Proxy
	raw    *wire.Conn
	tls    *tls13.Conn
	source string
	sb     *sandbox
	who    party
	entry  *entry
}

// config picks the certificate by server name and asks for the peer's.
func (g *guestSide) config(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	address, err := addressOf(hello.ServerName, hello.Conn.LocalAddr())
	if err != nil {
		return nil, err
	}
	if g.sb = g.p.sandboxAt(address); g.sb == nil {
		return nil, fmt.Errorf("no sandbox here has address %s", address)
	}
	ctx, cancel := context.WithTimeout(hello.Context(), handshakeTimeout)
	defer cancel()
	me, err := g.sb.svid.wait(ctx)
	if err != nil {
		return nil, err
	}
	facts := g.sb.facts.Load()
	g.who = party{instance: facts.Instance, identity: facts.Identity, serial: me.serial}
	cfg := id.ServerTLS(id.Static(me.cred), id.AnyOf(id.KindWorkload, g.p.plan().trustDomain))
	cfg.NextProtos = []string{"h2"}
	cfg.DynamicRecordSizingDisabled = true
	verify := cfg.VerifyConnection
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := verify(cs); err != nil {
			return err
		}
		name, err := id.FromCertificate(cs.PeerCertificates[0])
		if err != nil {
			return err
		}
		g.who.peerIdentity, g.who.peerSerial = name.String(), verifiedSerial(cs.PeerCertificates)
		return g.p.registry.check(g.who)
	}
	return cfg, nil
}

func (g *guestSide) refused(err error) {
	ev := api.Event{Kind: api.EventPeerRefused, Source: g.source, Peer: g.who.peerIdentity, Reason: err.Error()}
	if errors.Is(err, errRevoked) {
		ev.Kind = api.EventRevoked
	}
	if g.sb == nil {
		g.p.events.add(ev)
		return
	}
	g.sb.refuse(ev)
}

// attach registers the connection before it carries a stream.
func (g *guestSide) attach(h *hbone.Conn) {
	g.entry = &entry{kind: kindLink, party: g.who, sever: g.raw.Sever, close: func() { h.Close() },
		link: &carrierLink{h: h, tls: g.tls, raw: g.raw, guest: g}}
	if err := g.sb.register(g.entry); err != nil {
		g.entry = nil
		h.Close()
		g.refused(err)
	}
}

// serve serves one stream: a connection of the peer to a port of the sandbox.
func (g *guestSide) serve(s *hbone.Stream) {
	g.p.still.moves(1)
	defer g.p.still.moves(-1)
	sb := g.sb
	facts := sb.facts.Load()
	ev := api.Event{Peer: g.who.peerIdentity, Source: forwardedFor(s, g.source), Destination: s.Authority}
	to, err := netip.ParseAddrPort(s.Authority)
	if err != nil || to.Addr() != facts.Address {
		ev.Kind, ev.Reason = api.EventPeerRefused, "the destination is not the sandbox the certificate is for"
		sb.refuse(ev)
		s.Refuse(400, ev.Reason)
		return
	}
	d := g.p.plan()
	svc := d.services[serviceKey(facts.Namespace, facts.Service)]
	if svc == nil {
		ev.Kind, ev.Reason = api.EventAccessDenied, "the plan has no service for this sandbox"
		sb.refuse(ev)
		s.Refuse(401, ev.Reason)
		return
	}
	ev.Service = svc.String()
	who := g.who
	if source, err := netip.ParseAddrPort(ev.Source); err == nil {
		who.peerInstance = d.callerInstance(source.Addr(), who.peerIdentity)
	}
	if !sb.enter(in) {
		s.Refuse(503, "too many connections")
		return
	}
	defer sb.leave(in)
	a := g.arrival(s, to.Port(), who, ev)
	a.origin = g.origin(s, who, ev.Source)
	a.serve(svc)
}

func (g *guestSide) arrival(s *hbone.Stream, port uint16, who party, ev api.Event) *arrival {
	return &arrival{p: g.p, sb: g.sb, port: port, who: who, ev: ev, via: g.source, client: streamSide{s},
		accept: func() { s.Accept() }, refuse: func(status int, reason string) { s.Refuse(status, reason) }}
}

// forwardedFor is the address the calling proxy speaks for, or its own.
func forwardedFor(s *hbone.Stream, own string) string {
	v, ok := strings.CutPrefix(s.Field("forwarded"), `for="`)
	if !ok {
		return own
	}
	v, _, ok = strings.Cut(v, `"`)
	if a, err := netip.ParseAddrPort(v); ok && err == nil {
		return a.String()
	}
	return own
}

// ingress serves a connection to a published port. The caller has no identity.
func (p *Proxy) ingress(c net.Conn, port api.PublishedPort) {
	tcp := c.(*net.TCPConn)
	ev := api.Event{Peer: anonymous, Source: c.RemoteAddr().String(), Destination: c.LocalAddr().String(), Service: port.Service + "." + port.Namespace}
	svc := p.plan().services[serviceKey(port.Namespace, port.Service)]
	sb := p.localEndpoint(port.Namespace, port.Service)
	if svc == nil || sb == nil {
		ev.Kind, ev.Reason = api.EventUnreachable, "no instance of the service runs on this node"
		p.events.add(ev)
		protocol := ""
		if svc != nil {
			protocol = svc.ports[port.Port].Protocol
		}
		p.still.moves(-1)
		defer p.still.moves(1)
		refuseConnection(tcp, protocol, refusal{Error: string(ev.Kind), Service: ev.Service, Caller: anonymous, Reason: ev.Reason, Hint: "hauberk why " + port.Service})
		return
	}
	if !sb.enter(in) {
		abortTCP(tcp)
		return
	}
	defer sb.leave(in)
	facts := sb.facts.Load()
	who := party{instance: facts.Instance, identity: facts.Identity, peerIdentity: anonymous}
	a := p.publishedArrival(sb, wire.New(tcp), port.Port, who, ev)
	a.origin = addrPort(c.RemoteAddr()).Addr()
	a.serve(svc)
}

func (p *Proxy) publishedArrival(sb *sandbox, c *wire.Conn, port uint16, who party, ev api.Event) *arrival {
	return &arrival{p: p, sb: sb, port: port, ev: ev, client: tcpSide{c}, who: who, accept: func() {}, refuse: func(int, string) { c.Abort() }}
}

// arrival is a connection that has reached the sandbox it is for.
type arrival struct {
	p      *Proxy
	sb     *sandbox
	port   uint16
	who    party
	sight  *sight     // what is noted of its requests
	origin netip.Addr // where the call comes from; not valid if that cannot be told
	ev     api.Event
	via    string // the address of the proxy that speaks for the caller
	client side
	// What is called: the service, how it speaks, and both as flows name them.
	key, protocol, address string
	counts                 counts // of the connection before it was frozen
	// accept and refuse answer the other proxy, before any byte.
	accept func()
	refuse func(status int, reason string)
	guest  atomic.Pointer[wire.Conn]
	others []*wire.Conn // to the guest, when HTTP/2 was frozen
	early  *early       // to the guest, before it is needed
	// streams is set once HTTP/2 is spoken, exchange once HTTP/1 is.
	streams  atomic.Pointer[exchange2]
	exchange atomic.Pointer[exchange]
	// engine is what passes the bytes, if it waits for more than the connections.
	engine atomic.Pointer[func()]
}

// allowedStill lets a connection stay whose requests are judged one by one; one
// of HTTP/2 ends those under way that a new plan forbids, one of HTTP/1 with them.
func (a *arrival) allowedStill(d *directory) bool {
	if x := a.streams.Load(); x != nil {
		x.judgeAgain(d)
	}
	x := a.exchange.Load()
	return x == nil || x.allowedStill()
}

// allowsStill judges a request under way by the plan of the moment.
func (a *arrival) allowsStill(h *underWay) bool {
	v := verdict{reason: "the service is no longer in the plan"}
	if s := a.p.directory.Load().services[a.key]; s != nil {
		if h.by(s) {
			return true
		}
		c := a.call()
		c.letter.one, c.began = &h.Head, h.began
		v, _ = decideRequest(s, c, &h.Head)
	}
	if !v.allowed {
		a.denied(verdict{rule: v.rule, reason: said(h.Method, h.Target) + " under way: " + v.reason})
	}
	return v.allowed
}

// sever stops both sides. A stream stops with its flow's mark, or with the
// connection under it.
func (a *arrival) sever() {
	if c, ok := a.client.(tcpSide); ok {
		c.Sever()
	}
	if g := a.guest.Load(); g != nil {
		g.Sever()
	}
}

// cut ends both sides.
func (a *arrival) cut() {
	a.client.abort()
	if g := a.guest.Load(); g != nil {
		g.Abort()
	}
}

// freeze stops both sides where they are. A stream stops with the connection
// under it, and before its handler returns, or it would be reset.
func (a *arrival) freeze() {
	if f := a.engine.Load(); f != nil {
		(*f)()
	}
	switch c := a.client.(type) {
	case tcpSide:
		c.Freeze()
	case streamSide:
		c.Conn().Freeze()
	}
	if g := a.guest.Load(); g != nil {
		g.Freeze()
	}
}

// guestTCP is the connection to the guest, nil while there is none.
func (a *arrival) guestTCP() *net.TCPConn {
	if g := a.guest.Load(); g != nil {
		return g.TCP()
	}
	return nil
}

// connect connects to the guest, unless the connection has been cut meanwhile,
// or is to be frozen before it has succeeded.
func (a *arrival) connect(e *entry) (*wire.Conn, error) {
	ctx, cancel := context.WithCancel(a.sb.ctx)
	defer cancel()
	defer a.p.still.onFreeze(cancel)()
	c, err := a.connectWithin(ctx, e)
	if err != nil && a.p.still.frozen() {
		return nil, wire.ErrFrozen
	}
	return c, err
}

// connectWithin is connect for who cannot come back to it.
func (a *arrival) connectWithin(ctx context.Context, e *entry) (*wire.Conn, error) {
	if c := a.metGuest(); c != nil {
		return c, nil
	}
	tcp, err := a.sb.connect(ctx, a.port)
	if err != nil {
		if ctx.Err() == nil || a.sb.ctx.Err() != nil {
			a.unreachable(err)
		}
		return nil, err
	}
	c := wire.New(tcp)
	a.guest.Store(c)
	if e.cut.Load() {
		c.Abort()
		return nil, errCut
	}
	if e.frozen.Load() {
		c.Freeze() // whoever froze the connection has not seen this one
	}
	return c, nil
}

// serve registers the connection, judges it and connects it to the guest.
func (a *arrival) serve(svc *service) {
	a.key, a.protocol, a.address = serviceKey(svc.Namespace, svc.Name), svc.ports[a.port].Protocol, fmt.Sprintf("%s:%d", svc, a.port)
	if !a.byRequest() {
		if v := a.judge(svc, a.call()); !v.allowed {
			a.refuse(401, v.reason)
			return
		}
	}
	e := a.entry()
	err := a.sb.register(e)
	if errors.Is(err, wire.ErrFrozen) {
		a.freeze()
		a.p.still.put(a.flow(e, engineState{Fresh: true}))
		return
	}
	if err != nil {
		a.ev.Kind, a.ev.Reason = kindOf(err), err.Error()
		a.sb.refuse(a.ev)
		a.refuse(401, err.Error())
		return
	}
	a.finish(e, a.begin(e, svc))
}

// finish lets go of a connection that has ended, or leaves one that is frozen to
// whoever has frozen it.
func (a *arrival) finish(e *entry, frozen *engineState) {
	a.p.registry.remove(e)
	e.watch.leave()
	a.leaveGuest()
	if frozen != nil {
		a.p.still.put(a.flow(e, *frozen))
		return
	}
	a.sb.ended(e)
}

// byRequest tells whether requests are judged one by one.
func (a *arrival) byRequest() bool { return speaksHTTP(a.protocol) || newCodec(a.protocol) != nil }

// entry is the connection as the registry knows it.
func (a *arrival) entry() *entry {
	e := &entry{direction: "in", guest: a.guestTCP, party: a.who, address: a.address, sever: a.sever, close: a.cut, freeze: a.freeze}
	e.watch = &watch{a: a, e: e, key: a.key, counted: a.counts.Sent}
	a.sight = a.p.observer.look(a)
	switch {
	case newCodec(a.protocol) != nil:
		// A server may speak first, so who may call nothing any more goes.
		e.allowed = func(d *directory) bool {
			s := d.services[a.key]
			return a.guest.Load() == nil || s != nil && mayCall(s, a.call())
		}
	case speaksHTTP(a.protocol):
		e.allowed = a.allowedStill
	default:
		e.allowed = func(d *directory) bool {
			s := d.services[a.key]
			return s != nil && decide(s, a.call()).allowed
		}
	}
	a.counts.restore(e)
	return e
}

// begin connects to the guest, accepts the connection and passes its bytes.
func (a *arrival) begin(e *entry, svc *service) *engineState {
	if a.byRequest() {
		if err := a.meetGuest(svc, e); err != nil {
			return a.unmet(err)
		}
		a.accept()
		return a.run(e, engineState{})
	}
	if _, err := a.connect(e); err != nil {
		return a.unmet(err)
	}
	a.accept()
	return a.run(e, engineState{Splice: &halves{}})
}

// unmet refuses a connection whose guest cannot be reached, or has it begin anew.
func (a *arrival) unmet(err error) *engineState {
	if errors.Is(err, wire.ErrFrozen) {
		a.freeze()
		return &engineState{Fresh: true}
	}
	a.refuse(503, err.Error())
	return nil
}

// run passes the bytes, from where from says that the engine stands. It returns
// where it stands if the connection is frozen.
func (a *arrival) run(e *entry, from engineState) *engineState {
	switch {
	case from.Splice != nil:
		if h := splice(e, tcpSide{a.guest.Load()}, a.client, *from.Splice); h != nil {
			return &engineState{Splice: h}
		}
	case newCodec(a.protocol) != nil:
		if s := a.serveRPC(e, a.key, a.protocol, from.RPC); s != nil {
			return &engineState{RPC: s}
		}
	case from.HTTP2 != nil:
		if s := a.serveHTTP2(e, a.key, &begunSide{a.client, from.HTTP2.Begun}, from.HTTP2); s != nil {
			return &engineState{HTTP2: s}
		}
	case from.HTTP != nil:
		return a.runHTTP(e, &begunSide{a.client, from.HTTP.Client}, from.HTTP)
	default:
		return a.open(e, from.Begun)
	}
	return nil
}

// open finds out which HTTP is spoken, and speaks it.
func (a *arrival) open(e *entry, begun []byte) *engineState {
	client, two, err := opening(&begunSide{a.client, begun})
	if errors.Is(err, wire.ErrFrozen) {
		return &engineState{Begun: client.begun}
	}
	// Another fault is met again when reading on.
	if !two && a.protocol != "grpc" {
		return a.runHTTP(e, client, nil)
	}
	if s := a.serveHTTP2(e, a.key, client, nil); s != nil {
		return &engineState{HTTP2: s}
	}
	return nil
}

func (a *arrival) runHTTP(e *entry, client *begunSide, from *exchangeState) *engineState {
	s := a.serveHTTP(e, a.key, client, from)
	if s == nil {
		return nil
	}
	s.Client = append(s.Client, client.begun...)
	return &engineState{HTTP: s}
}

func (a *arrival) unreachable(err error) {
	ev := a.ev
	ev.Kind, ev.Reason = api.EventUnreachable, err.Error()
	a.sb.refuse(ev)
}

func (a *arrival) judge(s *service, c call) verdict {
	v := decide(s, c)
	if !v.allowed {
		a.denied(v)
	}
	a.tried(v, "connection")
	return v
}

func (a *arrival) denied(v verdict) {
	ev := a.ev
	ev.Kind, ev.Rule, ev.Reason = api.EventAccessDenied, v.rule, v.reason
	a.sb.refuse(ev)
}

// serveHTTP judges each request by the plan of the moment.
func (a *arrival) serveHTTP(e *entry, key string, client side, from *exchangeState) *exchangeState {
	var tried *http1.Head
	var by *directory // that has judged last
	var x *exchange
	x = &exchange{
		entry:  e,
		sight:  a.sight,
		client: client,
		dial: func() (side, error) {
			c, err := a.connect(e)
			return tcpSide{c}, err
		},
		judge: func(h *http1.Head) (status int, r refusal) {
			r = refusal{Service: a.ev.Service, Caller: a.who.peerIdentity, Method: h.Method, Path: h.Target[:min(len(h.Target), 256)],
				Hint: "hauberk why " + a.sb.facts.Load().Instance}
			v := verdict{reason: "the service is no longer in the plan"}
			status = 403
			by = a.p.directory.Load()
			if s := by.services[key]; s != nil {
				x.judged = judged{s.rules(), time.Now()}
				c := a.call()
				c.letter.one, c.began = h, x.judged.began
				v, status = decideRequest(s, c, h)
			}
			if v.allowed {
				if h != tried { // the first of a connection is judged twice
					a.triedRequest(v, h.Method, h.Target)
					tried = h
				}
				a.sight.now.rule = v.rule
				return 0, r
			}
			ev := a.ev
			ev.Kind, ev.Rule, ev.Reason = api.EventAccessDenied, v.rule, said(h.Method, h.Target)+": "+v.reason
			a.sb.refuse(ev)
			r.Error, r.Rule, r.Reason = "access denied", v.rule, v.reason
			return status, r
		},
		malformed: func(err error) {
			ev := a.ev
			ev.Kind, ev.Reason = api.EventBadRequest, err.Error()
			a.sb.refuse(ev)
		},
		way: &way{
			stale:  func() bool { return by != a.p.directory.Load() },
			allows: a.allowsStill,
		},
	}
	x.start()
	freeze := x.freeze
	a.engine.Store(&freeze)
	if e.frozen.Load() {
		freeze()
	}
	if from != nil && from.Met {
		x.server = &begunSide{tcpSide{a.guest.Load()}, from.Server}
	}
	a.exchange.Store(x)
	return x.run(from)
}
