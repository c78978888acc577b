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
	// dubbo-thrift. Where
	// there is no method to be read, a rule that has them never allows, and
	// denies what its other fields match; so it is with Paths and Services.
	// +optional
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:Pattern=`^[A-Za-z_$][A-Za-z0-9_$]{0,127}$`
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
}
