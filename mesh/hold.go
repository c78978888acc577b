package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"hauberk.dev/mesh/handover"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/mesh/inspect"
	"hauberk.dev/mesh/wire"
	"hauberk.dev/plan"
)

// The kinds of what is handed over, in this order.
const (
	itemWorld     = "world"     // plan and epoch; with the sockets for nodes and for who takes over
	itemSandbox   = "sandbox"   // with its three sockets
	itemGateway   = "gateway"   // with its listener
	itemPublished = "published" // with its listeners
	itemCounts    = "counts"    // what was counted
	itemLearnt    = "learnt"    // what was learnt of one service
	itemLink      = "link"      // with its socket
	itemFlow      = "flow"      // with its sockets
)

// worldState is what a proxy knows that is no connection.
type worldState struct {
	Plan  plan.Mesh  `json:"plan"`
	Epoch plan.Epoch `json:"epoch"`
}

// holdAs stops everything and returns it, as plain data with descriptors in the form
// that a version has. Nothing
// of it is in this Proxy any more; build, here or in another process, makes it
// anew. What changes the Proxy waits until letGo or build has been called. If
// something does not stop, all goes on and the error says what it was.
func (p *Proxy) holdAs(version int) (*handover.Load, error) {
	p.changes.Lock()
	if p.world.Load() == nil {
		p.changes.Unlock()
		return nil, errors.New("hold connections: there is no plan yet")
	}
	load := &handover.Load{Version: version}
	err := p.holdListeners(load)
	if err == nil {
		err = p.still.settled()
	}
	if err == nil {
		err = p.holdConnections(load)
	}
	if err != nil {
		err = fmt.Errorf("hold connections: %w", err)
		if berr := p.back(load); berr != nil {
			err = errors.Join(err, berr)
		}
		return nil, err
	}
	return load, nil
}

// back goes on with what was held.
func (p *Proxy) back(load *handover.Load) error {
	defer p.changes.Unlock()
	p.still.end()
	p.registry.thaw()
	start, err := p.build(load, false)
	if err != nil {
		return fmt.Errorf("go on with what was held: %w", err)
	}
	start()
	return nil
}

// letGo forgets what was held: another process has it.
func (p *Proxy) letGo(load *handover.Load) {
	defer p.changes.Unlock()
	closeLoad(load)
	p.leave()
}

// handedOver tells whether another process has taken this one's place.
func (p *Proxy) handedOver() bool { return p.leaves.Err() != nil }

func closeLoad(load *handover.Load) {
	for _, i := range load.Items {
		closeAll(i.Files)
	}
}

// holder collects items.
type holder struct {
	load *handover.Load
	err  error
}

func (h *holder) add(kind string, v any, sockets ...filer) {
	if h.err != nil {
		return
	}
	body, err := json.Marshal(v)
	item := handover.Item{Kind: kind, Body: body}
	for _, s := range sockets {
		f, ferr := s.File()
		if err = errors.Join(err, ferr); ferr == nil {
			item.Files = append(item.Files, f)
		}
	}
	h.load.Items = append(h.load.Items, item)
	if err != nil {
		h.err = fmt.Errorf("%s: %w", kind, err)
	}
}

// try is add for what may be left out.
func (h *holder) try(kind string, v any, sockets ...filer) error {
	one := &holder{load: &handover.Load{}}
	one.add(kind, v, sockets...)
	if one.err != nil {
		closeLoad(one.load)
		return one.err
	}
	h.load.Items = append(h.load.Items, one.load.Items...)
	return nil
}

type filer interface{ File() (*os.File, error) }

// holdListeners stops taking connections. What waits in a queue stays there. It
// stops nothing unless all can be held.
func (p *Proxy) holdListeners(load *handover.Load) error {
	h := &holder{load: load}
	p.mu.Lock()
	doors := []filer{p.nodes}
	if p.door != nil {
		doors = append(doors, p.door)
	}
	gateway, published, ports := p.gateway, p.published, p.ports
	boxes := make([]*sandbox, 0, len(p.sandboxes))
	for _, sb := range p.sandboxes {
		boxes = append(boxes, sb)
	}
	p.mu.Unlock()
	h.add(itemWorld, worldState{*p.world.Load(), p.registry.inForce()}, doors...)
	for _, sb := range boxes {
		sb.mu.Lock()
		var files []filer
		for _, s := range sb.sockets {
			files = append(files, s.(filer))
		}
		sb.mu.Unlock()
		h.add(itemSandbox, sb.facts.Load(), files...)
	}
	if gateway != nil {
		h.add(itemGateway, struct{}{}, gateway.(filer))
	}
	if len(published) > 0 {
		var files []filer
		for _, ln := range published {
			files = append(files, ln.(filer))
		}
		h.add(itemPublished, ports, files...)
	}
	if h.err != nil {
		closeLoad(load)
		load.Items = nil
		return h.err
	}
	for _, sb := range boxes {
		sb.closeSockets()
	}
	p.replaceGateway(nil)
	p.replacePublished(nil, nil)
	return nil
}

// holdConnections freezes all links and flows.
func (p *Proxy) holdConnections(load *handover.Load) error {
	p.still.begin()
	entries := p.registry.freeze()
	var links []*entry
	for _, e := range entries {
		if e.link != nil {
			links = append(links, e)
			e.link.h.Freeze()
		}
	}
	for _, e := range entries { // after the links, on which their streams are
		e.frozen.Store(true)
		if e.freeze != nil {
			e.freeze()
		}
	}
	err := p.still.stopped()
	if err != nil {
		err = p.endStuck(err)
	}
	for _, e := range links {
		select {
		case <-e.link.h.Stopped():
		case <-time.After(stillTime):
			err = errors.Join(err, fmt.Errorf("the link to %s has not stopped within %v", e.peerIdentity, stillTime))
		}
	}
	return errors.Join(err, p.takeDown(load, links))
}

// endStuck ends the connections that do not stop. There should be none: all that
// a connection waits for while it is frozen has its time.
func (p *Proxy) endStuck(err error) error {
	n := p.registry.cutIf(func(e *entry) bool { return e.kind == kindFlow })
	p.log.Error("connections that did not stop were ended", "connections", n, "err", err)
	return p.still.stopped()
}

// takeDown makes plain data of what is frozen. A connection of which that cannot
// be made ends: the others do not.
func (p *Proxy) takeDown(load *handover.Load, links []*entry) error {
	h := &holder{load: load}
	p.takeCounts(h)
	if load.Version < firstOfPairs {
		p.unpair(links)
	}
	number, open := map[*hbone.Conn]int{}, map[*hbone.Conn]map[uint32]bool{}
	for _, e := range links {
		l := e.link
		s := l.h.State()
		p.registry.remove(e)
		if s == nil {
			continue // it has ended meanwhile
		}
		st := l.state(e, s)
		err := h.try(itemLink, st, l.raw.Socket())
		st.TLS.Forget()
		if err != nil {
			p.log.Error("a link cannot be held", "err", err)
			l.raw.Abort()
			continue
		}
		l.raw.Close()
		number[l.h] = len(number) + 1
		open[l.h] = make(map[uint32]bool, len(s.Open))
		for i := range s.Open {
			open[l.h][s.Open[i].ID] = true
		}
	}
	for _, f := range p.still.end() {
		if f.over != nil {
			f.Link = number[f.over]
			f.Gone = f.Link == 0 || !open[f.over][f.Stream]
			if f.Gone {
				f.Link = 0
			}
		}
		p.takeFlow(h, f)
	}
	return h.err
}

// takeFlow takes one flow down, unless its sandbox has been removed.
func (p *Proxy) takeFlow(h *holder, f *flow) {
	p.mu.Lock()
	known := p.sandboxes[f.Instance] != nil
	p.mu.Unlock()
	var err error
	if known {
		if err = h.try(itemFlow, f.plain(), f.sockets()...); err == nil {
			f.letGo()
			return
		}
		p.log.Error("a connection cannot be held", "kind", f.Kind, "instance", f.Instance, "err", err)
	}
	for _, c := range f.wires() {
		c.Abort()
	}
}

// takeCounts takes what was counted and learnt. Of what was learnt, what does not
// fit is left out.
func (p *Proxy) takeCounts(h *holder) {
	h.add(itemCounts, p.counts())
	for key, service := range p.analysis.known() {
		b, err := service.Export()
		if err == nil && len(b) > inspect.MaxSchema {
			err = fmt.Errorf("%d bytes; at most %d", len(b), inspect.MaxSchema)
		}
		if err != nil {
			p.log.Warn("what was learnt cannot be handed over", "service", key, "err", err)
			continue
		}
		h.add(itemLearnt, learntState{key, b})
	}
}

func (l *carrierLink) state(e *entry, s *hbone.State) *linkState {
	st := &linkState{Party: frozenParty(e.party), Since: e.since, TLS: l.tls.State(), HTTP2: s, Wire: l.raw.State()}
	if l.guest != nil {
		st.Instance, st.Source = l.guest.sb.facts.Load().Instance, l.guest.source
	} else {
		st.Instance, st.Serial, st.Gateway, st.Address = l.key.instance, l.key.serial, l.key.gateway, l.key.address
	}
	return st
}

// plain fills in what the sockets hold.
func (f *flow) plain() *flowState {
	for c, to := range map[*wire.Conn]**wire.State{f.client: &f.Client, f.server: &f.Server} {
		if c != nil {
			s := c.State()
			*to = &s
		}
	}
	for _, c := range f.more {
		f.More = append(f.More, c.State())
	}
	return &f.flowState
}

func (f *flow) wires() []*wire.Conn {
	var all []*wire.Conn
	for _, c := range append([]*wire.Conn{f.client, f.server}, f.more...) {
		if c != nil {
			all = append(all, c)
		}
	}
	return all
}

func (f *flow) sockets() (all []filer) {
	for _, c := range f.wires() {
		all = append(all, c.TCP())
	}
	return all
}

// letGo closes the descriptors only: others are open on the same sockets.
func (f *flow) letGo() {
	for _, c := range f.wires() {
		c.Close()
	}
}
