// Package envoy reads resources of Envoy's API as values of a plan.
//
// It is strict: whatever a resource says that changes what happens to traffic
// and is not held here is refused, with the field, the value and the reason.
// What a field that is absent means is what Envoy takes it to mean. Nothing
// here asks a server, a name server or a file.
package envoy

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"

	"hauberk.dev/plan"
)

// Kind of resource.
type Kind int

// Kinds in the order in which a client asks for them, so that what is referred
// to comes before what refers to it.
const (
	Secrets Kind = iota
	Clusters
	Endpoints
	Listeners
	Routes
	Kinds
)

const prefix = "type.googleapis.com/"

func (k Kind) String() string {
	return [...]string{"secrets", "clusters", "endpoints", "listeners", "routes"}[k]
}

// URL is the type's URL on the wire.
func (k Kind) URL() string {
	return prefix + [...]string{
		"envoy.extensions.transport_sockets.tls.v3.Secret",
		"envoy.config.cluster.v3.Cluster", "envoy.config.endpoint.v3.ClusterLoadAssignment",
		"envoy.config.listener.v3.Listener", "envoy.config.route.v3.RouteConfiguration",
	}[k]
}

// KindOf is the kind with that URL.
func KindOf(url string) (Kind, bool) {
	for k := range Kinds {
		if k.URL() == url {
			return k, true
		}
	}
	return 0, false
}

// Listener is a listener, and for each chain the name of the routes to be
// joined to it, "" where it has its own.
type Listener struct {
	plan.Listener
	Routes   []string
	Clusters []string // that its own routes name
}

// RouteTable is a route configuration.
type RouteTable struct {
	Name     string
	Hosts    []plan.Host
	Clusters []string // that it names
}

// Cluster is a cluster, and the name of the endpoints to be joined to it, ""
// where it has its own.
type Cluster struct {
	plan.Cluster
	Endpoints string
}

// EndpointTable is a load assignment.
type EndpointTable struct {
	Name      string
	Upstreams []plan.Upstream
}

// Bounds of what one resource may hold, beside those of its bytes.
const (
	maxName   = 1 << 10
	maxText   = 8 << 10 // a path, a header's value, a pattern
	maxBody   = 64 << 10
	maxDepth  = 32
	maxListed = 16 // refusals told of one resource
)

// Read reads the body of a resource: the value is a *Listener, *RouteTable,
// *Cluster, *EndpointTable or *Secret.
func Read(kind Kind, name string, body []byte) (value any, err error) {
	r := &reader{clusters: map[string]bool{}}
	switch kind {
	case Secrets:
		value, err = read(r, name, body, &tls.Secret{}, r.secret)
	case Clusters:
		value, err = read(r, name, body, &cluster.Cluster{}, r.cluster)
	case Endpoints:
		value, err = read(r, name, body, &endpoint.ClusterLoadAssignment{}, r.endpoints)
	case Listeners:
		value, err = read(r, name, body, &listener.Listener{}, r.listener)
	case Routes:
		value, err = read(r, name, body, &route.RouteConfiguration{}, r.routes)
	default:
		err = fmt.Errorf("kind %d: unknown", kind)
	}
	return value, err
}

func read[M proto.Message, V any](r *reader, name string, body []byte, m M, as func(M) V) (any, error) {
	if err := unmarshal(body, m); err != nil {
		return nil, err
	}
	if own := nameOf(m); own != name {
		r.refuse("name", own, fmt.Sprintf("the response calls it %q", name))
	}
	r.strict("", m.ProtoReflect(), 0)
	v := as(m)
	if err := r.err(); err != nil {
		return nil, err
	}
	return v, nil
}

func unmarshal(body []byte, m proto.Message) error {
	if err := (proto.UnmarshalOptions{RecursionLimit: maxDepth}).Unmarshal(body, m); err != nil {
		return fmt.Errorf("resource: %d bytes: no %s: %w", len(body), m.ProtoReflect().Descriptor().Name(), errBroken)
	}
	return nil
}

// errBroken stands in for protobuf's own words, which change from build to
// build on purpose.
var errBroken = errors.New("the bytes are no such message")

func nameOf(m proto.Message) string {
	switch m := m.(type) {
	case *endpoint.ClusterLoadAssignment:
		return m.GetClusterName()
	case interface{ GetName() string }:
		return m.GetName()
	}
	return ""
}

// Nameable says whether a name of a resource is one that can be asked for,
// shown and summed.
func Nameable(name string) error {
	switch {
	case name == "" || name == "*":
		return fmt.Errorf("%q: is no name", name)
	case len(name) > maxName:
		return fmt.Errorf("%d bytes: more than %d", len(name), maxName)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("%q: not plain text", name)
	}
	return nil
}

// reader collects what is wrong with a resource, and the clusters it names.
type reader struct {
	wrong    []string
	more     int
	clusters map[string]bool
	names    []string // of clusters, in order of appearance
}

// refuse notes that a field's value is not held, and why.
func (r *reader) refuse(field, value, why string) {
	if len(r.wrong) >= maxListed {
		r.more++
		return
	}
	if len(value) > 128 {
		value = value[:128] + "..."
	}
	r.wrong = append(r.wrong, fmt.Sprintf("%s: %q: %s", field, value, why))
}

func (r *reader) err() error {
	if len(r.wrong) == 0 {
		return nil
	}
	text := strings.Join(r.wrong, ", ")
	if r.more > 0 {
		text += fmt.Sprintf(", and %d more", r.more)
	}
	return errors.New(text)
}

// name checks a name that a field refers to.
func (r *reader) name(field, name string) string {
	if err := Nameable(name); err != nil {
		r.refuse(field, name, "cannot be a name: "+err.Error())
	}
	return name
}

// toCluster notes a cluster that traffic goes to.
func (r *reader) toCluster(field, name string) string {
	r.name(field, name)
	if !r.clusters[name] {
		r.clusters[name] = true
		r.names = append(r.names, name)
	}
	return name
}
