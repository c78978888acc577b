package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/handover"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/mesh/tls13"
	"hauberk.dev/mesh/wire"
	"hauberk.dev/plan"
)

// builder makes connections of items. Nothing of them moves before start.
type builder struct {
	p     *Proxy
	links []*builtLink
	start []func()
	made  []*wire.Conn
}

type builtLink struct {
	*carrierLink
	sb      *sandbox
	streams map[uint32]*hbone.Stream
}

// build makes anew what was held, and returns what sets it going. world tells
// whether plan and sandboxes are to be made too.
func (p *Proxy) build(load *handover.Load, world bool) (start func(), err error) {
	if load.Version < handover.Oldest || load.Version > handover.Version {
		return nil, fmt.Errorf("build connections: version %d; want %d to %d", load.Version, handover.Oldest, handover.Version)
	}
	b := &builder{p: p}
	for n, i := range load.Items {
		starts, made, links := len(b.start), len(b.made), len(b.links)
		err := b.item(i, world)
		if err == nil {
			continue
		}
		err = fmt.Errorf("build connections: item %d, %s: %w", n, i.Kind, err)
		if world || i.Kind != itemLink && i.Kind != itemFlow {
			for _, w := range b.made {
				w.Close() // the sockets live on elsewhere
			}
			return nil, err
		}
		// Nobody else has the others: they are not lost for one.
		p.log.Error("a connection cannot go on", "err", err)
		b.start = b.start[:starts]
		for _, w := range b.made[made:] {
			b.start = append(b.start, w.Abort)
		}
		if i.Kind == itemLink {
			b.links = append(b.links[:links], &builtLink{}) // which keeps the numbers
		}
	}
	return func() {
		defer closeLoad(load)
		for _, f := range b.start {
			f()
		}
	}, nil
}

func (b *builder) item(i handover.Item, world bool) error {
	switch i.Kind {
	case itemWorld:
		if !world {
			return nil
		}
		return into(i, -1, b.world)
	case itemSandbox:
		return into(i, 3, func(s plan.Sandbox, files []*os.File) error { return b.sandbox(s, files, world) })
	case itemGateway:
		return into(i, 1, b.gateway)
	case itemPublished:
		return into(i, -1, b.published)
	case itemLearnt:
		return into(i, 0, func(s learntState, _ []*os.File) error { b.learnt(&s, world); return nil })
	case itemCounts:
		return into(i, 0, func(s countsState, _ []*os.File) error { return b.counts(&s, world) })
	case itemLink:
		return into(i, 1, b.link)
	case itemFlow:
		return into(i, -1, b.flow)
	}
	return fmt.Errorf("a kind that is not known here")
}

// into reads an item with that many files; -1 is any number.
func into[T any](i handover.Item, files int, f func(T, []*os.File) error) error {
	var v T
	if files >= 0 && len(i.Files) != files {
		return fmt.Errorf("%d descriptors; want %d", len(i.Files), files)
	}
	if err := json.Unmarshal(i.Body, &v); err != nil {
		return err
	}
	return f(v, i.Files)
}

func (b *builder) world(w worldState, files []*os.File) error {
	if len(b.p.sandboxes) > 0 || b.p.world.Load() != nil {
		return errors.New("this proxy has a plan already")
	}
	for i, to := range []**net.UnixListener{&b.p.nodes, &b.p.door} {
		if i >= len(files) {
			return errors.New("a socket is missing")
		}
		ln, err := net.FileListener(files[i])
		if err != nil {
			return err
		}
		var ok bool
		if *to, ok = ln.(*net.UnixListener); !ok {
			ln.Close()
			return errors.New("a socket for others is none")
		}
		(*to).SetUnlinkOnClose(true)
	}
	b.p.registry.cutEpoch(w.Epoch)
	return b.p.setPlan(w.Plan)
}

// later has listeners taken at the start.
func (b *builder) later(files []*os.File, f func([]*os.File) error) error {
	b.start = append(b.start, func() {
		if err := f(files); err != nil {
			b.p.log.Error("take listeners over", "err", err)
		}
	})
	return nil
}

func (b *builder) sandbox(s plan.Sandbox, files []*os.File, world bool) error {
	p := b.p
	p.mu.Lock()
	sb := p.sandboxes[s.Instance]
	if sb == nil && world {
		sb = p.newSandbox(s)
		p.sandboxes[s.Instance], p.byAddress[s.Address] = sb, sb
	}
	p.mu.Unlock()
	if sb == nil {
		return nil // removed meanwhile
	}
	return b.later(files, sb.listen)
}

func (b *builder) gateway(_ struct{}, files []*os.File) error {
	return b.later(files, func(files []*os.File) error { return b.p.setGateway(files[0]) })
}

func (b *builder) published(ports []api.PublishedPort, files []*os.File) error {
	if len(ports) != len(files) {
		return fmt.Errorf("%d descriptors for %d ports", len(files), len(ports))
	}
	return b.later(files, func(files []*os.File) error { return b.p.setPublished(ports, files) })
}

// counts goes on from what was counted, if that was in another process. What has
// no place here is no reason to lose connections.
func (b *builder) counts(s *countsState, world bool) error {
	b.start = append(b.start, func() { b.p.events.give(s.Events, s.Lost) })
	if !world {
		return nil
	}
	if err := b.p.restore(s); err != nil {
		b.p.log.Warn("not all that was counted or learnt was taken over", "err", err)
	}
	return nil
}

// learnt goes on from what was learnt of a service.
func (b *builder) learnt(s *learntState, world bool) {
	if !world {
		return
	}
	if err := b.p.relearn(s); err != nil {
		b.p.log.Warn("what was learnt was not taken over", "service", s.Service, "err", err)
	}
}

// wire makes a frozen connection of a descriptor.
func (b *builder) wire(f *os.File, s wire.State) (*wire.Conn, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	c, err := socketOf(f)
	if err != nil {
		return nil, err
	}
	if tcp, ok := c.(*net.TCPConn); ok {
		b.p.carried.add(tcp)
	}
	w := wire.Resume(c, s)
	b.made = append(b.made, w)
	b.start = append(b.start, w.Thaw)
	return w, nil
}

// guestWire is wire for a connection with a guest, or with what is outside.
func (b *builder) guestWire(f *os.File, s wire.State) (*wire.Conn, error) {
	w, err := b.wire(f, s)
	if err == nil && w.TCP() == nil {
		err = errors.New("a descriptor is no TCP connection")
	}
	return w, err
}

func (b *builder) sandboxOf(instance string) (*sandbox, error) {
	b.p.mu.Lock()
	defer b.p.mu.Unlock()
	if sb := b.p.sandboxes[instance]; sb != nil {
		return sb, nil
	}
	return nil, fmt.Errorf("sandbox %q is not known", instance)
}

// link makes a link anew. Its streams are made with their flows.
func (b *builder) link(s linkState, files []*os.File) error {
	sb, err := b.sandboxOf(s.Instance)
	if err != nil {
		return err
	}
	raw, err := b.wire(files[0], s.Wire)
	if err != nil {
		return err
	}
	client := s.Source == ""
	l := &builtLink{carrierLink: &carrierLink{raw: raw}, sb: sb}
	defer s.TLS.Forget()
	if l.tls, err = tls13.Resume(raw, s.TLS, client); err != nil {
		return err
	}
	b.links = append(b.links, l)
	if s.HTTP2 == nil {
		return errors.New("no state of HTTP/2")
	}
	if client {
		return b.caller(l, s)
	}
	return b.called(l, s)
}

// caller is a link that this proxy has opened.
func (b *builder) caller(l *builtLink, s linkState) (err error) {
	if l.h, l.streams, err = hbone.ResumeClient(l.tls, s.HTTP2); err != nil {
		return err
	}
	l.key = poolKey{s.Instance, s.Serial, s.Gateway, s.Address}
	e := &entry{kind: kindLink, party: s.Party.party(), since: s.Since}
	rerr := l.sb.pooled(e, l.carrierLink)
	b.start = append(b.start, func() {
		l.thaw()
		if rerr != nil {
			l.h.Close() // revoked meanwhile
		}
		b.p.running.Go(func() { l.h.Run() })
	})
	return nil
}

// called is a link that a peer has opened.
func (b *builder) called(l *builtLink, s linkState) (err error) {
	g := &guestSide{p: b.p, raw: l.raw, tls: l.tls, source: s.Source, sb: l.sb, who: s.Party.party()}
	l.guest = g
	if l.h, l.streams, err = hbone.ResumeServer(l.tls, s.HTTP2, g.serve, nil); err != nil {
		return err
	}
	var rerr error
	g.entry = &entry{kind: kindLink, party: g.who, since: s.Since, sever: g.raw.Sever, close: func() { l.h.Close() }, link: l.carrierLink}
	if rerr = l.sb.register(g.entry); rerr != nil {
		g.entry = nil
	}
	b.start = append(b.start, func() {
		l.thaw()
		if rerr != nil {
			l.h.Close()
			g.refused(rerr)
		}
		b.p.running.Go(func() {
			g.gone(l.h.Run())
		})
	})
	return nil
}

// thaw sets a link going. Streams that are no flow's have been left: nobody reads
// them, and nobody else would end them.
func (l *builtLink) thaw() {
	l.h.Thaw()
	for _, s := range l.streams {
		s.Reset(hbone.CodeCancel)
	}
}

// stream is the stream of a flow.
func (b *builder) stream(s *flowState) (*builtLink, *hbone.Stream, error) {
	if s.Link < 1 || s.Link > len(b.links) {
		return nil, nil, fmt.Errorf("link %d of %d", s.Link, len(b.links))
	}
	l := b.links[s.Link-1]
	stream := l.streams[s.Stream]
	if stream == nil {
		return nil, nil, fmt.Errorf("link %d has no stream %d", s.Link, s.Stream)
	}
	delete(l.streams, s.Stream)
	return l, stream, nil
}

// flow makes a flow anew.
func (b *builder) flow(s flowState, files []*os.File) error {
	if err := s.check(); err != nil {
		return err
	}
	sb, err := b.sandboxOf(s.Instance)
	if err != nil {
		return err
	}
	f := &flow{flowState: s}
	for _, part := range []struct {
		state *wire.State
		conn  **wire.Conn
	}{{s.Client, &f.client}, {s.Server, &f.server}} {
		if part.state == nil {
			continue
		}
		if len(files) == 0 {
			return errors.New("a descriptor is missing")
		}
		if *part.conn, err = b.guestWire(files[0], *part.state); err != nil {
			return err
		}
		files = files[1:]
	}
	if len(files) != len(s.More) {
		return fmt.Errorf("%d descriptors are left for %d connections", len(files), len(s.More))
	}
	for i := range files {
		c, err := b.guestWire(files[i], s.More[i])
		if err != nil {
			return err
		}
		f.more = append(f.more, c)
	}
	if s.Kind == flowIn || s.Kind == flowPublished {
		return b.arrival(sb, f)
	}
	return b.departure(sb, f)
}

// arrival goes on with a connection to a guest.
func (b *builder) arrival(sb *sandbox, f *flow) error {
	var a *arrival
	run := func(serve func()) { b.p.running.Go(serve) }
	switch {
	case f.Gone:
		a = &arrival{p: b.p, sb: sb, port: f.Port, who: f.Party.party(), ev: f.Event, client: goneSide{}, accept: func() {}, refuse: func(int, string) {}}
	case f.Kind == flowIn:
		l, stream, err := b.stream(&f.flowState)
		if err != nil || l.guest == nil {
			return errors.Join(err, errors.New("not over a link that was called"))
		}
		a = l.guest.arrival(stream, f.Port, f.Party.party(), f.Event)
		if f.Engine.Fresh {
			b.start = append(b.start, func() { l.h.Handle(stream, l.guest.serve) })
			return nil
		}
		run = func(serve func()) { l.h.Handle(stream, func(*hbone.Stream) { serve() }) }
	default:
		if f.client == nil {
			return errors.New("no connection of the client")
		}
		a = b.p.publishedArrival(sb, f.client, f.Port, f.Party.party(), f.Event)
	}
	a.key, a.protocol, a.address, a.counts, a.origin = f.Service, f.Protocol, f.Address, f.Counts, f.Origin
	if f.server != nil {
		a.guest.Store(f.server)
	}
	a.others = f.more // of HTTP/2
	b.start = append(b.start, func() {
		b.p.still.moves(1)
		sb.open[in].Add(1)
		run(func() { a.goOn(f.Engine) })
	})
	return nil
}

// goOn serves a connection that was frozen.
func (a *arrival) goOn(engine engineState) {
	defer a.p.still.moves(-1)
	defer a.sb.leave(in)
	e := a.entry()
	if err := a.sb.register(e); errors.Is(err, wire.ErrFrozen) {
		a.freeze()
		a.p.still.put(a.flow(e, engine))
		return
	} else if err != nil { // revoked or forbidden meanwhile
		a.ev.Kind, a.ev.Reason = kindOf(err), err.Error()
		a.sb.refuse(a.ev)
		a.cut()
		return
	}
	if !engine.Fresh {
		a.finish(e, a.run(e, engine))
		return
	}
	// Of a published port: nobody has looked at it yet.
	svc := a.p.directory.Load().services[a.key]
	if svc == nil {
		a.cut()
		a.finish(e, nil)
		return
	}
	a.finish(e, a.begin(e, svc))
}

// countIn counts a connection at its endpoint, as the pick that chose it did.
func (p *Proxy) countIn(service string, address netip.Addr) (release func()) {
	s := p.directory.Load().services[service]
	if s == nil {
		return func() {}
	}
	for i := range s.Endpoints {
		if s.Endpoints[i].Address != address {
			continue
		}
		if pick, err := s.set.PickNamed(p.traffic.clock.Now(), endpointName(&s.Endpoints[i])); err == nil {
			return pick.Release
		}
	}
	return func() {}
}

// departure goes on with a connection of a guest.
func (b *builder) departure(sb *sandbox, f *flow) error {
	if f.client == nil {
		return errors.New("no connection of the guest")
	}
	if f.Engine.Fresh {
		b.start = append(b.start, func() {
			b.p.still.moves(1)
			b.p.running.Go(func() {
				defer b.p.still.moves(-1)
				sb.goOut(f.client)
			})
		})
		return nil
	}
	o := &outFlow{sb: sb, c: f.client, far: f.server, to: f.To, ev: f.Event, party: f.Party.party(), counts: f.Counts, service: f.Service,
		protocol: f.Protocol, back: f.Engine.Callbacks}
	release := func() {}
	if f.Kind == flowOut && !f.Gone {
		l, stream, err := b.stream(&f.flowState)
		if err != nil {
			return err
		}
		o.stream = stream
		release = sb.p.countIn(f.Service, l.key.address)
	}
	h := halves{}
	if f.Engine.Splice != nil {
		h = *f.Engine.Splice
	}
	b.start = append(b.start, func() {
		b.p.still.moves(1)
		sb.open[out].Add(1)
		b.p.running.Go(func() {
			defer b.p.still.moves(-1)
			defer sb.leave(out)
			defer release()
			sb.p.listenFor(o.c.TCP())
			if err := o.serve(h); errors.Is(err, wire.ErrFrozen) {
				e := o.entry()
				e.freeze()
				sb.p.still.put(o.state(e, &h))
			} else if err != nil { // revoked or forbidden meanwhile
				o.unregistered(err)
			}
		})
	})
	return nil
}
