// Package guard makes what stands behind the word Guard: the programs that run
// in a guest's kernel, the policy they hold a workload to, and the words for
// what they saw.
//
// It works on the host, before and beside the guest: Link fits the programs
// to one kernel, Compile turns policies into one blob that the guest's agent
// puts into maps, Decode reads what the guest sends back. It loads nothing
// into any kernel and opens no connection; what loads is package guest, which
// speaks bpf(2) itself.
package guard
