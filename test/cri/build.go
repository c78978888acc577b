package cri

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// module is a release of a Go module whose programs are wanted.
type module struct {
	path, version string
	programs      []string             // packages, such as ./cmd/ctr
	tests         []string             // packages whose tests are wanted as a program
	edits         map[string][2]string // by file: a text that occurs once, and what it becomes
}

// The modules of the validation suite and of the containerd it is run on.
var (
	suite      = module{path: "sigs.k8s.io/cri-tools", version: "v1.36.0", programs: []string{"./cmd/crictl"}, tests: []string{"./cmd/critest"}}
	containerd = module{path: "github.com/containerd/containerd/v2", version: "v2.4.2",
		programs: []string{"./cmd/containerd", "./cmd/ctr", "./cmd/containerd-shim-runc-v2"}}
)

// build builds a module's programs from a copy of what the module proxy has,
// and returns the directory with them: a folder of cache, made once for each
// version, edit and version of Go.
func (m module) build(ctx context.Context, cache string, tell func(string, ...any)) (string, error) {
	goVersion, err := command(ctx, "", "go", "env", "GOVERSION")
	if err != nil {
		return "", fmt.Errorf("build %s: %w", m.path, err)
	}
	key, err := json.Marshal([]any{m.programs, m.tests, m.edits, strings.TrimSpace(string(goVersion))})
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, fmt.Sprintf("%s-%s-%.6x", filepath.Base(strings.TrimSuffix(m.path, "/v2")), m.version, sha256.Sum256(key)))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	tell("building %s@%s, some minutes once", m.path, m.version)
	if err := m.make(ctx, cache, dir); err != nil {
		return "", fmt.Errorf("build %s@%s: %w", m.path, m.version, err)
	}
	return dir, nil
}

func (m module) make(ctx context.Context, cache, dir string) error {
	raw, err := command(ctx, os.TempDir(), "go", "mod", "download", "-json", m.path+"@"+m.version)
	if err != nil {
		return err
	}
	var got struct{ Dir string }
	if err := json.Unmarshal(raw, &got); err != nil {
		return err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp(cache, ".building-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	source, programs := filepath.Join(work, "source"), filepath.Join(work, "programs")
	if err := errors.Join(os.Mkdir(programs, 0o755), copyTree(got.Dir, source), m.edit(source)); err != nil {
		return err
	}
	if _, err := command(ctx, source, "go", append([]string{"build", "-o", programs + "/"}, m.programs...)...); err != nil {
		return err
	}
	for _, t := range m.tests {
		if _, err := command(ctx, source, "go", "test", "-c", "-o", filepath.Join(programs, filepath.Base(t)), t); err != nil {
			return err
		}
	}
	return os.Rename(programs, dir)
}

func (m module) edit(source string) error {
	for name, change := range m.edits {
		name = filepath.Join(source, name)
		raw, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if n := bytes.Count(raw, []byte(change[0])); n != 1 {
			return fmt.Errorf("edit %s: %q occurs %d times, want once", name, change[0], n)
		}
		if err := os.WriteFile(name, bytes.Replace(raw, []byte(change[0]), []byte(change[1]), 1), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// copyTree copies regular files; a module has no others.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		raw, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), raw, 0o644)
	})
}

// own builds programs of this tree into dir.
func own(ctx context.Context, dir string, packages ...string) error {
	if _, err := command(ctx, "", "go", append([]string{"build", "-o", dir + "/"}, packages...)...); err != nil {
		return fmt.Errorf("build %s: %w", strings.Join(packages, " "), err)
	}
	return nil
}

// command runs a program and returns its output; its error holds the end of
// what it said.
func command(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off")
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(said.String())
		return out.Bytes(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, text[max(0, len(text)-2000):])
	}
	return out.Bytes(), nil
}
