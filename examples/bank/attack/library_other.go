//go:build !amd64

package main

import (
	"errors"
	"runtime"
)

// library would make a shared library, had its few instructions been written
// for this machine too.
func library(string) ([]byte, error) {
	return nil, errors.New("no code for " + runtime.GOARCH)
}
