// Package v1alpha1 holds Hauberk's resources as they travel and are stored:
// group hauberk.dev, version v1alpha1, the specifications of package spec with
// metadata and status around them.
//
// It imports the plain types of apimachinery and nothing else of Kubernetes.
// It holds no behaviour beyond reading and setting conditions; engines take
// the specification, never the resource.
//
// +kubebuilder:object:generate=true
// +groupName=hauberk.dev
package v1alpha1

// The first command writes deep copies, the second the resource definitions
// that the API server installs.
//
//go:generate go tool controller-gen object paths=../spec;.
//go:generate go tool controller-gen crd paths=. output:crd:dir=../../kube/crd
