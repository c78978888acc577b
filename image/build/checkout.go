package build

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"

	"hauberk.dev/evidence"
)

// Checkout says what revision the files in a directory are of, and whether
// they were changed since. The repository is named by whoever knows where the
// sources are published: a clone knows only where it was cloned from.
func Checkout(ctx context.Context, dir, repository, author string) (src evidence.Source, modified bool, err error) {
	rev, err := git(ctx, dir, "rev-parse", "HEAD")
	if err != nil {
		return evidence.Source{}, false, fmt.Errorf("find the revision of %s: %w", dir, err)
	}
	changes, err := git(ctx, dir, "status", "--porcelain", "--untracked-files=normal", "--", ".")
	if err != nil {
		return evidence.Source{}, false, fmt.Errorf("find changes in %s: %w", dir, err)
	}
	return evidence.Source{Repository: repository, Revision: rev, Author: author}, changes != "", nil
}

func git(ctx context.Context, dir string, args ...string) (string, error) {
	// A checkout may belong to another user; reading it runs none of its code
	// as long as its own hooks stay out.
	cmd := exec.CommandContext(ctx, "git", append([]string{"-c", "safe.directory=*", "-c", "core.fsmonitor=false", "-C", dir}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("git %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)), nil
}
