package guard

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestEveryItemIsAttacked holds docs/guard.md to what it says: every item that
// it claims the corpus attacks is one of an attack, and every attack's item is
// in the document.
func TestEveryItemIsAttacked(t *testing.T) {
	attacked := map[string]bool{}
	for _, s := range scenarios() {
		for _, a := range slices.Concat(s.attacks, s.spoils) {
			if a.items == "" {
				t.Errorf("%s of %s is an instance of nothing", a.run, s.name)
			}
			for item := range strings.FieldsSeq(a.items) {
				attacked[item] = true
			}
		}
	}
	raw, err := os.ReadFile("../docs/guard.md")
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\| ([BP]\d+) \|.*\| ([^|]*) \|$`).FindAllStringSubmatch(string(raw), -1) {
		told[m[1]] = true
		if strings.Contains(m[2], "corpus") && !attacked[m[1]] {
			t.Errorf("docs/guard.md: %s is attacked by nothing in the corpus", m[1])
		}
	}
	for _, kind := range []struct {
		letter string
		n      int
	}{{"P", 9}, {"B", 26}} {
		for i := range kind.n {
			if item := fmt.Sprint(kind.letter, i+1); !told[item] {
				t.Errorf("docs/guard.md does not say who attacks %s", item)
			}
		}
	}
	for item := range attacked {
		if item[0] != 'T' && !told[item] {
			t.Errorf("docs/guard.md does not know %s, of which the corpus has attacks", item)
		}
	}
}
