package mesh

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/id"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/mesh/http1"
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
func (p *Proxy) inbound(raw net.Conn) {
	select {
	case p.shakes <- struct{}{}:
	default: // more strangers at the door than can be looked at
		raw.Close()
		p.events.add(api.Event{Kind: api.EventLimit, Source: raw.RemoteAddr().String(), Reason: fmt.Sprintf("%d handshakes at once", maxHandshakes)})
		return
	}
	g := &guestSide{p: p, raw: raw.(*net.TCPConn), source: raw.RemoteAddr().String()}
	c := tls.Server(raw, &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: g.config})
	raw.SetDeadline(time.Now().Add(handshakeTimeout))
	err := c.HandshakeContext(p.context())
	<-p.shakes
	if err == nil && c.ConnectionState().NegotiatedProtocol != "h2" {
		err = errors.New("the peer does not speak h2")
	}
	if err != nil {
		raw.Close()
		g.refused(err)
		return
	}
	raw.SetDeadline(time.Time{})
	hbone.Serve(c, g.serve, g.attach)
	if g.entry != nil {
		p.registry.remove(g.entry)
	}
}

// guestSide is one connection to the gateway, for one sandbox.
type guestSide struct {
	p      *Proxy
	raw    *net.TCPConn
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
	g.entry = &entry{kind: kindLink, party: g.who, sever: func() { severTCP(g.raw) }, close: func() { h.Close() }}
	if err := g.sb.register(g.entry); err != nil {
		g.entry = nil
		h.Close()
		g.refused(err)
	}
}

// serve serves one stream: a connection of the peer to a port of the sandbox.
func (g *guestSide) serve(s *hbone.Stream) {
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
	a := &arrival{p: g.p, sb: sb, port: to.Port(), who: who, ev: ev, client: streamSide{s},
		accept: func() { s.Accept() }, refuse: func(status int, reason string) { s.Refuse(status, reason) }}
	a.serve(svc)
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
		refuseConnection(tcp, protocol, refusal{Error: string(ev.Kind), Service: ev.Service, Caller: anonymous, Reason: ev.Reason, Hint: "hauberk why " + port.Service})
		return
	}
	if !sb.enter(in) {
		abortTCP(tcp)
		return
	}
	defer sb.leave(in)
	facts := sb.facts.Load()
	a := &arrival{p: p, sb: sb, port: port.Port, ev: ev, client: tcpSide{tcp},
		who:    party{instance: facts.Instance, identity: facts.Identity, peerIdentity: anonymous},
		accept: func() {}, refuse: func(int, string) { abortTCP(tcp) }}
	a.serve(svc)
}

// arrival is a connection that has reached the sandbox it is for.
type arrival struct {
	p      *Proxy
	sb     *sandbox
	port   uint16
	who    party
	ev     api.Event
	client side
	// accept and refuse answer the other proxy, before any byte.
	accept func()
	refuse func(status int, reason string)
	guest  atomic.Pointer[net.TCPConn]
	early  *early // to the guest, before it is needed
	// streams is set once HTTP/2 is spoken.
	streams atomic.Pointer[exchange2]
}

// allowedStill lets a connection stay whose requests are judged one by one; one
// of HTTP/2 ends those under way that a new plan forbids.
func (a *arrival) allowedStill(d *directory) bool {
	if x := a.streams.Load(); x != nil {
		x.judgeAgain(d)
	}
	return true
}

// sever stops both sides. A stream stops with its flow's mark, or with the
// connection under it.
func (a *arrival) sever() {
	if c, ok := a.client.(tcpSide); ok {
		severTCP(c.TCPConn)
	}
	if g := a.guest.Load(); g != nil {
		severTCP(g)
	}
}

// cut ends both sides.
func (a *arrival) cut() {
	a.client.abort()
	if g := a.guest.Load(); g != nil {
		abortTCP(g)
	}
}

// connect connects to the guest, unless the connection has been cut meanwhile.
func (a *arrival) connect(e *entry) (*net.TCPConn, error) {
	if c := a.metGuest(); c != nil {
		return c, nil
	}
	c, err := a.sb.connect(a.sb.ctx, a.port)
	if err != nil {
		a.unreachable(err)
		return nil, err
	}
	a.guest.Store(c)
	if e.cut.Load() {
		abortTCP(c)
		return nil, errCut
	}
	return c, nil
}

// serve registers the connection, judges it and connects it to the guest.
func (a *arrival) serve(svc *service) {
	protocol := svc.ports[a.port].Protocol
	isHTTP, isRPC := speaksHTTP(protocol), newCodec(protocol) != nil
	e := &entry{direction: "in", guest: a.guest.Load, party: a.who, address: fmt.Sprintf("%s:%d", svc, a.port), sever: a.sever, close: a.cut}
	key := serviceKey(svc.Namespace, svc.Name)
	if isRPC {
		// A server may speak first, so who may call nothing any more goes.
		e.allowed = func(d *directory) bool {
			s := d.services[key]
			return a.guest.Load() == nil || s != nil && mayCall(s, a.who.peerIdentity, a.port)
		}
	} else if !isHTTP {
		if v := a.judge(svc, call{caller: a.who.peerIdentity, port: a.port}); !v.allowed {
			a.refuse(401, v.reason)
			return
		}
		e.allowed = func(d *directory) bool {
			s := d.services[key]
			return s != nil && decide(s, call{caller: a.who.peerIdentity, port: a.port}).allowed
		}
	}
	if isHTTP {
		e.allowed = a.allowedStill
	}
	if err := a.sb.register(e); err != nil {
		a.ev.Kind, a.ev.Reason = kindOf(err), err.Error()
		a.sb.refuse(a.ev)
		a.refuse(401, err.Error())
		return
	}
	defer a.sb.ended(e)
	defer a.p.registry.remove(e)
	if isHTTP || isRPC {
		if err := a.meetGuest(svc, e); err != nil {
			a.refuse(503, err.Error())
			return
		}
		defer a.leaveGuest()
		a.accept()
		if isRPC {
			a.serveRPC(e, key, protocol)
			return
		}
		client, two, _ := opening(a.client) // a fault is met again when reading on
		if two || protocol == "grpc" {
			a.serveHTTP2(e, key, client)
		} else {
			a.serveHTTP(e, key, client)
		}
		return
	}
	guest, err := a.connect(e)
	if err != nil {
		a.refuse(503, err.Error())
		return
	}
	a.accept()
	splice(e, tcpSide{guest}, a.client)
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
	return v
}

func (a *arrival) denied(v verdict) {
	ev := a.ev
	ev.Kind, ev.Rule, ev.Reason = api.EventAccessDenied, v.rule, v.reason
	a.sb.refuse(ev)
}

// serveHTTP judges each request by the plan of the moment.
func (a *arrival) serveHTTP(e *entry, key string, client side) {
	x := &exchange{
		entry:  e,
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
			if s := a.p.directory.Load().services[key]; s != nil {
				v, status = decideRequest(s, a.who.peerIdentity, a.port, h)
			}
			if v.allowed {
				return 0, r
			}
			ev := a.ev
			ev.Kind, ev.Rule, ev.Reason = api.EventAccessDenied, v.rule, fmt.Sprintf("%s %.128q: %s", h.Method, h.Target, v.reason)
			a.sb.refuse(ev)
			r.Error, r.Rule, r.Reason = "access denied", v.rule, v.reason
			return status, r
		},
		malformed: func(err error) {
			ev := a.ev
			ev.Kind, ev.Reason = api.EventBadRequest, err.Error()
			a.sb.refuse(ev)
		},
	}
	x.run()
}
