// Package bpf holds the Guard's programs, written in C, and fits them to one
// kernel: Link gives the bundle that a guest's agent loads.
//
// It is apart from package guard so that who only compiles policies, as the
// control plane does, links nothing that knows the kernel's verifier. It loads
// nothing into any kernel itself.
package bpf
