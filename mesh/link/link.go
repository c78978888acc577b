package link

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/plan"
)

const (
	callTimeout = 10 * time.Second
	maxRequests = 64       // of the proxy, handled at once
	maxLarge    = 17 << 20 // bytes taken from the proxy in one message (MaxLearnt in base64, Stats)
)

// Handlers is what the node does for its proxy. All may be called at once and
// from many goroutines.
type Handlers struct {
	// Sign turns a signing request, already checked to be well formed, signed
	// by its own key and from a known instance, into a chain (DER, leaf first)
	// and the roots (PEM).
	Sign func(ctx context.Context, instance string, csr []byte) (chain [][]byte, roots []byte, err error)
	// Sockets opens n unconnected sockets in the instance's namespace. They are
	// closed here once sent.
	Sockets func(instance string, n int) ([]*os.File, error)
	// Event is told what the proxy saw. Its text comes from the proxy and is not
	// to be trusted further than that.
	Event func(api.Event)
}

func (h Handlers) check() error {
	if h.Sign == nil || h.Sockets == nil || h.Event == nil {
		return errors.New("a handler is missing")
	}
	return nil
}

// Link is a live connection to the proxy.
type Link struct {
	session  *Session
	handlers Handlers
	known    *names
	stop     context.CancelFunc
	done     chan struct{}
	process  int
	err      error // why the link ended; valid after done
}

// Dial connects to the proxy listening at path. The proxy then has none of the
// node's sandboxes: everything is to be sent again, the plan last.
func Dial(ctx context.Context, path string, h Handlers) (*Link, error) {
	if err := h.check(); err != nil {
		return nil, fmt.Errorf("dial mesh %s: %w", path, err)
	}
	socket, err := dial(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("dial mesh: %w", err)
	}
	l := &Link{handlers: h, known: &names{}, done: make(chan struct{})}
	l.session = NewSession(api.NewConn(socket, maxLarge), l.handle, maxRequests)
	run, stop := context.WithCancel(context.Background())
	l.stop = stop
	go func() {
		defer close(l.done)
		l.err = l.session.Run(run)
	}()
	hello, stopWaiting := context.WithTimeout(ctx, dialTimeout)
	defer stopWaiting()
	reply, err := l.call(hello, &api.Message{Kind: api.KindHello, Hello: &api.Hello{Version: api.Version, Process: os.Getpid()}})
	if err == nil && (reply.Hello == nil || reply.Hello.Version != api.Version) {
		err = fmt.Errorf("the proxy speaks another version than %d", api.Version)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("dial mesh %s: %w", path, err)
	}
	l.process = reply.Hello.Process
	return l, nil
}

// Done is closed when the link has ended; the node then dials again.
func (l *Link) Done() <-chan struct{} { return l.done }

// Process is the pid the proxy says it has.
func (l *Link) Process() int { return l.process }

// Close ends the link. The proxy goes on with what it has.
func (l *Link) Close() error {
	l.stop()
	<-l.done
	return nil
}

// AddSandbox gives the proxy a sandbox and its sockets, or replaces those it
// has. The files stay the caller's; keep them open to lose no connection when
// the proxy restarts.
func (l *Link) AddSandbox(ctx context.Context, s plan.Sandbox, transparent, dnsUDP, dnsTCP *os.File) error {
	l.known.add(s.Instance) // before the call: the proxy asks for a certificate at once
	_, err := l.call(ctx, &api.Message{Kind: api.KindAdd, Sandbox: &s}, transparent, dnsUDP, dnsTCP)
	if err != nil {
		return fmt.Errorf("add sandbox %q to mesh: %w", s.Instance, err)
	}
	return nil
}

// RemoveSandbox cuts the sandbox's connections and closes its sockets.
func (l *Link) RemoveSandbox(ctx context.Context, instance string) error {
	l.known.remove(instance)
	_, err := l.call(ctx, &api.Message{Kind: api.KindRemove, Instance: instance})
	if err != nil {
		return fmt.Errorf("remove sandbox %q from mesh: %w", instance, err)
	}
	return nil
}

// SetPlan replaces the plan. The first one after Dial also drops sandboxes
// that the proxy has from an earlier link and that were not added again.
func (l *Link) SetPlan(ctx context.Context, p plan.Mesh) error {
	_, err := l.call(ctx, &api.Message{Kind: api.KindPlan, Plan: &p})
	if err != nil {
		return fmt.Errorf("send plan %d to mesh: %w", p.Generation, err)
	}
	return nil
}

// SetGateway gives the proxy the listener that other proxies dial.
func (l *Link) SetGateway(ctx context.Context, listener *os.File) error {
	_, err := l.call(ctx, &api.Message{Kind: api.KindGateway}, listener)
	if err != nil {
		return fmt.Errorf("give gateway to mesh: %w", err)
	}
	return nil
}

// Published is a listener and where it leads.
type Published struct {
	api.PublishedPort
	Listener *os.File
}

// SetPublish replaces the published ports.
func (l *Link) SetPublish(ctx context.Context, all []Published) error {
	m := &api.Message{Kind: api.KindPublish, Publish: &api.Publish{Ports: []api.PublishedPort{}}}
	var files []*os.File
	for _, p := range all {
		m.Publish.Ports = append(m.Publish.Ports, p.PublishedPort)
		files = append(files, p.Listener)
	}
	if _, err := l.call(ctx, m, files...); err != nil {
		return fmt.Errorf("publish %d ports: %w", len(all), err)
	}
	return nil
}

// Cut puts an epoch in force: what matches is disconnected and stays out.
func (l *Link) Cut(ctx context.Context, e plan.Epoch) (api.Receipt, error) {
	reply, err := l.call(ctx, &api.Message{Kind: api.KindCut, Epoch: &e})
	switch {
	case err != nil:
	case reply.Receipt == nil || reply.Receipt.Epoch < e.Number:
		err = errors.New("the proxy's receipt is not for this epoch")
	case reply.Receipt.Connections < 0:
		err = errors.New("the proxy's receipt makes no sense")
	default:
		return *reply.Receipt, nil
	}
	return api.Receipt{}, fmt.Errorf("cut epoch %d: %w", e.Number, err)
}

// Stats asks what is open and what was refused.
func (l *Link) Stats(ctx context.Context) (api.Stats, error) {
	reply, err := l.call(ctx, &api.Message{Kind: api.KindStats})
	if err == nil && (reply.Stats == nil || len(reply.Stats.Flows) > api.MaxFlows) {
		err = errors.New("the proxy's answer makes no sense")
	}
	if err != nil {
		return api.Stats{}, fmt.Errorf("read mesh stats: %w", err)
	}
	return *reply.Stats, nil
}

// maxTapped bounds what one answer to a tap may hold.
const maxTapped = 1024

// Tap asks for the requests of an instance that have passed since the same tap
// asked last; the first time it begins to listen. Who stops asking ends it.
func (l *Link) Tap(ctx context.Context, instance string, tap uint64) (api.Tapped, error) {
	reply, err := l.call(ctx, &api.Message{Kind: api.KindTap, Instance: instance, Tap: tap})
	if err == nil && (reply.Tapped == nil || len(reply.Tapped.Requests) > maxTapped) {
		err = errors.New("the proxy's answer makes no sense")
	}
	if err != nil {
		return api.Tapped{}, fmt.Errorf("tap %q: %w", instance, err)
	}
	for i := range reply.Tapped.Requests {
		reply.Tapped.Requests[i].Instance = instance
	}
	return *reply.Tapped, nil
}

// Carried asks which of the connections in an instance's namespace are not the
// proxy's.
func (l *Link) Carried(ctx context.Context, instance string, all []api.Connection) (strange []api.Connection, err error) {
	reply, err := l.call(ctx, &api.Message{Kind: api.KindCarried, Instance: instance, Connections: all})
	if err == nil && slices.ContainsFunc(reply.Connections, func(c api.Connection) bool { return !slices.Contains(all, c) }) {
		err = errors.New("the proxy's answer makes no sense")
	}
	if err != nil {
		return nil, fmt.Errorf("ask for %d connections of %q: %w", len(all), instance, err)
	}
	return reply.Connections, nil
}

// Learnt asks for what the proxy has learnt of the requests to a service, nil if
// that is nothing. Its bytes are the proxy's, and only for Relearn.
func (l *Link) Learnt(ctx context.Context, service string) ([]byte, error) {
	reply, err := l.call(ctx, &api.Message{Kind: api.KindLearnt, Learnt: &api.Learnt{Service: service}})
	if err == nil && (reply.Learnt == nil || reply.Learnt.Service != service || len(reply.Learnt.Schema) > api.MaxLearnt) {
		err = errors.New("the proxy's answer makes no sense")
	}
	if err != nil {
		return nil, fmt.Errorf("ask for what was learnt of %q: %w", service, err)
	}
	return reply.Learnt.Schema, nil
}

// Relearn gives the proxy what one before it had learnt of the requests to a
// service. It goes on from that with the next plan, and before if it has
// learnt for less long itself. A RefusedError says that it does not, ErrUseless
// that this is for the schema's sake.
func (l *Link) Relearn(ctx context.Context, service string, schema []byte) error {
	_, err := l.call(ctx, &api.Message{Kind: api.KindRelearn, Learnt: &api.Learnt{Service: service, Schema: schema}})
	if err != nil {
		return fmt.Errorf("give what was learnt of %q to mesh: %w", service, err)
	}
	return nil
}

// Ping asks for a sign of life.
func (l *Link) Ping(ctx context.Context) error {
	_, err := l.call(ctx, &api.Message{Kind: api.KindPing})
	return err
}

func (l *Link) call(ctx context.Context, m *api.Message, files ...*os.File) (*api.Message, error) {
	if slices.Contains(files, nil) {
		return nil, errors.New("a file is missing")
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	reply, back, err := l.session.Call(ctx, m, files...)
	closeAll(back) // the proxy has no files to give
	return reply, err
}

// handle answers the proxy. It may be in an attacker's hands: it can ask only
// for instances it was given, and only for well-formed things.
func (l *Link) handle(ctx context.Context, m *api.Message, files []*os.File) (*api.Message, []*os.File, error) {
	closeAll(files)
	switch m.Kind {
	case api.KindCSR:
		return l.sign(ctx, m)
	case api.KindSockets:
		if !l.known.has(m.Instance) {
			return nil, nil, fmt.Errorf("instance %q is not this proxy's", m.Instance)
		}
		out, err := l.handlers.Sockets(m.Instance, m.Count)
		return nil, out, err
	case api.KindEvent:
		l.handlers.Event(bound(*m.Event))
		return nil, nil, nil
	}
	return nil, nil, fmt.Errorf("a proxy does not ask for %q", m.Kind)
}

func (l *Link) sign(ctx context.Context, m *api.Message) (*api.Message, []*os.File, error) {
	if !l.known.has(m.Instance) {
		return nil, nil, fmt.Errorf("instance %q is not this proxy's", m.Instance)
	}
	request, err := x509.ParseCertificateRequest(m.CSR)
	if err != nil {
		return nil, nil, fmt.Errorf("signing request: %w", err)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, nil, fmt.Errorf("signing request: %w", err)
	}
	if _, ok := request.PublicKey.(*ecdsa.PublicKey); !ok || len(request.URIs) != 1 {
		return nil, nil, errors.New("signing request: want an ECDSA key and one URI")
	}
	chain, roots, err := l.handlers.Sign(ctx, m.Instance, m.CSR)
	if err != nil {
		return nil, nil, err
	}
	return &api.Message{Certificate: &api.Certificate{Chain: chain, Roots: string(roots)}}, nil, nil
}

// bound cuts the words of an event: a node keeps them, and there may be many.
func bound(e api.Event) api.Event {
	for _, s := range []*string{&e.Peer, &e.Source, &e.Destination, &e.Service, &e.Rule} {
		*s = (*s)[:min(len(*s), maxWords)]
	}
	e.Reason = bounded(e.Reason)
	return e
}
