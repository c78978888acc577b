package xds

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/structpb"

	"hauberk.dev/internal/version"
	"hauberk.dev/xds/envoy"
)

// session is one stream: what the server was told on it.
type session struct {
	c    *Client
	wire discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	end  context.CancelFunc
	node *core.Node                   // nil once told
	told [envoy.Kinds]map[string]bool // nil: nothing asked of this kind yet
}

// stream speaks with the server until one of both ends it. The next response
// is read only once this one is judged and answered, so that a server that
// sends faster is held back by gRPC's windows, and never more than two
// responses are in memory.
func (c *Client) stream(parent context.Context, server discovery.AggregatedDiscoveryServiceClient) (answered bool, err error) {
	ctx, cancel := context.WithCancel(parent)
	// A server that allows no stream would be waited for without end.
	late := time.AfterFunc(c.o.OpenTimeout, cancel)
	wire, err := server.DeltaAggregatedResources(ctx)
	if !late.Stop() && parent.Err() == nil {
		err = errors.Join(err, fmt.Errorf("the server lets none begin within %v", c.o.OpenTimeout))
	}
	if err != nil {
		cancel()
		return false, fmt.Errorf("open stream: %w", err)
	}
	s := &session{c: c, wire: wire, end: cancel, node: c.o.Node.wire()}
	responses, ended := make(chan *discovery.DeltaDiscoveryResponse), make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		ended <- receive(ctx, wire, responses)
	}()
	defer func() {
		cancel()
		<-done
	}()
	if err := s.subscribe(); err != nil {
		return false, cause(err, responses, ended)
	}
	for {
		select {
		case <-ctx.Done():
			return answered, ctx.Err()
		case err := <-ended:
			return answered, err
		case <-c.wants:
			err = s.subscribe()
		case r := <-responses:
			answered = true
			err = s.handle(r)
		}
		if err != nil {
			return answered, cause(err, responses, ended)
		}
	}
}

func receive(ctx context.Context, wire discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient,
	to chan<- *discovery.DeltaDiscoveryResponse) error {
	for {
		r, err := wire.Recv()
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		select {
		case to <- r:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// errSend is what a send says on a stream that has ended; why is known to the
// receiving side only.
var errSend = errors.New("stream has ended")

// cause asks the receiving side why a send failed. What came before the end is
// taken from it and left, for nobody can be answered any more: a server is told
// what is there on the next stream, and sends the rest again.
func cause(err error, responses <-chan *discovery.DeltaDiscoveryResponse, ended <-chan error) error {
	for errors.Is(err, errSend) {
		select {
		case <-responses:
		case err = <-ended:
		}
	}
	return err
}

func (s *session) send(r *discovery.DeltaDiscoveryRequest) error {
	r.Node, s.node = s.node, nil
	// A server that sends and does not read would hold both sides for ever.
	stalled := time.AfterFunc(sendPatience, s.end)
	defer stalled.Stop()
	if err := s.wire.Send(r); err != nil {
		return errSend
	}
	return nil
}

// subscribe tells the server what is wanted and what is not any more.
func (s *session) subscribe() error {
	for kind := range envoy.Kinds {
		for _, r := range s.requests(kind) {
			if err := s.send(r); err != nil {
				return err
			}
		}
	}
	return nil
}

// requests are what must be sent for the server to know what is wanted of a
// kind. The first on a stream says what is there already.
func (s *session) requests(kind envoy.Kind) (rs []*discovery.DeltaDiscoveryRequest) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	wanted := s.c.store.wanted(kind)
	told := s.told[kind]
	first := told == nil
	if first && len(wanted) == 0 {
		return nil
	}
	add := missing(wanted, told)
	drop := missing(told, wanted)
	for first || len(add)+len(drop) > 0 {
		r := &discovery.DeltaDiscoveryRequest{TypeUrl: kind.URL()}
		if first {
			r.InitialResourceVersions = s.c.store.versions(kind)
			first = false
		}
		r.ResourceNamesSubscribe, add = upTo(add, maxAsked)
		r.ResourceNamesUnsubscribe, drop = upTo(drop, maxAsked)
		rs = append(rs, r)
	}
	s.told[kind] = maps.Clone(wanted)
	return rs
}

// missing lists what is in a and not in b, in order.
func missing(a, b map[string]bool) (names []string) {
	for name := range a {
		if !b[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// upTo cuts off names of so many bytes, and at least one.
func upTo(names []string, limit int) (head, tail []string) {
	size := 0
	for i, name := range names {
		if size += len(name); size > limit && i > 0 {
			return names[:i], names[i:]
		}
	}
	return names, nil
}

// handle judges one response and answers it.
func (s *session) handle(r *discovery.DeltaDiscoveryResponse) error {
	if r.Nonce == "" || len(r.Nonce) > maxNonce {
		return fmt.Errorf("response of %q: nonce of %d bytes: want 1 to %d", clip(r.TypeUrl, maxName), len(r.Nonce), maxNonce)
	}
	answer := &discovery.DeltaDiscoveryRequest{TypeUrl: clip(r.TypeUrl, maxName), ResponseNonce: r.Nonce}
	var faults faults
	changed := false
	kind, known := envoy.KindOf(r.TypeUrl)
	switch {
	case known && s.told[kind] != nil && s.c.o.Confirm:
		var err error
		if changed, faults, err = s.confirm(s.wire.Context(), kind, r); err != nil {
			return err
		}
	case known && s.told[kind] != nil:
		changed, faults = s.c.take(kind, r)
	default:
		faults.add(fmt.Sprintf("type_url %q: not asked for", answer.TypeUrl))
	}
	if faults.n > 0 {
		answer.ErrorDetail = &status.Status{Code: int32(codes.InvalidArgument), Message: faults.String()}
		s.c.o.Log.Warn("refuse what the xds server sent", "type", answer.TypeUrl, "why", answer.ErrorDetail.Message)
	}
	s.c.count(faults.n > 0)
	if err := s.send(answer); err != nil {
		return err
	}
	if !changed {
		return nil
	}
	poke(s.c.dirty)
	return s.subscribe()
}

func (c *Client) count(refused bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stat.connected, c.stat.attempts, c.stat.err = true, 0, ""
	if refused {
		c.stat.nacks++
	} else {
		c.stat.acks++
	}
}

// faults of a response: as many as the bound of a NACK holds, and how many
// there are.
type faults struct {
	text  string
	n     int
	shown int
}

func (f *faults) add(why string) {
	f.n++
	why = clip(why, maxDetail/2)
	if len(f.text)+len(why) > maxDetail {
		return
	}
	if f.text != "" {
		f.text += "; "
	}
	f.text += why
	f.shown++
}

func (f *faults) String() string {
	if f.n > f.shown {
		return fmt.Sprintf("%s; and %d more", f.text, f.n-f.shown)
	}
	return f.text
}

// wire is the node as the protocol has it.
func (n Node) wire() *core.Node {
	w := &core.Node{
		Id: n.ID, Cluster: n.Cluster, UserAgentName: "hauberk-mesh",
		UserAgentVersionType: &core.Node_UserAgentVersion{UserAgentVersion: version.String()},
	}
	if n.Region+n.Zone != "" {
		w.Locality = &core.Locality{Region: n.Region, Zone: n.Zone}
	}
	if len(n.Metadata) > 0 {
		w.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{}}
		for k, v := range n.Metadata {
			w.Metadata.Fields[k] = structpb.NewStringValue(v)
		}
	}
	return w
}
