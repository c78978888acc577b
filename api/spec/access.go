package spec

// AccessPolicy says who may call a workload. A workload without any
// AccessPolicy may be called by nobody.
type AccessPolicy struct {
	// Workload the policy protects, in the same namespace.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Workload string `json:"workload"`
	// Deny rules are looked at first; a match refuses.
	// +optional
	// +kubebuilder:validation:MaxItems=256
	Deny []AccessRule `json:"deny,omitempty"`
	// Allow rules are looked at next; without a match the call is refused.
	// +optional
	// +kubebuilder:validation:MaxItems=256
	Allow []AccessRule `json:"allow,omitempty"`
	// Callbacks are who may ask the workload over connections that it has made
	// itself, as servers of SOFABolt and Dubbo may. Without a match that is
	// refused: Allow does not hold for it. Deny rules without ports do.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Callbacks []AccessCallback `json:"callbacks,omitempty"`
	// Mode enforce does what the rules say. In audit the policy allows and
	// refuses nothing: what it would refuse, were it the only one that allows, is
	// told and counted.
	// +optional
	// +kubebuilder:validation:Enum=enforce;audit
	Mode string `json:"mode,omitempty"`
	// Issuers whose tokens the rules of this policy may ask for.
	// +optional
	// +kubebuilder:validation:MaxItems=8
	Issuers []AccessIssuer `json:"issuers,omitempty"`
	// Inspect has the requests that may be made looked at, for attacks and for
	// what is out of the ordinary. Of several policies' scores the lowest hold.
	// +optional
	Inspect *Inspect `json:"inspect,omitempty"`
}

// AccessIssuer is whose JSON Web Tokens are believed, and by which keys.
type AccessIssuer struct {
	// Issuer is the claim iss of its tokens.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	Issuer string `json:"issuer"`
	// Audiences, of which a token must name one in its claim aud.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=512
	Audiences []string `json:"audiences"`
	// Keys is its JSON Web Key Set: public keys for ES256, RS256 or EdDSA.
	// +optional
	// +kubebuilder:validation:MaxLength=65536
	Keys string `json:"keys,omitempty"`
	// KeysFile is a file with the key set on every node, in place of Keys. It is
	// read again when it has changed.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:Pattern=`^/`
	KeysFile string `json:"keysFile,omitempty"`
	// Header holds the token; without it authorization does, after "Bearer".
	// +optional
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9-]+$`
	Header string `json:"header,omitempty"`
	// SkewSeconds that the clocks of the issuer and of a node may differ by.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=600
	SkewSeconds int32 `json:"skewSeconds,omitempty"`
}

// AccessRule matches a call when each of its present fields does.
type AccessRule struct {
	// From lists callers: "workload", "workload.namespace", a full SPIFFE id,
	// "anonymous" (no identity, through a published port), or "*" (any
	// identity). None matches nobody.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=2048
	From []string `json:"from"`
	// Ports; none means every port.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:Minimum=1
	// +kubebuilder:validation:items:Maximum=65535
	Ports []int32 `json:"ports,omitempty"`
	// Methods match the method of a request: GET of HTTP on ports with protocol
	// http, the name of a method on ports with protocol grpc, bolt, dubbo or
	// dubbo-thrift, a command on ports with protocol redis: GET, or CONFIG|SET of a
	// command that has subcommands, all of which CONFIG stands for. Where
	// there is no method to be read, a rule that has them never allows, and
	// denies what its other fields match; so it is with Paths and Services.
	// +optional
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:Pattern=`^[A-Za-z_$][A-Za-z0-9_$|.-]{0,127}$`
	Methods []string `json:"methods,omitempty"`
	// Services match requests on ports with protocol grpc, bolt, dubbo or dubbo-thrift: of gRPC
	// a service with its package, of the others an interface in whatever version
	// and group, interface:version, or either after group/. A service ending in
	// * is a prefix.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:Pattern=`^[^*\s]*\*?$`
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=512
	Services []string `json:"services,omitempty"`
	// Paths match requests on ports with protocol http or grpc. A path ending in *
	// is a prefix.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:Pattern=`^/`
	// +kubebuilder:validation:items:MaxLength=1024
	Paths []string `json:"paths,omitempty"`
	// Sources are networks, such as 10.0.0.0/8: of who has connected to a
	// published port, else of the sandbox that calls.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=64
	Sources []string `json:"sources,omitempty"`
	// Headers match the fields of a request on ports with protocol http or grpc.
	// +optional
	// +kubebuilder:validation:MaxItems=16
	Headers []AccessHeader `json:"headers,omitempty"`
	// JWT matches a good token of one of the policy's issuers. On a request
	// without one the rule does not allow, and denies.
	// +optional
	JWT *AccessJWT `json:"jwt,omitempty"`
	// When is a condition in CEL over source.identity, source.address,
	// destination.port, request.method, request.path, request.query,
	// request.host, request.headers, rpc.service, rpc.version, rpc.group,
	// rpc.method, and with JWT its claims as jwt. If it cannot be decided, the rule
	// does not allow, and denies.
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	When string `json:"when,omitempty"`
	// Mode audit tries the rule out: one that denies only tells what it would
	// refuse, one that allows allows nothing.
	// +optional
	// +kubebuilder:validation:Enum=enforce;audit
	Mode string `json:"mode,omitempty"`
}

// AccessCallback matches a request of a server over a connection of its client,
// when each of its present fields does.
type AccessCallback struct {
	// From lists servers: "workload", "workload.namespace", a full SPIFFE id, or
	// "*" (any identity).
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=2048
	From []string `json:"from"`
	// Services are interfaces that the workload implements, as in AccessRule. A
	// request of which the interface cannot be read matches only without.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:Pattern=`^[^*\s]*\*?$`
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=512
	Services []string `json:"services,omitempty"`
	// Methods of them.
	// +optional
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:Pattern=`^[A-Za-z_$][A-Za-z0-9_$|.-]{0,127}$`
	Methods []string `json:"methods,omitempty"`
	// When is a condition in CEL over source.identity, source.address, rpc.service,
	// rpc.version, rpc.group and rpc.method. If it cannot be decided, the rule does
	// not allow.
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	When string `json:"when,omitempty"`
	// Mode audit tries the rule out: it allows nothing, and a refusal says that it
	// would.
	// +optional
	// +kubebuilder:validation:Enum=enforce;audit
	Mode string `json:"mode,omitempty"`
}

// AccessHeader matches a field of a request: with neither Exact nor Prefix, if
// it is there.
type AccessHeader struct {
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9!#$%&'*+.^_|~-]+$`
	Name string `json:"name"`
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	Exact *string `json:"exact,omitempty"`
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	Prefix string `json:"prefix,omitempty"`
	// Absent turns the match round: no such field.
	// +optional
	Absent bool `json:"absent,omitempty"`
}

// AccessJWT matches a token.
type AccessJWT struct {
	// Issuers, of those of the policy; none means any of them.
	// +optional
	// +kubebuilder:validation:MaxItems=8
	// +kubebuilder:validation:items:MaxLength=512
	Issuers []string `json:"issuers,omitempty"`
	// Claims must all hold.
	// +optional
	// +kubebuilder:validation:MaxItems=16
	Claims []AccessClaim `json:"claims,omitempty"`
}

// AccessClaim matches a claim: itself, or if it is a list one of its elements,
// is one of OneOf.
type AccessClaim struct {
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	Name string `json:"name"`
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=1024
	OneOf []string `json:"oneOf"`
}
