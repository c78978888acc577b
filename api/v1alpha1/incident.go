package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"hauberk.dev/api/spec"
)

// Incident is a violation and everything done about it. Hauberk writes it,
// people read it; its specification never changes.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=inc,categories=hauberk
// +kubebuilder:printcolumn:name="Workload",type=string,JSONPath=`.spec.workload`
// +kubebuilder:printcolumn:name="Instance",type=string,JSONPath=`.spec.instance`
// +kubebuilder:printcolumn:name="Cause",type=string,JSONPath=`.spec.cause`
// +kubebuilder:printcolumn:name="Rule",type=string,JSONPath=`.spec.rule`
// +kubebuilder:printcolumn:name="State",type=string,JSONPath=`.status.state`
// +kubebuilder:printcolumn:name="Millis",type=integer,JSONPath=`.status.containedMillis`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Epoch",type=integer,priority=1,JSONPath=`.status.epoch`
// +kubebuilder:printcolumn:name="Detail",type=string,priority=1,JSONPath=`.spec.detail`
type Incident struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="an incident is evidence: its specification never changes"
	Spec spec.Incident `json:"spec"`
	// +optional
	Status IncidentStatus `json:"status,omitempty"`
}

// IncidentState says how far containment is.
// +kubebuilder:validation:Enum=Containing;Contained;Closed
type IncidentState string

// The states. Closed is set by a person.
const (
	IncidentContaining IncidentState = "Containing"
	IncidentContained  IncidentState = "Contained"
	IncidentClosed     IncidentState = "Closed"
)

// IncidentStatus is what was done about an incident.
type IncidentStatus struct {
	Standing `json:",inline"`
	// State of containment.
	// +optional
	State IncidentState `json:"state,omitempty"`
	// Epoch is the revocation epoch that names the instance.
	// +optional
	Epoch int64 `json:"epoch,omitempty"`
	// Receipts of the enforcement points, in order of arrival.
	// +optional
	// +kubebuilder:validation:MaxItems=1024
	Receipts []Receipt `json:"receipts,omitempty"`
	// ContainedMillis is from observation to the last awaited receipt.
	// +optional
	ContainedMillis *int64 `json:"containedMillis,omitempty"`
	// LedgerIndex of the entry that opened the incident.
	// +optional
	LedgerIndex *int64 `json:"ledgerIndex,omitempty"`
}

// Receipt is the word of an enforcement point that it applied an epoch.
type Receipt struct {
	// Point that applied it: mesh or sandbox.
	Point string `json:"point"`
	// Node it is on.
	Node string `json:"node"`
	// Act in words, such as "cut 3 connections".
	Act string `json:"act"`
	// At is when it was applied.
	At metav1.MicroTime `json:"at"`
	// Signature of the node's key over the receipt, base64.
	// +optional
	Signature string `json:"signature,omitempty"`
}

// IncidentList is a list of incidents.
//
// +kubebuilder:object:root=true
type IncidentList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Incident `json:"items"`
}
