// Package kube is the one room that knows Kubernetes.
//
// Server is the API server of embedded mode: etcd, thirteen built-in kinds and
// Hauberk's own resources in one process, for clients with a certificate. Store
// is the other end: what the control plane reads and writes of a
// Kubernetes-style API, embedded or not, without itself naming a Kubernetes
// type. The room decides nothing about workloads, and there are no pods,
// services or nodes in it: Hauberk's own kinds describe what runs.
package kube
