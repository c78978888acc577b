// Package plan holds what should be true of the network and of the sandboxes,
// as plain values.
//
// The control plane computes a plan, a node and its mesh make it true. A plan
// is whole: applying it replaces the one before. The package opens no socket
// and starts no goroutine.
package plan

import "net/netip"

// Addresses of guests and of services. They mean something only inside the
// namespaces of sandboxes, which lead nowhere but into the mesh.
var (
	Guests   = netip.MustParsePrefix("10.88.0.0/16")
	Services = netip.MustParsePrefix("10.99.0.0/16")
)

// Mesh is what one node's proxy should do.
type Mesh struct {
	// Generation rises with every change; a receiver refuses to go back.
	Generation uint64 `json:"generation"`
	// TrustDomain of every identity in the plan.
	TrustDomain string `json:"trustDomain"`
	// Services that can be called.
	Services []Service `json:"services"`
	// Sandboxes on this node.
	Sandboxes []Sandbox `json:"sandboxes"`
	// Observe is what is noted of requests; nil is nothing but counts.
	Observe *Observe `json:"observe,omitempty"`
}

// Service is a workload as its callers see it.
type Service struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	// Address is the virtual address that the service's name resolves to.
	Address netip.Addr `json:"address"`
	// Identity every endpoint must prove: a SPIFFE id.
	Identity  string     `json:"identity"`
	Ports     []Port     `json:"ports"`
	Endpoints []Endpoint `json:"endpoints"`
	// Allow and Deny are the access rules of the service, applied where the
	// call arrives. Deny beats allow; nothing allowed means nobody may call.
	Allow []Rule `json:"allow,omitempty"`
	Deny  []Rule `json:"deny,omitempty"`
	// Callbacks are who may ask the service over connections that it has made: of
	// SOFABolt and Dubbo, whose servers may. They are applied at the service's own
	// node. Deny holds for them too, but for rules with ports; Allow does not.
	// Ports, Paths, Headers and Token of these have no meaning.
	Callbacks []Rule `json:"callbacks,omitempty"`
	// Trials are policies that refuse nothing yet.
	Trials []Trial `json:"trials,omitempty"`
	// Issuers of the tokens that rules ask for.
	Issuers []Issuer `json:"issuers,omitempty"`
	// Traffic is how calls are spread and bounded; nil is as the proxy does it.
	Traffic *Traffic `json:"traffic,omitempty"`
	// Inspect is what is looked for in requests; nil is nothing.
	Inspect *Inspect `json:"inspect,omitempty"`
}

// Port of a service.
type Port struct {
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"` // one of Protocols
	// Publish is a port on the node's loopback address, or 0.
	Publish uint16 `json:"publish,omitempty"`
}

// Protocols a mesh can judge by request, and "tcp", which it cannot.
var Protocols = []string{"http", "grpc", "bolt", "dubbo", "dubbo-thrift", "redis", "tcp"}

// Endpoint is one instance of a service.
type Endpoint struct {
	Instance string     `json:"instance"`
	Address  netip.Addr `json:"address"` // of the sandbox
	// Gateway is the mesh address (HBONE) of the node it runs on.
	Gateway netip.AddrPort `json:"gateway"`
}

// Rule is one access rule; every present field must match.
type Rule struct {
	Name string `json:"name"` // policy/rule, for explanations
	// From: SPIFFE ids, "anonymous" or "*" (any identity).
	From    []string `json:"from"`
	Ports   []uint16 `json:"ports,omitempty"`
	Methods []string `json:"methods,omitempty"` // of HTTP, or of an RPC service; a command of Redis
	Paths   []string `json:"paths,omitempty"`   // of HTTP; a trailing * is a prefix
	// Services of an RPC protocol: an interface, of whatever version and group,
	// or interface:version, or group/ before either; a trailing * is a prefix.
	Services []string `json:"services,omitempty"`
	// Sources are where calls come from: the sandbox that calls, or who has
	// connected to a published port.
	Sources []netip.Prefix `json:"sources,omitempty"`
	Headers []Header       `json:"headers,omitempty"` // of HTTP, all of them
	Token   *Token         `json:"token,omitempty"`
	When    *Expr          `json:"when,omitempty"`
	// Audit rules are tried out: one that denies only tells what it would refuse,
	// one that allows allows nothing.
	Audit bool `json:"audit,omitempty"`
}

// Sandbox is a local instance as the mesh knows it.
type Sandbox struct {
	Instance string     `json:"instance"`
	Address  netip.Addr `json:"address"`
	Identity string     `json:"identity"`
	Service  string     `json:"service"` // name
	// Namespace of the service, also the DNS search domain.
	Namespace string `json:"namespace"`
	// Egress lists destinations outside the mesh the workload may reach.
	Egress []Egress `json:"egress,omitempty"`
}

// Egress is one allowed destination outside the mesh.
type Egress struct {
	Prefix netip.Prefix `json:"prefix"`
	Ports  []uint16     `json:"ports,omitempty"`
}

// Epoch is a numbered set of what is no longer trusted. Epochs only grow: a
// later one holds everything an earlier one held that has not expired.
type Epoch struct {
	Number uint64 `json:"number"`
	// Instances whose connections must be cut and whose sandboxes frozen.
	Instances []string `json:"instances,omitempty"`
	// Identities (SPIFFE ids) no instance may hold any more.
	Identities []string `json:"identities,omitempty"`
	// Serials of certificates, lower-case hexadecimal.
	Serials []string `json:"serials,omitempty"`
	// Digests of images.
	Digests []string `json:"digests,omitempty"`
}
