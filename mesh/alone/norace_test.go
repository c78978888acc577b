//go:build !race

package alone

const raced = false
