package mesh

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/id"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/mesh/tls13"
	"hauberk.dev/plan"
)

// poolKey names connections that may be shared: same caller with the same
// certificate, same endpoint.
type poolKey struct {
	instance, serial string
	gateway          netip.AddrPort
	address          netip.Addr
}

// pool keeps HBONE connections to the gateways of other sandboxes.
type pool struct {
	mu   sync.Mutex
	sets map[poolKey]*poolSet
}

type poolSet struct {
	dialing sync.Mutex // one handshake at a time for each key
	mu      sync.Mutex
	conns   []*hbone.Conn
}

func (p *pool) set(k poolKey) *poolSet {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sets == nil {
		p.sets = map[poolKey]*poolSet{}
	}
	s := p.sets[k]
	if s == nil {
		s = &poolSet{}
		p.sets[k] = s
	}
	return s
}

// sweep closes connections that have had no stream for a while.
func (p *pool) sweep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k, s := range p.sets {
		s.mu.Lock()
		for _, c := range s.conns {
			if n, idle := c.Busy(); n == 0 && now.Sub(idle) > poolIdle {
				go c.Close()
			}
		}
		if len(s.conns) == 0 && s.dialing.TryLock() {
			delete(p.sets, k)
			s.dialing.Unlock()
		}
		s.mu.Unlock()
	}
}

func (s *poolSet) list() []*hbone.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*hbone.Conn(nil), s.conns...)
}

func (s *poolSet) add(c *hbone.Conn) {
	s.mu.Lock()
	s.conns = append(s.conns, c)
	s.mu.Unlock()
}

func (s *poolSet) drop(c *hbone.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, have := range s.conns {
		if have == c {
			s.conns = append(s.conns[:i:i], s.conns[i+1:]...)
			return
		}
	}
}

// open opens a stream to a port of an endpoint, on a connection there is or on
// a new one.
func (p *Proxy) open(ctx context.Context, sb *sandbox, me identity, s *service, e *plan.Endpoint, port uint16, source string) (*hbone.Stream, error) {
	facts := sb.facts.Load()
	set := p.pool.set(poolKey{facts.Instance, me.serial, e.Gateway, e.Address})
	authority := netip.AddrPortFrom(e.Address, port).String()
	forwarded := hpack.HeaderField{Name: "forwarded", Value: `for="` + source + `"`}
	for _, c := range set.list() {
		stream, err := c.Open(ctx, authority, forwarded)
		var status *hbone.StatusError
		if err == nil || errors.As(err, &status) || ctx.Err() != nil {
			return stream, err
		}
		// Busy or broken: the request has not been taken up, so try another.
	}
	set.dialing.Lock()
	c, err := p.dialOnce(ctx, set, sb, me, s, e)
	set.dialing.Unlock()
	if err != nil {
		return nil, err
	}
	return c.Open(ctx, authority, forwarded)
}

// dialOnce dials, unless somebody else has while the lock was waited for.
func (p *Proxy) dialOnce(ctx context.Context, set *poolSet, sb *sandbox, me identity, s *service, e *plan.Endpoint) (*hbone.Conn, error) {
	for _, c := range set.list() {
		if n, _ := c.Busy(); n < hbone.MaxStreams/2 && c.Err() == nil {
			return c, nil
		}
	}
	return p.dial(ctx, set, sb, me, s, e)
}

// dial connects to a gateway: TLS 1.3, mutual, the peer must be what the plan
// says the endpoint is.
func (p *Proxy) dial(ctx context.Context, set *poolSet, sb *sandbox, me identity, s *service, e *plan.Endpoint) (*hbone.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	facts := sb.facts.Load()
	who := &entry{kind: kindLink, party: party{instance: facts.Instance, identity: facts.Identity, serial: me.serial,
		peerInstance: e.Instance, peerIdentity: s.Identity}}
	raw, err := p.reach(ctx, e.Gateway)
	if err != nil {
		return nil, err
	}
	cfg := id.ClientTLS(id.Static(me.cred), id.Only(s.identity))
	cfg.ServerName = serverName(e.Address)
	cfg.NextProtos = []string{"h2"}
	cfg.DynamicRecordSizingDisabled = true
	verify := cfg.VerifyConnection
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := verify(cs); err != nil {
			return err
		}
		who.peerSerial = serialOf(cs.PeerCertificates[0])
		return p.registry.check(who.party)
	}
	c, err := tls13.Client(ctx, raw, cfg)
	if err != nil {
		raw.Close()
		return nil, &peerError{fmt.Errorf("handshake with the endpoint: %w", err)}
	}
	if c.ConnectionState().NegotiatedProtocol != "h2" {
		raw.Close()
		return nil, &peerError{errors.New("the endpoint's gateway does not speak h2")}
	}
	h, err := hbone.Client(c)
	if err != nil {
		return nil, err
	}
	l := &carrierLink{h: h, tls: c, raw: raw, key: poolKey{facts.Instance, me.serial, e.Gateway, e.Address}}
	if err := sb.pooled(who, l); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// pooled registers a link and keeps it for others to use, until it ends or is
// frozen.
func (sb *sandbox) pooled(who *entry, l *carrierLink) error {
	who.link = l
	who.sever = l.raw.Sever
	who.close = func() { l.h.Close() }
	if err := sb.register(who); err != nil {
		return err
	}
	p := sb.p
	set := p.pool.set(l.key)
	set.add(l.h)
	go func() {
		<-l.h.Done()
		set.drop(l.h)
		p.registry.remove(who)
	}()
	return nil
}

// peerError is a peer that could not prove who it is.
type peerError struct{ error }

func (e *peerError) Unwrap() error { return e.error }

// verifiedSerial is the serial of a peer that has been verified.
func verifiedSerial(chain []*x509.Certificate) string {
	if len(chain) == 0 {
		return ""
	}
	return serialOf(chain[0])
}
