package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestLists reads the lists that are checked in: every exception has its
// reason, and what they say of runc is what runc's list says.
func TestLists(t *testing.T) {
	names, err := filepath.Glob("expected-*.txt")
	if err != nil || len(names) < 2 {
		t.Fatalf("found lists %q, %v", names, err)
	}
	for _, name := range names {
		all, err := readExceptions(name)
		if err != nil {
			t.Error(err)
		}
		if strings.Contains(name, "-runc") {
			continue
		}
		runc, err := readExceptions(strings.Replace(name, "hauberk", "runc", 1))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range all {
			want := passes
			if i := slices.IndexFunc(runc, func(r exception) bool { return r.spec == e.spec }); i >= 0 {
				want = runc[i].outcome
			}
			if e.runc != want {
				t.Errorf("%s: %s: says that runc %q, its list says %q", name, e.spec, e.runc, want)
			}
		}
	}
}

func TestParseExceptions(t *testing.T) {
	got, err := parseExceptions("# text\n\nfails: a b: c\n  why: d\n  runc: passes\nskips: e\n  why: f\n")
	want := []exception{{"a b: c", fails, passes, "d"}, {"e", skips, "", "f"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for text, want := range map[string]string{
		"why: x\n":                                   "line 1",
		"fails: a\n":                                 "no reason",
		"fails: a\nwhy: b\nfails: a\nwhy: b\n":       "listed twice",
		"fails: a\nwhy: b\nwhy: c\n":                 "line 3",
		"fails: a\nwhy: b\nrunc: perhaps\n":          "line 3",
		"fails: a\nwhy: b\nrunc: fails\nrunc: fails": "line 4",
		"breaks: a\nwhy: b\n":                        "line 1",
		"fails\n":                                    "line 1",
	} {
		if _, err := parseExceptions(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestJudge(t *testing.T) {
	list := []exception{{spec: "broken", outcome: fails, why: "x"}, {spec: "left out", outcome: skips, why: "x"}}
	for _, c := range []struct {
		name    string
		results []result
		whole   bool
		want    []string
	}{
		{"as expected", []result{{"good", passes, ""}, {"broken", fails, ""}, {"left out", skips, ""}}, true, nil},
		{"a part", []result{{"good", passes, ""}}, false, nil},
		{"unexpected failure", []result{{"good", fails, ""}}, false, []string{"fails, but passes was expected: good"}},
		{"unexpected pass", []result{{"broken", passes, ""}}, false, []string{"passes, but fails was expected: broken"}},
		{"unexpected skip", []result{{"good", skips, ""}}, false, []string{"skips, but passes was expected: good"}},
		{"no such spec", []result{{"broken", fails, ""}}, true, []string{"did not run, but skips was expected: left out"}},
	} {
		if got := judge(list, c.results, c.whole); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestReadReport(t *testing.T) {
	read := func(text string) ([]result, error) {
		name := filepath.Join(t.TempDir(), "report.json")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return readReport(name)
	}
	spec := func(state, message string) string {
		return `{"ContainerHierarchyTexts": ["a", "b"], "LeafNodeType": "It", "LeafNodeText": "` + state + `", "State": "` + state + `", "Failure": {"Message": "` + message + `"}}`
	}
	got, err := read(`[{"SpecReports": [{"LeafNodeType": "BeforeSuite", "State": "passed"}, ` + strings.Join([]string{
		spec("passed", ""), spec("skipped", ""), spec("pending", ""), spec("failed", "x"), spec("timedout", "y"), spec("panicked", "z")}, ",") +
		`, {"ContainerHierarchyTexts": [], "LeafNodeType": "It", "LeafNodeText": "s", "State": "skipped", "Failure": {"Message": "why"}}]}]`)
	want := []result{{"a b passed", passes, ""}, {"a b failed", fails, "failed: x"}, {"a b timedout", fails, "timedout: y"},
		{"a b panicked", fails, "panicked: z"}, {"s", skips, "why"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for name, text := range map[string]string{
		"nothing ran": `[{"SpecReports": [` + spec("skipped", "") + `]}]`,
		"cut short":   `[{"SpecialSuiteFailureReasons": ["Suite Timeout Elapsed"], "SpecReports": [` + spec("passed", "") + `]}]`,
		"setup":       `[{"SpecReports": [{"LeafNodeType": "BeforeSuite", "State": "failed"}, ` + spec("passed", "") + `]}]`,
		"half":        `[{"SpecReports": [`,
	} {
		if _, err := read(text); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
