//go:build race

package alone

// raced says that the race detector is on: sync.Pool then forgets on purpose.
const raced = true
