package shim

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the table in docs/containerd.md")

// TestTable compares the table that people read with the one that decides.
func TestTable(t *testing.T) {
	const name, begin, end = "../docs/containerd.md", "<!-- fields -->\n", "<!-- end of fields -->"
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(raw), begin)
	written, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", name)
	}
	var b strings.Builder
	b.WriteString("| Field | | |\n|---|---|---|\n")
	for _, f := range fields {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", f.path, f.treatment, f.note)
	}
	if *update {
		if err := os.WriteFile(name, []byte(head+begin+b.String()+end+tail), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if written != b.String() {
		t.Errorf("%s is not what the code does: go test ./shim -run Table -update", name)
	}
}

// TestFieldsAreOnce finds a field whose treatment another line decides.
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
}
