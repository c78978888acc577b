// Package spec holds the specifications of Hauberk's resources as plain
// values: what a person writes under "spec:" in YAML.
//
// It imports nothing of Kubernetes, so engines can take a specification
// without linking an API machinery; api/v1alpha1 wraps these types into
// resources. It holds no behaviour: package policy parses and checks.
//
// +kubebuilder:object:generate=true
package spec
