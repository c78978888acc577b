package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"hauberk.dev/api/spec"
)

// Instance is one sandbox of a workload, past or present. Hauberk writes it,
// people read it; its name is the instance id.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=inst,categories=hauberk
// +kubebuilder:printcolumn:name="Workload",type=string,JSONPath=`.spec.workload`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.reason`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Address",type=string,JSONPath=`.spec.address`
// +kubebuilder:printcolumn:name="Ready-ms",type=integer,JSONPath=`.status.readyMillis`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Digest",type=string,priority=1,JSONPath=`.spec.digest`
// +kubebuilder:printcolumn:name="Serial",type=string,priority=1,JSONPath=`.status.serial`
// +kubebuilder:printcolumn:name="Lost",type=integer,priority=1,JSONPath=`.status.guard.lost`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.message`
type Instance struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec InstanceSpec `json:"spec"`
	// +optional
	Status InstanceStatus `json:"status,omitempty"`
}

// InstanceSpec is what was ordered. Only guardGeneration and guardDigest change after that,
// and the ticket, which is signed again before it expires.
//
// +kubebuilder:validation:XValidation:rule="self.workload == oldSelf.workload && self.application == oldSelf.application && self.node == oldSelf.node && self.digest == oldSelf.digest && self.repository == oldSelf.repository && self.address == oldSelf.address && self.identity == oldSelf.identity && self.launch == oldSelf.launch",message="only guardGeneration, guardDigest and the ticket of an instance change; anything else is a new instance"
type InstanceSpec struct {
	// Workload the instance belongs to, in the same namespace.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Workload string `json:"workload"`
	// Application that owns the workload.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Application string `json:"application"`
	// Node it runs on.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Node string `json:"node"`
	// Repository the image is pulled from.
	// +kubebuilder:validation:MaxLength=255
	Repository string `json:"repository"`
	// Digest of the image.
	// +kubebuilder:validation:Pattern=`^sha256:[a-f0-9]{64}$`
	Digest string `json:"digest"`
	// Address of the guest.
	// +kubebuilder:validation:MaxLength=64
	Address string `json:"address"`
	// Identity (SPIFFE id) the instance may prove.
	// +kubebuilder:validation:MaxLength=2048
	Identity string `json:"identity"`
	// Ticket is the signed permission to launch: a DSSE envelope as JSON.
	// +kubebuilder:validation:MaxLength=65536
	Ticket string `json:"ticket"`
	// Launch is the workload's specification as it was when the instance was
	// ordered.
	Launch spec.Workload `json:"launch"`
	// GuardGeneration is the policy generation the instance should enforce.
	// +kubebuilder:validation:Minimum=0
	// +optional
	GuardGeneration int64 `json:"guardGeneration,omitempty"`
	// GuardDigest names the content that this generation is the number of.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	GuardDigest string `json:"guardDigest,omitempty"`
}

// InstanceStatus is what the node last said of the instance.
type InstanceStatus struct {
	Standing `json:",inline"`
	// Phase of the instance on its node.
	// +kubebuilder:validation:Enum=Pending;Running;Refused;Failed;Exited;Contained
	// +optional
	Phase string `json:"phase,omitempty"`
	// Reason in one CamelCase word.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Message for people: what failed and what to do.
	// +optional
	Message string `json:"message,omitempty"`
	// StartedAt is when the first process of the workload started.
	// +optional
	StartedAt *metav1.Time `json:"startedAt,omitempty"`
	// ReadyMillis is from clone to first workload process.
	// +optional
	ReadyMillis int64 `json:"readyMillis,omitempty"`
	// Serial of the certificate in use, lower-case hexadecimal.
	// +optional
	Serial string `json:"serial,omitempty"`
	// ExitCode of the workload's process, once it ended.
	// +optional
	ExitCode *int32 `json:"exitCode,omitempty"`
	// Guard is the last heartbeat of the guard inside the sandbox.
	// +optional
	Guard *GuardHeartbeat `json:"guard,omitempty"`
}

// GuardHeartbeat is what the guest says of its guard.
type GuardHeartbeat struct {
	// At is when the guest said it.
	At metav1.MicroTime `json:"at"`
	// Generation of the policy in force.
	Generation int64 `json:"generation"`
	// Digest of the policy in force.
	// +optional
	Digest string `json:"digest,omitempty"`
	// Programs attached.
	Programs int32 `json:"programs"`
	// Sequence of the last event.
	Sequence int64 `json:"sequence"`
	// Lost events.
	Lost int64 `json:"lost"`
}

// InstanceList is a list of instances.
//
// +kubebuilder:object:root=true
type InstanceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Instance `json:"items"`
}
