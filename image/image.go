// Package image turns a released OCI image into the read-only root file system
// of a sandbox: one erofs file.
//
// Every blob is checked against the digest that named it before it is used,
// and the whole of it is bounded. Layers are merged in memory and written
// straight into the file: nothing in an image is ever unpacked into a
// directory of this machine, so no name or link in it can reach one. The same
// layers always give the same bytes.
//
// It does not decide which image may run (package release) and it never writes
// to a registry.
package image

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
)

// Blobs gives the content a digest names. The content is not trusted: whoever
// reads it checks it. Digests have the form sha256:<64 lower-case digits>.
type Blobs interface {
	Open(ctx context.Context, digest string) (io.ReadCloser, error)
}

// Image is an image on this machine, ready to be attached to a sandbox.
type Image struct {
	// Path of the erofs file.
	Path string `json:"path"`
	// Digest of the manifest it was made from.
	Digest string `json:"digest"`
	// ErofsSHA256 of the file, in lower-case hexadecimal.
	ErofsSHA256 string `json:"erofsSHA256"`
	// Size of the file in bytes.
	Size int64 `json:"size"`
	// Config of the process that the image starts.
	Config Config `json:"config"`
}

// Config says what an image starts and as whom.
type Config struct {
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	Env        []string `json:"env,omitempty"`
	// User as the image states it; UID, GID and Groups are what it means by
	// the image's own /etc/passwd and /etc/group.
	User       string   `json:"user,omitempty"`
	UID        uint32   `json:"uid"`
	GID        uint32   `json:"gid"`
	Groups     []uint32 `json:"groups,omitempty"`
	WorkingDir string   `json:"workingDir"`
	// Home of the user by the same files, if they name one.
	Home string `json:"home,omitempty"`
	// StopSignal as the image states it, such as "SIGQUIT" or "3".
	StopSignal string `json:"stopSignal,omitempty"`
}

// limits bound what one image may cost. They are fields so that tests can
// reach them.
type limits struct {
	manifest int64 // bytes of a manifest
	config   int64 // bytes of a configuration
	layers   int   // layers of an image
	blob     int64 // bytes of one layer as stored
	unpacked int64 // bytes of all layers, unpacked
	entries  int   // entries of all layers
	text     int   // bytes of all names, link targets and attributes
	path     int   // bytes of a path
	xattrs   int   // bytes of attributes of one file
}

var standard = limits{
	manifest: 1 << 20,
	config:   1 << 20,
	layers:   128,
	blob:     4 << 30,
	unpacked: 16 << 30,
	entries:  1 << 20,
	text:     128 << 20,
	path:     4095,
	xattrs:   64 << 10,
}

// parseDigest returns the hexadecimal part of a SHA-256 digest.
func parseDigest(d string) (string, error) {
	hexa, ok := strings.CutPrefix(d, "sha256:")
	if !ok {
		return "", fmt.Errorf("parse digest %q: only sha256 is known", d)
	}
	if raw, err := hex.DecodeString(hexa); err != nil || len(raw) != 32 || strings.ToLower(hexa) != hexa {
		return "", fmt.Errorf("parse digest %q: want 64 lower-case hexadecimal digits", d)
	}
	return hexa, nil
}
