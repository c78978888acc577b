package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Group and Version of every resource here.
const (
	Group   = "hauberk.dev"
	Version = "v1alpha1"
)

// GroupVersion of every resource here.
var GroupVersion = schema.GroupVersion{Group: Group, Version: Version}

// AddToScheme makes a scheme know the resources.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion,
		&Application{}, &ApplicationList{},
		&Workload{}, &WorkloadList{},
		&GuardPolicy{}, &GuardPolicyList{},
		&ClusterGuardPolicy{}, &ClusterGuardPolicyList{},
		&AccessPolicy{}, &AccessPolicyList{},
		&ReleasePolicy{}, &ReleasePolicyList{},
		&Incident{}, &IncidentList{},
		&Instance{}, &InstanceList{},
	)
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
