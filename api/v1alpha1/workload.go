package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"hauberk.dev/api/spec"
)

// Workload is a running part of an application: an image, the machine each
// instance gets, the ports it listens on and the policies that hold.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=wl,categories=hauberk
// +kubebuilder:printcolumn:name="Application",type=string,JSONPath=`.spec.application`
// +kubebuilder:printcolumn:name="Ready",type=integer,JSONPath=`.status.readyInstances`
// +kubebuilder:printcolumn:name="Wanted",type=integer,JSONPath=`.spec.replicas`
// +kubebuilder:printcolumn:name="Contained",type=integer,JSONPath=`.status.containedInstances`
// +kubebuilder:printcolumn:name="Image",type=string,JSONPath=`.spec.image`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Address",type=string,priority=1,JSONPath=`.status.address`
// +kubebuilder:printcolumn:name="Identity",type=string,priority=1,JSONPath=`.status.identity`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.matches('^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$')",message="metadata.name must be a DNS label: lower-case letters, digits and '-', starting with a letter, at most 63 characters"
type Workload struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec spec.Workload `json:"spec"`
	// +optional
	Status WorkloadStatus `json:"status,omitempty"`
}

// WorkloadStatus is what is true of a workload.
type WorkloadStatus struct {
	Standing `json:",inline"`
	// Instances that exist, whatever their phase.
	// +optional
	Instances int32 `json:"instances,omitempty"`
	// ReadyInstances run and can be called.
	// +optional
	ReadyInstances int32 `json:"readyInstances,omitempty"`
	// ContainedInstances are held after an incident.
	// +optional
	ContainedInstances int32 `json:"containedInstances,omitempty"`
	// Digest of the released image the instances run.
	// +optional
	Digest string `json:"digest,omitempty"`
	// ReleaseIndex is the ledger entry that admits the digest.
	// +optional
	ReleaseIndex *int64 `json:"releaseIndex,omitempty"`
	// Address other workloads reach this one at.
	// +optional
	Address string `json:"address,omitempty"`
	// Identity (SPIFFE id) its instances prove.
	// +optional
	Identity string `json:"identity,omitempty"`
	// GuardGeneration is the newest policy generation meant for the instances.
	// +optional
	GuardGeneration int64 `json:"guardGeneration,omitempty"`
	// GuardDigest names the content of those policies.
	// +optional
	GuardDigest string `json:"guardDigest,omitempty"`
}

// WorkloadList is a list of workloads.
//
// +kubebuilder:object:root=true
type WorkloadList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Workload `json:"items"`
}
