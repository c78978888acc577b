// Package version names the build of a program, for people and for status
// pages; nothing decides by it.
package version

import "runtime"

// version is set by the linker: make build passes what git describe says.
var version = "unversioned"

// String is the version of this build.
func String() string { return version }

// Long adds what the build was made with and for.
func Long() string {
	return version + " (" + runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH + ")"
}
