package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Condition types that more than one kind carries.
const (
	// ConditionReady is true when the resource does what its specification
	// says; its reason and message say why not.
	ConditionReady = "Ready"
	// ConditionAccepted is true when the specification makes sense together
	// with the resources it names.
	ConditionAccepted = "Accepted"
)

// Standing is the part of every status that says how the resource stands.
type Standing struct {
	// ObservedGeneration is the metadata.generation the status speaks of.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions of the resource, one per type.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// Stander is any resource of this package.
//
// +kubebuilder:object:generate=false
//
// +kubebuilder:object:generate=false
type Stander interface {
	metav1.Object
	// Stands returns the standing of the resource, to read or to change.
	Stands() *Standing
}

// Stands implements Stander.
func (x *Application) Stands() *Standing { return &x.Status.Standing }

// Stands implements Stander.
func (x *Workload) Stands() *Standing { return &x.Status.Standing }

// Stands implements Stander.
func (x *GuardPolicy) Stands() *Standing { return &x.Status.Standing }

// Stands implements Stander.
func (x *ClusterGuardPolicy) Stands() *Standing { return &x.Status.Standing }

// Stands implements Stander.
func (x *AccessPolicy) Stands() *Standing { return &x.Status.Standing }

// Stands implements Stander.
func (x *ReleasePolicy) Stands() *Standing { return &x.Status.Standing }

// Stands implements Stander.
func (x *Incident) Stands() *Standing { return &x.Status.Standing }

// Stands implements Stander.
func (x *Instance) Stands() *Standing { return &x.Status.Standing }
