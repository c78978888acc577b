package oci

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// TestTable compares the table that people read with the one that decides.
func TestTable(t *testing.T) {
	const name, begin, end = "../../docs/oci.md", "<!-- fields -->\n", "<!-- end of fields -->"
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(raw), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", name)
	}
	var b strings.Builder
	b.WriteString("| Field | | |\n|---|---|---|\n")
	for _, f := range fields {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", f.path, f.treatment, f.note)
	}
	golden(t, name, head+begin+b.String()+end+tail)
}

// TestFieldsAreOnce finds a field whose treatment another line decides, and
// parts of what is no field.
func TestFieldsAreOnce(t *testing.T) {
	for i, f := range fields {
		if f.path == "" || !slices.Contains([]treatment{honoured, judged, harmless, refused}, f.treatment) {
			t.Errorf("%q is %q", f.path, f.treatment)
		}
		for _, g := range fields[i+1:] {
			if f.path == g.path || strings.HasPrefix(g.path, f.path+".") || strings.HasPrefix(f.path, g.path+".") {
				t.Errorf("%s and %s are one", f.path, g.path)
			}
		}
	}
	for at := range parts {
		if !slices.ContainsFunc(fields, func(f field) bool { return at == f.path || strings.HasPrefix(at, f.path+".") }) {
			t.Errorf("%s is part of no field", at)
		}
	}
}
