// Package kernel turns an installed Linux kernel package into what a sandbox
// boots: the uncompressed kernel, its type information, the modules it needs
// in loading order, and an initramfs around the guest agent.
//
// It trusts the package manager for the content of /boot and /lib/modules, but
// not for its shape: every size read from a file is bounded. It boots nothing.
package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Flavour is the kernel a sandbox boots: Debian's build for virtual machines,
// which has BPF LSM, type information and the virtio drivers.
const Flavour = "cloud-amd64"

// Package is the package to install for it.
const Package = "linux-image-" + Flavour

// standardSeries is what Package stands for on Debian 12, and what a flavour
// that names no series means where it is installed.
const standardSeries = "6.1"

// Series gives the flavour of one series of kernels, such as 6.12: what to ask
// Find for, and the end of the name of Debian's package.
func Series(series, flavour string) string { return series + "-" + flavour }

// splitSeries takes the series off a flavour that Series made.
func splitSeries(flavour string) (series, rest string) {
	if before, after, ok := strings.Cut(flavour, "-"); ok && before != "" && strings.Trim(before, "0123456789.") == "" {
		return before, after
	}
	return "", flavour
}

// ErrMissing says that no kernel of the flavour is installed.
var ErrMissing = errors.New("no kernel of the flavour is installed")

// Installed is a kernel package on disk.
type Installed struct {
	Release string // as in 6.1.0-56-cloud-amd64
	Image   string // path of the compressed kernel
	Modules string // folder that holds modules.dep
}

// Find returns the newest installed kernel of a flavour below root, which is
// "/" but in tests. A flavour without a series means the newest of Debian 12's
// own, or of any other where that is not installed: installing another series
// changes nothing for who did not ask for it. A kernel without its modules does
// not count.
func Find(root, flavour string) (Installed, error) {
	series, plain := splitSeries(flavour)
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*-"+plain))
	if err != nil {
		return Installed{}, fmt.Errorf("find kernel %q: %w", flavour, err)
	}
	var found []Installed
	for _, image := range images {
		release := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
		if series != "" && !strings.HasPrefix(release, series+".") {
			continue
		}
		modules := filepath.Join(root, "lib", "modules", release)
		if _, err := os.Stat(filepath.Join(modules, "modules.dep")); err != nil {
			continue
		}
		found = append(found, Installed{Release: release, Image: image, Modules: modules})
	}
	if len(found) == 0 {
		return Installed{}, fmt.Errorf("find kernel %s below %s: %w: apt-get install linux-image-%s",
			flavour, path.Join(root, "boot"), ErrMissing, flavour)
	}
	return slices.MaxFunc(found, func(a, b Installed) int {
		if x, y := standard(a), standard(b); series == "" && x != y {
			return x - y
		}
		return compareReleases(a.Release, b.Release)
	}), nil
}

// standard is 1 for a kernel of the standard series.
func standard(k Installed) int {
	if strings.HasPrefix(k.Release, standardSeries+".") {
		return 1
	}
	return 0
}

// At returns the installed kernel of an image below root, such as
// /boot/vmlinuz-6.1.0-1-cloud-amd64.
func At(root, image string) (Installed, error) {
	release, ok := strings.CutPrefix(filepath.Base(image), "vmlinuz-")
	if !ok || release == "" {
		return Installed{}, fmt.Errorf("find kernel %q: want the path of an installed kernel, such as /boot/vmlinuz-6.1.0-1-cloud-amd64", image)
	}
	return Installed{Release: release, Image: image, Modules: filepath.Join(root, "lib", "modules", release)}, nil
}

// compareReleases orders kernel releases by the numbers in them, so that
// 6.1.0-9 comes before 6.1.0-56.
func compareReleases(a, b string) int {
	x, y := numbers(a), numbers(b)
	if c := slices.Compare(x, y); c != 0 {
		return c
	}
	return strings.Compare(a, b)
}

func numbers(s string) (out []uint64) {
	for _, f := range strings.FieldsFunc(s, func(r rune) bool { return r < '0' || r > '9' }) {
		n, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			continue // longer than any real version number
		}
		out = append(out, n)
	}
	return out
}

// readBounded reads a regular file of at most limit bytes.
func readBounded(name string, limit int64) ([]byte, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("not a regular file")}
	}
	if fi.Size() > limit {
		return nil, &fs.PathError{Op: "read", Path: name, Err: fmt.Errorf("%d bytes, at most %d are read", fi.Size(), limit)}
	}
	return os.ReadFile(name)
}
