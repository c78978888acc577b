// Package openapi describes the built-in kinds of the embedded API server, so
// that it can track who set which field and clients can explain the kinds.
//
// It is generated; it holds no behaviour.
package openapi

//go:generate go tool openapi-gen --go-header-file header.txt --output-dir . --output-pkg hauberk.dev/kube/openapi --output-file zz_generated.openapi.go --report-filename /dev/null k8s.io/api/core/v1 k8s.io/api/coordination/v1 k8s.io/api/events/v1 k8s.io/api/admissionregistration/v1 k8s.io/api/authentication/v1 k8s.io/api/authorization/v1 k8s.io/apimachinery/pkg/apis/meta/v1 k8s.io/apimachinery/pkg/runtime k8s.io/apimachinery/pkg/version k8s.io/apimachinery/pkg/api/resource k8s.io/apimachinery/pkg/util/intstr
