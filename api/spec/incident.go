package spec

// Incident is a violation and everything done about it. Hauberk writes it;
// people read it.
type Incident struct {
	// Instance that broke the rule.
	Instance string `json:"instance"`
	// Workload and Application it belongs to.
	Workload    string `json:"workload"`
	Application string `json:"application"`
	Node        string `json:"node"`
	// Identity is the SPIFFE id that was revoked.
	Identity string `json:"identity"`
	// Cause: guard, bypass, or attestation.
	// +kubebuilder:validation:Enum=guard;bypass;attestation;person
	Cause string `json:"cause"`
	// Rule that was broken, in words.
	Rule string `json:"rule"`
	// Detail of what was seen: the program, the file, the address.
	// +optional
	Detail string `json:"detail,omitempty"`
	// Observed is when the enforcement point saw it, RFC 3339 with nanoseconds.
	Observed string `json:"observed"`
}
