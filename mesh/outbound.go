package mesh

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/mesh/wire"
)

// outbound serves a connection that the sandbox has made.
func (sb *sandbox) outbound(c net.Conn) { sb.goOut(wire.New(c.(*net.TCPConn))) }

func (sb *sandbox) goOut(c *wire.Conn) {
	if !sb.enter(out) {
		c.Abort()
		return
	}
	defer sb.leave(out)
	sb.p.listenFor(c.TCP())
	from, to := addrPort(c.RemoteAddr()), wanted(c.TCP())
	facts := sb.facts.Load()
	ev := api.Event{Source: from.String(), Destination: to.String()}
	if from.Addr() != facts.Address {
		ev.Kind, ev.Reason = api.EventEgressRefused, "the source address is not the sandbox's"
		sb.refuse(ev)
		c.Abort()
		return
	}
	if t, ok := sb.p.plan().targets[to]; ok {
		sb.toService(c, t, ev)
		return
	}
	if !mayEgress(facts, destination{to}) {
		ev.Kind, ev.Reason = api.EventEgressRefused, "no service has this address and no egress rule allows it"
		sb.refuse(ev)
		c.Abort()
		return
	}
	sb.toOutside(c, to, ev)
}

// toService forwards to an endpoint of a service.
func (sb *sandbox) toService(c *wire.Conn, t target, ev api.Event) {
	ev.Service, ev.Peer = t.service.String(), t.service.Identity
	ctx, cancel := context.WithTimeout(sb.ctx, identityWait)
	defer cancel()
	defer sb.p.still.onFreeze(cancel)()
	me, err := sb.svid.wait(ctx)
	if err != nil {
		if sb.leftFresh(c) {
			return
		}
		ev.Kind, ev.Reason = api.EventNoIdentity, err.Error()
		sb.refuseOutbound(c, t, ev)
		return
	}
	facts := sb.facts.Load()
	f := &outFlow{sb: sb, c: c, service: serviceKey(t.service.Namespace, t.service.Name), ev: ev, party: party{instance: facts.Instance, identity: facts.Identity, serial: me.serial, peerIdentity: t.service.Identity}}
	if err := sb.p.registry.check(f.party); err != nil {
		ev.Kind, ev.Reason = api.EventRevoked, err.Error()
		sb.refuseOutbound(c, t, ev)
		return
	}
	stream, pick, err := sb.reach(ctx, me, t, ev.Source)
	if err != nil {
		if sb.leftFresh(c) {
			return
		}
		ev.Kind, ev.Reason = outboundKind(err), err.Error()
		sb.refuseOutbound(c, t, ev)
		return
	}
	defer pick.Release()
	at := endpointOf(pick.Host())
	f.stream, f.party.peerInstance = stream, at.Instance
	f.protocol, f.back = t.port.Protocol, &callbacksState{Source: netip.AddrPortFrom(at.Address, t.port.Port)}
	err = f.serve(halves{})
	if errors.Is(err, wire.ErrFrozen) {
		stream.Reset(hbone.CodeCancel) // nothing has been sent over it
		sb.leftFresh(c)
	} else if err != nil {
		f.unregistered(err)
	}
}

// leftFresh leaves a connection over which nothing has gone yet to whoever has
// frozen the proxy, if that is so.
func (sb *sandbox) leftFresh(c *wire.Conn) bool {
	if !sb.p.still.frozen() {
		return false
	}
	c.Freeze()
	sb.p.still.put(&flow{flowState: flowState{Kind: flowOut, Instance: sb.facts.Load().Instance, Engine: engineState{Fresh: true}}, client: c})
	return true
}

// outFlow is a connection of a workload to a service, or to the outside.
type outFlow struct {
	sb      *sandbox
	c       *wire.Conn
	stream  *hbone.Stream // to a service
	service string
	// protocol is what is spoken to the service, and back where the judging of what
	// it asks stands; nil is not judged, as of a version that did not.
	protocol string
	back     *callbacksState
	far      *wire.Conn // or to the outside
	to       netip.AddrPort
	ev       api.Event
	party    party
	counts   counts
}

func (f *outFlow) entry() *entry {
	e := &entry{direction: "out", address: f.ev.Destination, party: f.party, guest: func() *net.TCPConn { return f.c.TCP() },
		sever: f.c.Sever, close: func() { f.c.Abort(); f.peer().abort() }, freeze: f.c.Freeze}
	if f.far != nil {
		e.direction = "egress"
		e.allowed = func(*directory) bool { return mayEgress(f.sb.facts.Load(), destination{f.to}) }
		e.sever = func() { f.c.Sever(); f.far.Sever() }
		e.close = func() { f.c.Abort(); f.far.Abort() }
		e.freeze = func() { f.c.Freeze(); f.far.Freeze() }
	}
	f.counts.restore(e)
	return e
}

func (f *outFlow) peer() side {
	switch {
	case f.far != nil:
		return tcpSide{f.far}
	case f.stream != nil:
		return streamSide{f.stream}
	}
	return goneSide{}
}

// serve registers the connection and moves its bytes. If it could not be
// registered the connection is ended, unless that is because of a freeze.
func (f *outFlow) serve(h halves) error {
	e := f.entry()
	if err := f.sb.register(e); err != nil {
		if !errors.Is(err, wire.ErrFrozen) {
			e.close()
		}
		return err
	}
	f.move(e, h)
	return nil
}

func (f *outFlow) move(e *entry, h halves) {
	client, server := side(tcpSide{f.c}), f.peer()
	back := f.callbacks(h)
	if back != nil {
		client, server = back.client, back.server
	}
	frozen := splice(e, client, server, h)
	if back != nil {
		back.stop()
		source := f.back.Source
		f.back = back.state()
		f.back.Source = source
	}
	f.sb.p.registry.remove(e)
	if frozen == nil {
		f.sb.ended(e)
		return
	}
	f.sb.p.still.put(f.state(e, frozen))
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

func (sb *sandbox) refuseOutbound(c *wire.Conn, t target, ev api.Event) {
	sb.refuse(ev)
	sb.p.still.moves(-1) // it ends by itself, soon
	defer sb.p.still.moves(1)
	refuseConnection(c.TCP(), t.port.Protocol, refusal{Error: string(ev.Kind), Service: ev.Service, Caller: sb.facts.Load().Identity, Reason: ev.Reason,
		Hint: "hauberk why " + sb.facts.Load().Instance})
}

// toOutside forwards to a destination that the egress rules list, in the clear:
// what is outside the mesh has no identity.
func (sb *sandbox) toOutside(c *wire.Conn, to netip.AddrPort, ev api.Event) {
	facts := sb.facts.Load()
	f := &outFlow{sb: sb, c: c, to: to, ev: ev, party: party{instance: facts.Instance, identity: facts.Identity}}
	if err := sb.p.registry.check(f.party); err != nil {
		ev.Kind, ev.Reason = api.EventRevoked, err.Error()
		sb.refuse(ev)
		c.Abort()
		return
	}
	ctx, cancel := context.WithTimeout(sb.ctx, connectTimeout)
	defer cancel()
	defer sb.p.still.onFreeze(cancel)()
	far, err := new(net.Dialer).DialContext(ctx, "tcp", to.String())
	if err != nil {
		if sb.leftFresh(c) {
			return
		}
		ev.Kind, ev.Reason = api.EventUnreachable, err.Error()
		sb.refuse(ev)
		c.Abort()
		return
	}
	f.far = wire.New(far.(*net.TCPConn))
	if err := f.serve(halves{}); errors.Is(err, wire.ErrFrozen) {
		far.Close() // nothing has been sent over it
		sb.leftFresh(c)
	} else if err != nil {
		f.unregistered(err)
	}
}

// unregistered tells why a connection was ended that could not be registered.
func (f *outFlow) unregistered(err error) {
	ev := f.ev
	if ev.Kind, ev.Reason = kindOf(err), err.Error(); f.stream == nil && errors.Is(err, errForbidden) {
		ev.Kind = api.EventEgressRefused
	}
	f.sb.refuse(ev)
}

// wanted is where a connection that was diverted here wants to go: its local
// address where it came by a tap, and what the kernel says where hooks of its
// cgroup have given it another. Who connects to the listener itself wants to go
// there, which nobody may.
func wanted(c *net.TCPConn) netip.AddrPort {
	local := addrPort(c.LocalAddr())
	if !local.Addr().IsLoopback() {
		return local
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return local
	}
	var said *unix.IPv6Mreq // a sockaddr_in, and four bytes of nothing
	cerr := raw.Control(func(fd uintptr) { said, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST) })
	if cerr != nil || err != nil || binary.NativeEndian.Uint16(said.Multiaddr[:]) != unix.AF_INET {
		return local
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(said.Multiaddr[4:8])), binary.BigEndian.Uint16(said.Multiaddr[2:]))
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
