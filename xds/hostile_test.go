package xds_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"hauberk.dev/xds"
	"hauberk.dev/xds/envoy"
	"hauberk.dev/xds/xdstest"
)

// script is a server that says what a test wants and hands on what it hears.
type script struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	streams chan *talk
}

// talk is one stream of a script.
type talk struct {
	t      *testing.T
	stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	heard  chan *discovery.DeltaDiscoveryRequest
	end    chan struct{}
}

func (s *script) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	k := &talk{stream: stream, heard: make(chan *discovery.DeltaDiscoveryRequest, 1000), end: make(chan struct{})}
	go func() {
		defer close(k.heard)
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			select {
			case k.heard <- r:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	select {
	case s.streams <- k:
	case <-stream.Context().Done():
		return nil
	}
	select {
	case <-k.end:
	case <-stream.Context().Done():
	}
	return nil
}

// hostile starts a script.
func hostile(t *testing.T) (*world, *script) {
	t.Helper()
	dir, err := os.MkdirTemp("", "xds")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, socket: filepath.Join(dir, "s")}
	s := &script{streams: make(chan *talk, 100)}
	_, w.stop = xdstest.Serve(t, "unix", w.socket, s)
	t.Cleanup(w.stop)
	return w, s
}

// next is the next stream that a client opens.
func (s *script) next(t *testing.T) *talk {
	t.Helper()
	select {
	case k := <-s.streams:
		k.t = t
		return k
	case <-time.After(time.Minute):
		t.Fatal("no stream within a minute")
		return nil
	}
}

// say sends a response and returns the answer to it.
func (k *talk) say(r *discovery.DeltaDiscoveryResponse) *discovery.DeltaDiscoveryRequest {
	k.t.Helper()
	if err := k.stream.Send(r); err != nil {
		k.t.Fatal(err)
	}
	late := time.After(time.Minute)
	for {
		select {
		case a := <-k.heard:
			if a == nil {
				return nil // the client left
			}
			if a.ResponseNonce == r.Nonce {
				return a
			}
		case <-late:
			k.t.Fatal("no answer within a minute")
		}
	}
}

func response(kind envoy.Kind, nonce string, rs ...*discovery.Resource) *discovery.DeltaDiscoveryResponse {
	return &discovery.DeltaDiscoveryResponse{TypeUrl: kind.URL(), Nonce: nonce, Resources: rs}
}

func item(t *testing.T, name, version string, m proto.Message) *discovery.Resource {
	t.Helper()
	return &discovery.Resource{Name: name, Version: version, Resource: xdstest.Any(t, m)}
}

// TestHostileResources sends, beside a good cluster each, what a server must
// not send: each is refused with a reason, and the good ones count.
func TestHostileResources(t *testing.T) {
	w, s := hostile(t)
	p := w.run()
	k := s.next(t)
	static := xdstest.Cluster("x")
	long := strings.Repeat("n", 100_000)
	for i, c := range []struct {
		bad  []*discovery.Resource
		want string
	}{
		{[]*discovery.Resource{{Name: "x", Resource: &anypb.Any{TypeUrl: envoy.Clusters.URL(), Value: []byte("\xff\xff\xff garbage")}}}, `clusters "x": resource: 11 bytes: no Cluster`},
		{[]*discovery.Resource{{Name: "x", Resource: &anypb.Any{TypeUrl: envoy.Routes.URL()}}}, `resource.type_url: "type.googleapis.com/envoy.config.route.v3.RouteConfiguration": want`},
		{[]*discovery.Resource{{Name: "x"}}, `clusters "x": resource: missing`},
		{[]*discovery.Resource{nil, {}}, `clusters "": name:`},
		{[]*discovery.Resource{item(t, "y", "1", static)}, `clusters "y": name: "x": the response calls it "y"`},
		{[]*discovery.Resource{item(t, long, "1", xdstest.Cluster(long))}, `name: 100000 bytes: more than 1024`},
		{[]*discovery.Resource{item(t, "x", long, static)}, `clusters "x": version: 100000 bytes`},
		{[]*discovery.Resource{item(t, "*", "1", xdstest.Cluster("*"))}, `clusters "*": name: "*": is no name`},
		{[]*discovery.Resource{item(t, "a\nb", "1", xdstest.Cluster("a\nb"))}, `not plain text`},
		{[]*discovery.Resource{item(t, "x", "1", static), item(t, "x", "2", static)}, `clusters "x": name: more than once in one response`},
		{[]*discovery.Resource{{Name: "x", Aliases: []string{"z"}, Resource: xdstest.Any(t, static)}}, `clusters "x": aliases: "z"`},
		{[]*discovery.Resource{{Name: "x", Ttl: durationpb.New(time.Second), Resource: xdstest.Any(t, static)}}, `clusters "x": ttl: 1s`},
	} {
		good := fmt.Sprintf("good-%d", i)
		nonce := fmt.Sprint(i)
		answer := k.say(response(envoy.Clusters, nonce, append(c.bad, item(t, good, "1", xdstest.Cluster(good)))...))
		if got := answer.GetErrorDetail().GetMessage(); !strings.Contains(got, c.want) || len(got) > 8<<10 {
			t.Errorf("%d: NACK says %.300q, want %q", i, got, c.want)
		}
		xdstest.Until(t, "the good one", func() bool { return p.Status().Resources["clusters"] == i+1 })
	}
	if got := p.Status().Nacks; got != 12 {
		t.Errorf("%d NACKs", got)
	}
}

// TestHostileResponses sends responses that are wrong as a whole.
func TestHostileResponses(t *testing.T) {
	w, s := hostile(t)
	p := w.run(func(o *xds.Options) { o.MaxMessage, o.MaxResources = 1<<20, 100 })
	k := s.next(t)
	if a := k.say(response(envoy.Clusters, "1", item(t, "a", "1", xdstest.Cluster("a")))); a.ErrorDetail != nil {
		t.Fatal(a.ErrorDetail)
	}
	// Of a kind that nobody asked for, known or not.
	for _, url := range []string{envoy.Routes.URL(), "type.googleapis.com/x.Y", "", strings.Repeat("u", 1<<19)} {
		a := k.say(&discovery.DeltaDiscoveryResponse{TypeUrl: url, Nonce: "2"})
		if got := a.GetErrorDetail().GetMessage(); !strings.Contains(got, "not asked for") {
			t.Errorf("type %.20q: %q", url, got)
		}
	}
	// The same nonce and the same resources again change nothing.
	for range 3 {
		if a := k.say(response(envoy.Clusters, "1", item(t, "a", "1", xdstest.Cluster("a")))); a.ErrorDetail != nil {
			t.Error(a.ErrorDetail)
		}
	}
	// More than is held, in one response and over several.
	var many []*discovery.Resource
	for _, n := range names("m", 101) {
		many = append(many, item(t, n, "1", xdstest.Cluster(n)))
	}
	if got := k.say(response(envoy.Clusters, "3", many...)).GetErrorDetail().GetMessage(); !strings.Contains(got, "101 in one response") {
		t.Errorf("NACK says %q", got)
	}
	k.say(response(envoy.Clusters, "4", many[:60]...))
	if got := k.say(response(envoy.Clusters, "5", many[60:]...)).GetErrorDetail().GetMessage(); !strings.Contains(got, "100 of its kind are held") {
		t.Errorf("NACK says %q", got)
	}
	if got := p.Status().Resources["clusters"]; got != 100 {
		t.Errorf("%d clusters are held", got)
	}
	// Removing what never was, and what is there, in odd ways.
	removal := response(envoy.Clusters, "6")
	removal.RemovedResources = []string{"", "*", "never", "m-0", "m-0", "m-1", strings.Repeat("z", 1<<19)}
	if a := k.say(removal); a.ErrorDetail != nil {
		t.Error(a.ErrorDetail)
	}
	xdstest.Until(t, "two to be removed", func() bool { return p.Status().Resources["clusters"] == 98 })

	// No nonce, or one that is too long: there is no answer to it, so the
	// stream ends, and what was accepted stays.
	for _, nonce := range []string{"", strings.Repeat("n", 2000)} {
		k.stream.Send(response(envoy.Clusters, nonce))
		k = s.next(t)
	}
	// A message above the bound ends the stream, too.
	k.stream.Send(response(envoy.Clusters, "7", &discovery.Resource{Name: strings.Repeat("h", 2<<20)}))
	k = s.next(t)
	first := <-k.heard
	if first.TypeUrl != envoy.Clusters.URL() || len(first.InitialResourceVersions) != 98 {
		t.Errorf("after all that, %d versions of %q are told", len(first.InitialResourceVersions), first.TypeUrl)
	}
	if s := p.Status(); !strings.Contains(s.Error, "larger than max") {
		t.Errorf("status says %q", s.Error)
	}
}

// TestHostileFlood sends faster than the client judges: it reads no further
// ahead than a few responses, and nothing grows.
func TestHostileFlood(t *testing.T) {
	w, s := hostile(t)
	p := w.run()
	k := s.next(t)
	go func() { // acknowledgements are read, and nothing is done about them
		for range k.heard {
		}
	}()
	before := heap()
	text := strings.Repeat("x", 512)
	for i := range 2000 {
		var rs []*discovery.Resource
		for j := range 20 {
			rs = append(rs, &discovery.Resource{Name: fmt.Sprintf("%s-%d-%d", text, i, j), Resource: &anypb.Any{TypeUrl: "x"}})
		}
		if err := k.stream.Send(response(envoy.Clusters, fmt.Sprint(i), rs...)); err != nil {
			t.Fatal(err)
		}
	}
	xdstest.Until(t, "all to be refused", func() bool { return p.Status().Nacks == 2000 })
	if grown := int64(heap()) - int64(before); grown > 16<<20 {
		t.Errorf("%d bytes more in use after 40 MB of refused resources", grown)
	}
	if got := p.Status().Refused; len(got) > 64 {
		t.Errorf("%d refusals are remembered", len(got))
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestEndsAtOnce proves that a server that answers nobody, or ends each stream,
// neither holds Run up nor is asked without a pause.
func TestEndsAtOnce(t *testing.T) {
	w, s := hostile(t)
	p := w.run(func(o *xds.Options) { o.RetryMin, o.RetryMax = 20*time.Millisecond, 40*time.Millisecond })
	began := time.Now()
	const streams = 10
	for range streams {
		close(s.next(t).end)
	}
	// Each wait is at least half of what it grew to: 10, 20, 20 ...
	if took, least := time.Since(began), (10+7*20)*time.Millisecond; took < least {
		t.Errorf("%d streams within %v: less than %v", streams, took, least)
	}
	k := s.next(t)
	p.stop()
	<-k.stream.Context().Done()
}

// TestEndsAhead proves that a stream that ends with responses that the client
// has not come to yet, as when a server restarts, is followed by another, and
// that the client goes on from there.
func TestEndsAhead(t *testing.T) {
	w, s := hostile(t)
	var last atomic.Pointer[talk]
	p := w.run(func(o *xds.Options) {
		o.Check = func(any) error {
			<-last.Load().stream.Context().Done() // so that the answer is late
			return nil
		}
	})
	for range 5 {
		k := s.next(t)
		last.Store(k)
		for i, n := range names("c", 50) {
			k.stream.Send(response(envoy.Clusters, fmt.Sprint(i), item(t, n, "1", xdstest.Cluster(n))))
		}
		close(k.end)
	}
	k := s.next(t)
	k.say(response(envoy.Listeners, "1"))
	k.say(response(envoy.Clusters, "2", item(t, "a", "1", xdstest.Cluster("a"))))
	k.say(response(envoy.Endpoints, "3", item(t, "a", "1", xdstest.Endpoints("a", 1))))
	xdstest.Until(t, "what the last stream says", func() bool { return slices.Equal(p.ports("a"), []uint16{1}) })
	if n := p.Status().Resources["clusters"]; n < 2 {
		t.Errorf("%d clusters are held: nothing of the streams that ended", n)
	}
}

// TestRemovedIsKnown proves that endpoints of which the server says that there
// are none are known: the cluster is there, and empty.
func TestRemovedIsKnown(t *testing.T) {
	w, s := hostile(t)
	p := w.run()
	k := s.next(t)
	k.say(response(envoy.Listeners, "1"))
	k.say(response(envoy.Clusters, "2", item(t, "a", "1", xdstest.Cluster("a"))))
	xdstest.Until(t, "the cluster to wait", func() bool { return len(p.Status().Waiting) == 1 })
	gone := response(envoy.Endpoints, "3")
	gone.RemovedResources = []string{"a"}
	k.say(gone)
	xdstest.Until(t, "an empty cluster", func() bool { _, ok := p.cluster("a"); return ok })
	k.say(response(envoy.Endpoints, "4", item(t, "a", "1", xdstest.Endpoints("a", 1)), item(t, "other", "1", xdstest.Endpoints("other", 1))))
	xdstest.Until(t, "its endpoints", func() bool { return slices.Equal(p.ports("a"), []uint16{1}) })
	if got := p.Status().Resources["endpoints"]; got != 1 {
		t.Errorf("%d endpoints are held, of which one was asked for", got)
	}
}
