package house_test

import (
	"fmt"
	"go/ast"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
)

// refused are names under which anything could be kept.
var refused = strings.Fields("util utils common helper helpers base types manager misc core lib shared pkg stuff tools")

func TestWords(t *testing.T) {
	findings, err := words(os.DirFS("."))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		t.Error(f)
	}
}

func TestWordsFindPlantedFaults(t *testing.T) { planted(t, "words", words) }

// words lists packages without exactly one comment, names that say nothing,
// and code that runs before main: an init function starts what no list names.
func words(fsys fs.FS) (findings []string, err error) {
	_, files, err := tree(fsys)
	if err != nil {
		return nil, err
	}
	packages := map[string][]source{}
	for _, f := range files {
		if f.test() {
			continue
		}
		dir := path.Dir(f.path)
		packages[dir] = append(packages[dir], f)
		findings = append(findings, starts(f)...)
	}
	for dir, pkg := range packages {
		findings = append(findings, comments(dir, pkg)...)
		for _, name := range []string{path.Base(dir), pkg[0].Name.Name} {
			if slices.Contains(refused, name) {
				findings = append(findings, fmt.Sprintf("%s: %q says nothing about what is inside", dir, name))
				break
			}
		}
	}
	return findings, nil
}

// comments finds a package whose comment is missing, doubled or empty words.
func comments(dir string, pkg []source) (findings []string) {
	var with []source
	for _, f := range pkg {
		if f.Doc != nil {
			with = append(with, f)
		}
	}
	if len(with) != 1 {
		return []string{fmt.Sprintf("%s: %d package comments, want one", dir, len(with))}
	}
	doc, name := with[0].Doc.Text(), with[0].Name.Name
	opening := "Package " + name + " "
	if name == "main" {
		opening = "Command " + path.Base(dir) + " "
	}
	if !strings.HasPrefix(doc, opening) {
		findings = append(findings, fmt.Sprintf("%s: the package comment must begin with %q", dir, opening))
	}
	if len(strings.Fields(doc)) < 8 {
		findings = append(findings, fmt.Sprintf("%s: the package comment does not say what for", dir))
	}
	return findings
}

func starts(f source) (findings []string) {
	if generated(f) {
		return nil
	}
	for _, d := range f.Decls {
		if name, ok := function(d); ok && name == "init" {
			findings = append(findings, f.path+": func init runs before anybody asked")
		}
	}
	return findings
}

// function is the name of a declaration that is a function and no method.
func function(d ast.Decl) (name string, ok bool) {
	fn, ok := d.(*ast.FuncDecl)
	if !ok || fn.Recv != nil {
		return "", false
	}
	return fn.Name.Name, true
}

func generated(f source) bool { return ast.IsGenerated(f.File) }
