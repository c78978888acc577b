package house_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"
	"testing"
)

// maxArchitecture is how many lines a drawing and its legend may take.
const maxArchitecture = 120

var (
	namedTest = regexp.MustCompile("`([a-z0-9./-]+)\\.((?:Test|Fuzz)[A-Za-z0-9_]+)`")
	link      = regexp.MustCompile(`\]\(([^)#:]+)\)`)
)

func TestPapers(t *testing.T) {
	findings, err := papers(os.DirFS("."))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		t.Error(f)
	}
}

func TestPapersFindPlantedFaults(t *testing.T) { planted(t, "papers", papers) }

// papers lists what the documents say of the tree and is not so: promises whose
// test does not exist, links that lead nowhere, a drawing grown into a book.
func papers(fsys fs.FS) (findings []string, err error) {
	module, files, err := tree(fsys)
	if err != nil {
		return nil, err
	}
	tests := map[string]bool{}
	for _, f := range files {
		for _, name := range testsOf(f) {
			tests[path.Join(module, path.Dir(f.path))+"."+name] = true
		}
	}
	for i, name := range []string{"THREATS.md", "docs/guard.md", "docs/guard-beside.md"} {
		raw, err := fs.ReadFile(fsys, name)
		if errors.Is(err, fs.ErrNotExist) && i > 0 {
			continue
		}
		if err != nil {
			return nil, err
		}
		named := namedTest.FindAllStringSubmatch(string(raw), -1)
		if len(named) == 0 {
			return nil, errors.New(name + " names no test")
		}
		for _, n := range named {
			pkg := module
			if n[1] != module {
				pkg = path.Join(module, n[1])
			}
			if !tests[pkg+"."+n[2]] {
				findings = append(findings, fmt.Sprintf("%s names %s.%s, which is no test", name, n[1], n[2]))
			}
		}
	}
	more, err := documents(fsys)
	return append(findings, more...), err
}

// testsOf lists the tests a file declares.
func testsOf(f source) (names []string) {
	if !f.test() {
		return nil
	}
	for _, d := range f.Decls {
		if name, ok := function(d); ok && (strings.HasPrefix(name, "Test") || strings.HasPrefix(name, "Fuzz")) {
			names = append(names, name)
		}
	}
	return names
}

// documents checks every Markdown file of the tree.
func documents(fsys fs.FS) (findings []string, err error) {
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return enter(fsys, name)
		case !strings.HasSuffix(name, ".md"):
			return nil
		}
		text, err := fs.ReadFile(fsys, name)
		if err != nil {
			return err
		}
		for _, l := range link.FindAllStringSubmatch(string(text), -1) {
			if _, err := fs.Stat(fsys, path.Join(path.Dir(name), l[1])); err != nil {
				findings = append(findings, fmt.Sprintf("%s links to %s, which is not there", name, l[1]))
			}
		}
		if n := strings.Count(string(text), "\n"); name == "ARCHITECTURE.md" && n >= maxArchitecture {
			findings = append(findings, fmt.Sprintf("ARCHITECTURE.md has %d lines: below %d", n, maxArchitecture))
		}
		return nil
	})
	return findings, err
}
