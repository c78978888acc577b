package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/hbone"
)

// outbound serves a connection that the sandbox has made. Its local address is
// where the sandbox wants to go.
func (sb *sandbox) outbound(c net.Conn) {
	tcp := c.(*net.TCPConn)
	if !sb.enter(out) {
		abortTCP(tcp)
		return
	}
	defer sb.leave(out)
	sb.p.listenFor(tcp)
	from, to := addrPort(c.RemoteAddr()), addrPort(c.LocalAddr())
	facts := sb.facts.Load()
	ev := api.Event{Source: from.String(), Destination: to.String()}
	if from.Addr() != facts.Address {
		ev.Kind, ev.Reason = api.EventEgressRefused, "the source address is not the sandbox's"
		sb.refuse(ev)
		abortTCP(tcp)
		return
	}
	if t, ok := sb.p.plan().targets[to]; ok {
		sb.toService(tcp, t, ev)
		return
	}
	if !mayEgress(facts, destination{to}) {
		ev.Kind, ev.Reason = api.EventEgressRefused, "no service has this address and no egress rule allows it"
		sb.refuse(ev)
		abortTCP(tcp)
		return
	}
	sb.toOutside(tcp, to, ev)
}

// toService forwards to an endpoint of a service.
func (sb *sandbox) toService(c *net.TCPConn, t target, ev api.Event) {
	ev.Service, ev.Peer = t.service.String(), t.service.Identity
	ctx, cancel := context.WithTimeout(sb.ctx, identityWait)
	defer cancel()
	me, err := sb.svid.wait(ctx)
	if err != nil {
		ev.Kind, ev.Reason = api.EventNoIdentity, err.Error()
		sb.refuseOutbound(c, t, ev)
		return
	}
	facts := sb.facts.Load()
	e := &entry{direction: "out", address: ev.Destination, party: party{instance: facts.Instance, identity: facts.Identity, serial: me.serial, peerIdentity: t.service.Identity}}
	if err := sb.p.registry.check(e.party); err != nil {
		ev.Kind, ev.Reason = api.EventRevoked, err.Error()
		sb.refuseOutbound(c, t, ev)
		return
	}
	stream, pick, err := sb.reach(ctx, me, t, ev.Source)
	if err != nil {
		ev.Kind, ev.Reason = outboundKind(err), err.Error()
		sb.refuseOutbound(c, t, ev)
		return
	}
	defer pick.Release()
	e.peerInstance = endpointOf(pick.Host()).Instance
	e.guest = func() *net.TCPConn { return c }
	e.sever = func() { severTCP(c) }
	e.close = func() { abortTCP(c); stream.Reset(hbone.CodeCancel) }
	if err := sb.register(e); err != nil {
		e.close()
		ev.Kind, ev.Reason = kindOf(err), err.Error()
		sb.refuse(ev)
		return
	}
	splice(e, tcpSide{c}, streamSide{stream})
	sb.p.registry.remove(e)
	sb.ended(e)
}

func outboundKind(err error) api.EventKind {
	var status *hbone.StatusError
	var peer *peerError
	switch {
	case errors.Is(err, errRevoked):
		return api.EventRevoked
	case errors.Is(err, balance.ErrOverflow):
		return api.EventLimit
	case errors.As(err, &status) && status.Status == 401:
		return api.EventAccessDenied
	case errors.As(err, &peer):
		return api.EventPeerRefused
	}
	return api.EventUnreachable
}

// refuseConnection ends a connection that goes nowhere: with an explanation
// where requests are spoken, else with a reset.
func refuseConnection(c *net.TCPConn, protocol string, r refusal) {
	switch {
	case speaksHTTP(protocol):
		refuseHTTP(c, r)
	case newCodec(protocol) != nil:
		refuseRPC(c, protocol, fmt.Sprintf("%s: %s: %s; see: %s", r.Error, r.Service, r.Reason, r.Hint))
	default:
		abortTCP(c)
	}
}

func (sb *sandbox) refuseOutbound(c *net.TCPConn, t target, ev api.Event) {
	sb.refuse(ev)
	refuseConnection(c, t.port.Protocol, refusal{Error: string(ev.Kind), Service: ev.Service, Caller: sb.facts.Load().Identity, Reason: ev.Reason,
		Hint: "hauberk why " + sb.facts.Load().Instance})
}

// toOutside forwards to a destination that the egress rules list, in the clear:
// what is outside the mesh has no identity.
func (sb *sandbox) toOutside(c *net.TCPConn, to netip.AddrPort, ev api.Event) {
	facts := sb.facts.Load()
	e := &entry{direction: "egress", address: to.String(), party: party{instance: facts.Instance, identity: facts.Identity},
		allowed: func(*directory) bool { return mayEgress(sb.facts.Load(), destination{to}) }}
	if err := sb.p.registry.check(e.party); err != nil {
		ev.Kind, ev.Reason = api.EventRevoked, err.Error()
		sb.refuse(ev)
		abortTCP(c)
		return
	}
	ctx, cancel := context.WithTimeout(sb.ctx, connectTimeout)
	defer cancel()
	far, err := new(net.Dialer).DialContext(ctx, "tcp", to.String())
	if err != nil {
		ev.Kind, ev.Reason = api.EventUnreachable, err.Error()
		sb.refuse(ev)
		abortTCP(c)
		return
	}
	remote := far.(*net.TCPConn)
	e.guest = func() *net.TCPConn { return c }
	e.sever = func() { severTCP(c); severTCP(remote) }
	e.close = func() { abortTCP(c); abortTCP(remote) }
	if err := sb.register(e); err != nil {
		e.close()
		return
	}
	splice(e, tcpSide{c}, tcpSide{remote})
	sb.p.registry.remove(e)
	sb.ended(e)
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
