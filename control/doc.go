// Package control is the control plane of a trust domain: its parts, listed
// and wired.
//
// It reads what people want from the API, decides what may run where, writes
// tickets and identities, and tells every node what it should be doing. What a
// node should do is a pure function of what is known (world); everything that
// permits something is in the ledger before it takes effect. It starts no
// sandbox and touches no socket of a workload: package node does.
package control
