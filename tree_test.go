package house_test

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
)

// source is one Go file of the module.
type source struct {
	path string // slash-separated, from the root
	*ast.File
}

func (s source) test() bool { return strings.HasSuffix(s.path, "_test.go") }

// room is the top-level folder, "" for files of the root.
func (s source) room() string {
	room, _, below := strings.Cut(s.path, "/")
	if !below {
		return ""
	}
	return room
}

// tree reads every Go file of the module at the root of fsys, whatever its
// build tags: a check that asks the go command sees one set of tags only, and
// may be answered from the test cache. Nested modules are not part of it.
func tree(fsys fs.FS) (module string, files []source, err error) {
	mod, err := fs.ReadFile(fsys, "go.mod")
	if err != nil {
		return "", nil, err
	}
	line, _, _ := bytes.Cut(mod, []byte("\n"))
	module, ok := strings.CutPrefix(string(line), "module ")
	if !ok {
		return "", nil, fmt.Errorf("read go.mod: first line %q names no module", line)
	}
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return enter(fsys, name)
		case !strings.HasSuffix(name, ".go"):
			return nil
		}
		src, err := fs.ReadFile(fsys, name)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, src, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		files = append(files, source{name, f})
		return nil
	})
	if err == nil && len(files) == 0 {
		err = errors.New("no Go file in the tree")
	}
	return module, files, err
}

// enter says whether a directory belongs to the module.
func enter(fsys fs.FS, dir string) error {
	base := path.Base(dir)
	switch {
	case dir == ".":
		return nil
	case base == "testdata", strings.HasPrefix(base, "."), strings.HasPrefix(base, "_"):
		return fs.SkipDir
	}
	if _, err := fs.Stat(fsys, path.Join(dir, "go.mod")); err == nil {
		return fs.SkipDir
	}
	return nil
}

// planted runs a check over every archive of a folder. The comment of an
// archive lists what the check must find there, one "want: " line each, every
// line part of exactly one finding, and nothing more.
func planted(t *testing.T, folder string, check func(fs.FS) ([]string, error)) {
	t.Helper()
	archives, err := filepath.Glob(filepath.Join("testdata", folder, "*.txtar"))
	if err != nil || len(archives) == 0 {
		t.Fatalf("read %d archives: %v", len(archives), err)
	}
	faults := 0
	for _, name := range archives {
		a, err := txtar.ParseFile(name)
		if err != nil {
			t.Fatal(err)
		}
		want := wanted(string(a.Comment))
		faults += len(want)
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar"), func(t *testing.T) {
			fsys, err := txtar.FS(a)
			if err != nil {
				t.Fatal(err)
			}
			found, err := check(fsys)
			if err != nil {
				found = append(found, err.Error())
			}
			compare(t, found, want)
		})
	}
	if faults == 0 {
		t.Error("no archive plants a fault")
	}
}

func wanted(comment string) (want []string) {
	for line := range strings.Lines(comment) {
		if w, ok := strings.CutPrefix(line, "want: "); ok {
			want = append(want, strings.TrimSpace(w))
		}
	}
	return want
}

func compare(t *testing.T, found, want []string) {
	t.Helper()
	for _, w := range want {
		i := slices.IndexFunc(found, func(f string) bool { return strings.Contains(f, w) })
		if i < 0 {
			t.Errorf("planted and not found: %s", w)
			continue
		}
		found = slices.Delete(found, i, i+1)
	}
	for _, f := range found {
		t.Errorf("found and not planted: %s", f)
	}
}
