package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/mesh/tls13"
	"hauberk.dev/mesh/wire"
)

// flowKind is where a connection comes from.
type flowKind string

const (
	flowIn        flowKind = "in"        // from another proxy
	flowPublished flowKind = "published" // from the node
	flowOut       flowKind = "out"       // from a guest to a service
	flowEgress    flowKind = "egress"    // from a guest to the outside
)

// flow is a frozen connection of a workload: plain data, and its sockets.
type flow struct {
	flowState
	over   *hbone.Conn // the link that carries its stream
	client *wire.Conn  // nil for a stream
	server *wire.Conn  // nil for a stream, and while there is none
	more   []*wire.Conn
}

// flowState is the plain data of a flow.
type flowState struct {
	Kind     flowKind       `json:"kind"`
	Instance string         `json:"instance"`
	Link     int            `json:"link,omitempty"` // which of the links, from 1; 0 for none
	Stream   uint32         `json:"stream,omitempty"`
	Gone     bool           `json:"gone,omitempty"` // the stream has ended
	Port     uint16         `json:"port,omitempty"`
	Service  string         `json:"service,omitempty"`
	Protocol string         `json:"protocol,omitempty"`
	Address  string         `json:"address,omitempty"`
	To       netip.AddrPort `json:"to,omitzero"`
	Party    partyState     `json:"party"`
	Origin   netip.Addr     `json:"origin,omitzero"`
	Event    api.Event      `json:"event"`
	Counts   counts         `json:"counts"`
	Engine   engineState    `json:"engine"`
	Client   *wire.State    `json:"client,omitempty"`
	Server   *wire.State    `json:"server,omitempty"`
	More     []wire.State   `json:"more,omitempty"`
}

// engineState is where what passes the bytes of a flow stands. At most one field
// is set, and Callbacks beside Splice; none means that it is not known yet what is
// spoken.
type engineState struct {
	Fresh  bool            `json:"fresh,omitempty"` // nothing has gone over the flow
	Begun  []byte          `json:"begun,omitempty"` // read to find out what is spoken
	Splice *halves         `json:"splice,omitempty"`
	HTTP   *exchangeState  `json:"http,omitempty"`
	HTTP2  *exchange2State `json:"http2,omitempty"`
	RPC    *rpcState       `json:"rpc,omitempty"`
	// Callbacks is where the judging of what the server asks stands, nil without.
	Callbacks *callbacksState `json:"callbacks,omitempty"`
}

// met tells whether the engine has a server.
func (s *engineState) met() bool {
	return s.Splice != nil || s.HTTP != nil && s.HTTP.Met || s.RPC != nil && s.RPC.Met
}

// counts are what a connection has moved, and since when.
type counts struct {
	Since    time.Time `json:"since,omitzero"`
	Sent     uint64    `json:"sent,omitempty"`
	Received uint64    `json:"received,omitempty"`
}

func (c *counts) restore(e *entry) {
	e.since = c.Since
	e.sent.Store(c.Sent)
	e.received.Store(c.Received)
}

func countsOf(e *entry) counts { return counts{e.since, e.sent.Load(), e.received.Load()} }

// partyState is a party as plain data.
type partyState struct {
	Instance     string `json:"instance,omitempty"`
	Identity     string `json:"identity,omitempty"`
	Serial       string `json:"serial,omitempty"`
	PeerInstance string `json:"peerInstance,omitempty"`
	PeerIdentity string `json:"peerIdentity,omitempty"`
	PeerSerial   string `json:"peerSerial,omitempty"`
}

func frozenParty(p party) partyState {
	return partyState{p.instance, p.identity, p.serial, p.peerInstance, p.peerIdentity, p.peerSerial}
}

func (s partyState) party() party {
	return party{s.Instance, s.Identity, s.Serial, s.PeerInstance, s.PeerIdentity, s.PeerSerial}
}

// carrierLink is a link to another proxy, and what it is made of.
type carrierLink struct {
	h     *hbone.Conn
	tls   *tls13.Conn
	raw   *wire.Conn
	key   poolKey    // of the one that called
	guest *guestSide // of the one that was called
}

// linkState is a frozen link as plain data.
type linkState struct {
	Instance string         `json:"instance"`
	Party    partyState     `json:"party"`
	Since    time.Time      `json:"since"`
	Source   string         `json:"source,omitempty"` // of who called
	Serial   string         `json:"serial,omitempty"` // of our certificate, if we called
	Gateway  netip.AddrPort `json:"gateway,omitzero"` // that we called
	Address  netip.Addr     `json:"address,omitzero"` // of the endpoint behind it
	TLS      tls13.State    `json:"tls"`
	HTTP2    *hbone.State   `json:"http2"`
	Wire     wire.State     `json:"wire"`
}

// flow is what is left of a frozen arrival.
func (a *arrival) flow(e *entry, engine engineState) *flow {
	f := &flow{flowState: flowState{Kind: flowPublished, Instance: a.sb.facts.Load().Instance, Port: a.port, Service: a.key, Protocol: a.protocol,
		Address: a.address, Party: frozenParty(a.who), Origin: a.origin, Event: a.ev, Counts: countsOf(e), Engine: engine}}
	switch c := a.client.(type) {
	case tcpSide:
		f.client = c.Conn
	case streamSide:
		f.Kind, f.over, f.Stream = flowIn, c.Conn(), c.ID()
	case goneSide:
		f.Kind, f.Gone = flowIn, true
	}
	if engine.met() {
		f.server = a.guest.Load()
	}
	if engine.HTTP2 != nil {
		f.more = a.others
	}
	return f
}

// state is what is left of a frozen connection of a guest.
func (f *outFlow) state(e *entry, h *halves) *flow {
	s := &flow{flowState: flowState{Kind: flowEgress, Instance: f.sb.facts.Load().Instance, Service: f.service, Protocol: f.protocol, To: f.to, Party: frozenParty(f.party),
		Event: f.ev, Counts: countsOf(e), Engine: engineState{Splice: h, Callbacks: f.back}}, client: f.c, server: f.far}
	switch {
	case f.stream != nil:
		s.Kind, s.over, s.Stream = flowOut, f.stream.Conn(), f.stream.ID()
	case f.far == nil:
		s.Kind, s.Gone = flowOut, true
	}
	return s
}

// check refuses what no flow can have come to. Who hands flows over is trusted
// with them, but may be of another version.
func (s *flowState) check() error {
	switch s.Kind {
	case flowIn, flowPublished, flowOut, flowEgress:
	default:
		return fmt.Errorf("flow of kind %q", s.Kind)
	}
	if !s.Gone && (s.Kind == flowIn || s.Kind == flowOut && !s.Engine.Fresh) != (s.Link > 0) {
		return fmt.Errorf("flow of kind %q over link %d", s.Kind, s.Link)
	}
	if (s.Engine.met() && s.Kind != flowOut) != (s.Server != nil) {
		return errors.New("flow with an engine that does not fit its sockets")
	}
	var err error
	if c := s.Engine.Callbacks; c != nil {
		err = c.check()
	}
	switch e := &s.Engine; {
	case e.HTTP != nil:
		err = e.HTTP.check()
	case e.RPC != nil:
		err = e.RPC.check()
	}
	for _, w := range append([]wire.State{}, s.More...) {
		err = errors.Join(err, w.Check())
	}
	for _, w := range []*wire.State{s.Client, s.Server} {
		if w != nil {
			err = errors.Join(err, w.Check())
		}
	}
	return err
}
