// Package stage sets up what tests and measurements of machines need: the programs
// of this tree, an image with Debian's busybox, and a look at what is left
// afterwards.
//
// No program that is shipped links it.
package stage

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"hauberk.dev/internal/kernel"
)

// Missing says why no machine can be made here, or what else is not installed;
// nil if nothing is missing.
func Missing(programs ...string) error {
	if os.Getuid() != 0 {
		return errors.New("machines need root")
	}
	for _, program := range append([]string{"qemu-system-x86_64", Busybox}, programs...) {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("not installed: %w", err)
		}
	}
	if _, err := kernel.Find("/", kernel.Flavour); errors.Is(err, kernel.ErrMissing) {
		return err
	}
	return nil
}

// Build builds programs of this module into a directory: "hauberk-guest" is
// hauberk.dev/cmd/hauberk-guest.
func Build(dir string, programs ...string) error {
	args := []string{"build", "-o", dir + "/"}
	for _, name := range programs {
		args = append(args, "hauberk.dev/cmd/"+name)
	}
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %q: %w: %s", programs, err, out)
	}
	return nil
}

// EndKeeper ends the keepers of a run directory, and what they kept. The shim's
// program does that.
func EndKeeper(shim, run string) error {
	if out, err := exec.Command(shim, "keep", "-end", "-run", run).CombinedOutput(); err != nil {
		return fmt.Errorf("end keeper: %w: %s", err, out)
	}
	return nil
}

// Processes finds processes, but for this one, whose command line holds one of
// these words, and gives their command lines.
func Processes(words ...string) map[int]string {
	found := map[int]string{}
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		raw, err := os.ReadFile(name)
		pid, notOne := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil || notOne != nil || pid == os.Getpid() {
			continue // it has ended
		}
		for _, word := range words {
			if strings.Contains(string(raw), word) {
				found[pid] = strings.ReplaceAll(string(raw), "\x00", " ")
			}
		}
	}
	return found
}
