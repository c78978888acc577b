package spec

// ReleasePolicy says what a release of an application must show.
type ReleasePolicy struct {
	// Applications the policy covers, in the same namespace; "*" is all.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=63
	// +listType=set
	Applications []string `json:"applications"`
	// Builders whose provenance is accepted: SLSA builder ids.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=1024
	// +listType=set
	Builders []string `json:"builders"`
	// Rules are CEL expressions that must all be true. They see: application,
	// image {repository, digest}, provenance {builder, source, revision,
	// buildType}, author, reviewers (list), owners (list of approvals).
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Rules []ReleaseRule `json:"rules,omitempty"`
	// Reviewers is how many reviewers, none of them the author, must have
	// signed.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=8
	// +kubebuilder:default=1
	// +optional
	Reviewers int32 `json:"reviewers,omitempty"`
}

// ReleaseRule is one CEL expression with the message of its refusal.
type ReleaseRule struct {
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	Expression string `json:"expression"`
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	Message string `json:"message"`
}
