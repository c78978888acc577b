package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what the test would compare with")

// specs is how many the suite runs, its benchmarks left out.
const specs = 117

// TestDoc keeps the tables of docs/critest.md equal to the lists.
func TestDoc(t *testing.T) {
	const name = "../../docs/critest.md"
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(raw), "<!-- totals -->\n")
	_, after, closed := strings.Cut(rest, "<!-- end of totals -->\n")
	if !ok || !closed {
		t.Fatal("no place for the tables in ", name)
	}
	want := before + "<!-- totals -->\n" + tables(t) + "<!-- end of totals -->\n" + after
	if string(raw) == want {
		return
	}
	if !*update {
		t.Fatalf("%s is not what the lists say: go test ./test/critest -run Doc -update", name)
	}
	if err := os.WriteFile(name, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

func tables(t *testing.T) string {
	var totals, lists strings.Builder
	totals.WriteString("| Runtime | containerd | Specs | Passed | Failed | Skipped by the suite |\n|---|---|--:|--:|--:|--:|\n")
	for _, on := range []struct{ file, containerd string }{{"", "v2.4.2"}, {"-debian", "1.6.20 (Debian)"}} {
		for _, runtime := range []string{"hauberk", "runc"} {
			all, err := readExceptions("expected-" + runtime + on.file + ".txt")
			if err != nil {
				t.Fatal(err)
			}
			count := map[outcome]int{}
			for _, e := range all {
				count[e.outcome]++
			}
			fmt.Fprintf(&totals, "| %s | %s | %d | %d | %d | %d |\n", runtime, on.containerd,
				specs, specs-len(all), count[fails], count[skips])
			if runtime == "hauberk" {
				fmt.Fprintf(&lists, "\n## Not passed on containerd %s\n\n| Spec | Hauberk | runc | Why |\n|---|---|---|---|\n", on.containerd)
				for _, e := range all {
					fmt.Fprintf(&lists, "| %s | %s | %s | %s |\n", strings.TrimPrefix(e.spec, "[k8s.io] "), e.outcome, e.runc, e.why)
				}
			}
		}
	}
	return totals.String() + lists.String()
}
