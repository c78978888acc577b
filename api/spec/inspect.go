package spec

// Inspect says from which score on something is done about a request and its
// caller; a score is a sum of findings, and what has none is never done.
// docs/inspect.md lists them.
// +kubebuilder:validation:MinProperties=1
type Inspect struct {
	// Observe leaves an event.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	Observe int32 `json:"observe,omitempty"`
	// Shed refuses the caller for a while.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	Shed int32 `json:"shed,omitempty"`
	// Challenge sheds, and makes the caller prove its identity anew.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	Challenge int32 `json:"challenge,omitempty"`
	// Cut ends all the caller's connections to the workload.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	Cut int32 `json:"cut,omitempty"`
	// Incident cuts, and contains the instance that called.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	Incident int32 `json:"incident,omitempty"`
	// Learn is after how many requests of a route what it has not seen before
	// is a finding; 1000 if it is not set.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000000
	Learn int32 `json:"learn,omitempty"`
	// Frozen stops learning.
	// +optional
	Frozen bool `json:"frozen,omitempty"`
}
