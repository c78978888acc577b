package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"hauberk.dev/api/spec"
)

// GuardPolicy says what may run, be touched and be reached inside a sandbox.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=gp,categories=hauberk
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Workloads",type=integer,JSONPath=`.status.workloads`
// +kubebuilder:printcolumn:name="Enforced",type=integer,JSONPath=`.status.instances`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`
type GuardPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec spec.GuardPolicy `json:"spec"`
	// +optional
	Status GuardPolicyStatus `json:"status,omitempty"`
}

// GuardPolicyStatus is what is true of a guard policy.
type GuardPolicyStatus struct {
	Standing `json:",inline"`
	// Workloads that name the policy.
	// +optional
	Workloads int32 `json:"workloads,omitempty"`
	// Instances whose guard has reported this generation of it in force.
	// +optional
	Instances int32 `json:"instances,omitempty"`
}

// GuardPolicyList is a list of guard policies.
//
// +kubebuilder:object:root=true
type GuardPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []GuardPolicy `json:"items"`
}

// AccessPolicy says who may call a workload. A workload without any may be
// called by nobody.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=ap,categories=hauberk
// +kubebuilder:printcolumn:name="Workload",type=string,JSONPath=`.spec.workload`
// +kubebuilder:printcolumn:name="From",type=string,JSONPath=`.spec.allow[*].from`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`
type AccessPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec spec.AccessPolicy `json:"spec"`
	// +optional
	Status AccessPolicyStatus `json:"status,omitempty"`
}

// AccessPolicyStatus is what is true of an access policy.
type AccessPolicyStatus struct {
	Standing `json:",inline"`
}

// AccessPolicyList is a list of access policies.
//
// +kubebuilder:object:root=true
type AccessPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []AccessPolicy `json:"items"`
}

// ReleasePolicy says what a release of an application must show.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=rp,categories=hauberk
// +kubebuilder:printcolumn:name="Applications",type=string,JSONPath=`.spec.applications`
// +kubebuilder:printcolumn:name="Reviewers",type=integer,JSONPath=`.spec.reviewers`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`
type ReleasePolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec spec.ReleasePolicy `json:"spec"`
	// +optional
	Status ReleasePolicyStatus `json:"status,omitempty"`
}

// ReleasePolicyStatus is what is true of a release policy.
type ReleasePolicyStatus struct {
	Standing `json:",inline"`
}

// ReleasePolicyList is a list of release policies.
//
// +kubebuilder:object:root=true
type ReleasePolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []ReleasePolicy `json:"items"`
}
