// Package bank proves on a running bank what the README promises: payments
// through every link, attacks that are stopped, refusals that say what to do,
// and nothing left behind.
//
// It holds tests only.
package bank
