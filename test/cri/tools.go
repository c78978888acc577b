package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"hauberk.dev/registry"
)

// Tools are directories that are filled while there is a network to fill them
// from.
type Tools struct {
	Suite      string // critest and crictl
	Containerd string // its programs; empty for Debian's
	Work       string // everything else, removed at the end
}

// made tells the inside of the namespaces what the outside made.
const made = "HAUBERK_TEST_TOOLS"

// foreignDigest is how the suite names one image: by what is on the network.
const foreignDigest = "sha256:9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"

// Enter makes what is needed, in cache or in the user's, and runs the calling
// program once more in namespaces of its own. Only there inside is true; the
// caller outside ends with code.
func Enter(ctx context.Context, cache string, debian bool, tell func(string, ...any)) (t Tools, inside bool, code int, err error) {
	if os.Getuid() != 0 {
		return t, false, 1, fmt.Errorf("containerd and machines need root")
	}
	text := os.Getenv(made)
	if text == "" {
		t, err := prepare(ctx, cache, debian, tell)
		defer os.RemoveAll(t.Work)
		if err != nil {
			return t, false, 1, err
		}
		raw, err := json.Marshal(t)
		if err != nil {
			return t, false, 1, err
		}
		if err := os.Setenv(made, string(raw)); err != nil {
			return t, false, 1, err
		}
		inside, code, err := private()
		return t, inside, code, err
	}
	if inside, code, err := private(); !inside {
		return t, false, code, err
	}
	if err := json.Unmarshal([]byte(text), &t); err != nil {
		return t, true, 1, fmt.Errorf("read %s: %w", made, err)
	}
	return t, true, 0, nil
}

// prepare makes images and programs, or finds them made.
func prepare(ctx context.Context, cache string, debian bool, tell func(string, ...any)) (t Tools, err error) {
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			dir = "/var/cache" // root without a home
		}
		cache = filepath.Join(dir, "hauberk", "critest")
	}
	// Short, for the sockets below it.
	if t.Work, err = os.MkdirTemp("", "hbcri"); err != nil {
		return t, err
	}
	store, err := registry.Open(filepath.Join(t.Work, "images"))
	if err != nil {
		return t, err
	}
	tell("building Hauberk and images")
	if err := own(ctx, t.bin(), "hauberk.dev/test/cri/inside", "hauberk.dev/cmd/containerd-shim-hauberk-v2", "hauberk.dev/cmd/hauberk-guest"); err != nil {
		return t, err
	}
	byDigest, err := makeImages(ctx, store, filepath.Join(t.bin(), "inside"), "/bin/busybox")
	if err != nil {
		return t, err
	}
	edited := suite
	edited.edits = map[string][2]string{"pkg/validate/consts.go": {foreignDigest, byDigest}}
	if t.Suite, err = edited.build(ctx, cache, tell); err != nil || debian {
		return t, err
	}
	t.Containerd, err = containerd.build(ctx, cache, tell)
	return t, err
}

func (t Tools) bin() string { return filepath.Join(t.Work, "bin") }

// Start starts containerd with Hauberk's runtime configured as it is shipped, but
// for texts in it that are replaced.
func (t Tools) Start(ctx context.Context, replace map[string]string) (*Server, error) {
	store, err := registry.Open(filepath.Join(t.Work, "images"))
	if err != nil {
		return nil, err
	}
	name := "deploy/containerd/config-2.toml"
	if t.Containerd == "" {
		name = "deploy/containerd/config.toml"
	}
	shipped, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	for old, changed := range replace {
		if bytes.Count(shipped, []byte(old)) != 1 {
			return nil, fmt.Errorf("change %s: %q is not in it once", name, old)
		}
		shipped = bytes.Replace(shipped, []byte(old), []byte(changed), 1)
	}
	return start(ctx, options{dir: t.Work, programs: t.Containerd, own: t.bin(), shipped: shipped, images: store})
}
