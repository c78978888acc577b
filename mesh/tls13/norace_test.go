//go:build !race

package tls13

const raced = false
