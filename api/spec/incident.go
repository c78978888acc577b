package spec

// Incident is a violation and everything done about it. Hauberk writes it;
// people read it.
type Incident struct {
	// Instance that broke the rule.
	// +kubebuilder:validation:MaxLength=253
	Instance string `json:"instance"`
	// Workload and Application it belongs to.
	// +kubebuilder:validation:MaxLength=63
	Workload string `json:"workload"`
	// +kubebuilder:validation:MaxLength=63
	Application string `json:"application"`
	// +kubebuilder:validation:MaxLength=253
	Node string `json:"node"`
	// Identity is the SPIFFE id that was revoked.
	// +kubebuilder:validation:MaxLength=2048
	Identity string `json:"identity"`
	// Cause: guard, bypass, attestation, person, or mesh, which has seen what the
	// instance sends to others.
	// +kubebuilder:validation:Enum=guard;bypass;attestation;person;mesh
	Cause string `json:"cause"`
	// Rule that was broken, in words.
	// +kubebuilder:validation:MaxLength=4096
	Rule string `json:"rule"`
	// Detail of what was seen: the program, the file, the address.
	// +optional
	// +kubebuilder:validation:MaxLength=16384
	Detail string `json:"detail,omitempty"`
	// Observed is when the enforcement point saw it, RFC 3339 with nanoseconds.
	// +kubebuilder:validation:MaxLength=64
	Observed string `json:"observed"`
}
