package main

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// What was found of a place must not be believed once the place is another. Each
// of these opens a file where nothing is said of it, and again where something
// is.
var clearAttacks = map[string]func([]string) error{
	// A directory is moved with what is in it.
	"movedabove": func(a []string) error {
		return twice(a[0]+"/in/file", a[1]+"/in/file", func() error { return syscall.Rename(a[0], a[1]) })
	},
	"movedfile": func(a []string) error {
		return twice(a[0]+"/file", a[1], func() error { return syscall.Rename(a[0]+"/file", a[1]) })
	},
	"linkedafter": func(a []string) error {
		return twice(a[0]+"/file", a[1], func() error { return syscall.Link(a[0]+"/file", a[1]) })
	},
	// A file beside the directory that a rule is about.
	"besides": func(a []string) error {
		return twice(a[0], a[1], func() error { return nil })
	},
}

// twice opens a file of its own making, does something, and opens it where it is
// then; what lies there already is left as it is.
func twice(before, after string, between func() error) error {
	if err := os.MkdirAll(filepath.Dir(before), 0o755); err != nil {
		return void(err)
	}
	if _, err := os.Stat(before); err != nil {
		if err := os.WriteFile(before, []byte("x"), 0o644); err != nil {
			return void(err)
		}
	}
	for range 3 { // the first of which is looked into
		if err := read([]string{before}); err != nil {
			return void(fmt.Errorf("read before: %w", err))
		}
	}
	if err := between(); err != nil {
		return void(fmt.Errorf("move: %w", err))
	}
	return read([]string{after})
}
