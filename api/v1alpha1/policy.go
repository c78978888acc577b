package v1alpha1

import (
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"hauberk.dev/api/spec"
)

// GuardPolicy says what may run, be touched and be reached inside a sandbox.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=gp,categories=hauberk
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Generation",type=integer,JSONPath=`.status.generation`
// +kubebuilder:printcolumn:name="Applied",type=integer,JSONPath=`.status.applied`
// +kubebuilder:printcolumn:name="Eligible",type=integer,JSONPath=`.status.eligible`
// +kubebuilder:printcolumn:name="Rollout",type=string,JSONPath=`.status.rollout.phase`
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
	// Selects says in words for what the policy holds.
	// +optional
	Selects string `json:"selects,omitempty"`
	// Generation of the content in force. It counts contents, never goes back,
	// and is not the generation of the object: a content that was refused has
	// none, and one that was rolled back to gets a new one.
	// +optional
	Generation int64 `json:"generation,omitempty"`
	// Digest of that content.
	// +optional
	Digest string `json:"digest,omitempty"`
	// Workloads that the policy holds for.
	// +optional
	Workloads int32 `json:"workloads,omitempty"`
	// Eligible instances run and should have the policy in force.
	// +optional
	Eligible int32 `json:"eligible,omitempty"`
	// Applied counts those whose Guard has reported that it has it.
	// +optional
	Applied int32 `json:"applied,omitempty"`
	// Unsupported says what was asked and cannot be held by the guests as
	// written. More is refused instead, or it would not have been accepted.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Unsupported []string `json:"unsupported,omitempty"`
	// Degraded lists the switches that lower the policy now.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Degraded []string `json:"degraded,omitempty"`
	// Rollout of a change that is on its way.
	// +optional
	Rollout *GuardRolloutStatus `json:"rollout,omitempty"`
	// WouldDeny counts, while the policy is in audit or learn, what it would have
	// denied: in audit the records of its rules, in learn the acts that the
	// proposal refuses.
	// +optional
	WouldDeny *int64 `json:"wouldDeny,omitempty"`
	// Learning is what was seen while the policy is in learn, and the policy that
	// allows just this. It is never put in force by itself.
	// +optional
	Learning *GuardLearning `json:"learning,omitempty"`
}

// GuardLearning is what was observed of the workloads of a policy in learn.
type GuardLearning struct {
	// Since and Until are when it was watched.
	Since metav1.Time `json:"since"`
	Until metav1.Time `json:"until"`
	// Instances that were watched.
	Instances int32 `json:"instances"`
	// Acts that were seen.
	Acts int64 `json:"acts"`
	// Whole: nothing was missed. If it is false the proposal may refuse what a
	// workload does: see notes.
	Whole bool `json:"whole"`
	// Digest names the proposal's content.
	Digest string `json:"digest"`
	// Proposal is the spec of a GuardPolicy.
	// +kubebuilder:pruning:PreserveUnknownFields
	// +kubebuilder:validation:Type=object
	Proposal runtime.RawExtension `json:"proposal"`
	// Evidence of the proposal's fields, a line each.
	// +optional
	// +kubebuilder:validation:MaxItems=512
	Evidence []string `json:"evidence,omitempty"`
	// Refuses lists what was done and the proposal would deny.
	// +optional
	// +kubebuilder:validation:MaxItems=512
	Refuses []string `json:"refuses,omitempty"`
	// Notes say what a person should know before believing the proposal.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Notes []string `json:"notes,omitempty"`
}

// GuardRolloutStatus says how far a change is.
type GuardRolloutStatus struct {
	// Generation of the content that goes out.
	Generation int64 `json:"generation"`
	// Phase: Applying, Soaking, Waiting (for a person), Paused or Halted.
	Phase string `json:"phase"`
	// Stage counts from 1, of Stages.
	Stage  int32 `json:"stage"`
	Stages int32 `json:"stages"`
	// Percent of the instances that this stage is for.
	Percent int32 `json:"percent"`
	// Instances that have the change, or are about to.
	// +optional
	// +kubebuilder:validation:MaxItems=10000
	Instances []string `json:"instances,omitempty"`
	// Message says what is waited for, or why it was halted.
	// +optional
	Message string `json:"message,omitempty"`
}

// Watched sets when it was watched.
func (l *GuardLearning) Watched(since, until time.Time) {
	l.Since, l.Until = metav1.NewTime(since), metav1.NewTime(until)
}

// Propose sets the proposal, JSON of a policy's spec.
func (l *GuardLearning) Propose(spec []byte) { l.Proposal = runtime.RawExtension{Raw: spec} }

// GuardPolicyList is a list of guard policies.
//
// +kubebuilder:object:root=true
type GuardPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []GuardPolicy `json:"items"`
}

// ClusterGuardPolicy is a floor under the guard policies of all namespaces: it
// holds for the workloads it selects and no other policy weakens it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=cgp,categories=hauberk
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Generation",type=integer,JSONPath=`.status.generation`
// +kubebuilder:printcolumn:name="Applied",type=integer,JSONPath=`.status.applied`
// +kubebuilder:printcolumn:name="Eligible",type=integer,JSONPath=`.status.eligible`
// +kubebuilder:printcolumn:name="Rollout",type=string,JSONPath=`.status.rollout.phase`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Selects",type=string,priority=1,JSONPath=`.status.selects`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`
type ClusterGuardPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec spec.ClusterGuardPolicy `json:"spec"`
	// +optional
	Status GuardPolicyStatus `json:"status,omitempty"`
}

// ClusterGuardPolicyList is a list of cluster guard policies.
//
// +kubebuilder:object:root=true
type ClusterGuardPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []ClusterGuardPolicy `json:"items"`
}

// AccessPolicy says who may call a workload. A workload without any may be
// called by nobody.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=ap,categories=hauberk
// +kubebuilder:printcolumn:name="Workload",type=string,JSONPath=`.spec.workload`
// +kubebuilder:printcolumn:name="From",type=string,JSONPath=`.spec.allow[*].from`
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
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
