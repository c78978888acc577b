//go:build race

package tls13

// raced says that the race detector is on: sync.Pool then forgets on purpose.
const raced = true
