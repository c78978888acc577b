package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// module is a small module with tests of every outcome.
func module(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	files["go.mod"] = "module m\n\ngo 1.26\n"
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// both runs go test for real, then the sum.
func both(t *testing.T, dir, must string) (shown, summed string, runErr, sumErr error) {
	t.Helper()
	record := t.TempDir()
	f, err := os.Create(filepath.Join(record, "one.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("go", "test", "-json", "./...")
	cmd.Dir = dir
	var show, sum strings.Builder
	runErr = watch(cmd, f, &show, &show)
	mustFile := ""
	if must != "" {
		mustFile = filepath.Join(dir, "must.txt")
		if err := os.WriteFile(mustFile, []byte(must), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	sumErr = total(record, mustFile, &sum)
	return show.String(), sum.String(), runErr, sumErr
}

const good = `package a
import "testing"
func TestGood(t *testing.T) { t.Run("sub", func(t *testing.T) {}) }
func TestSkip(t *testing.T) { t.Skip("no KVM here") }
`

func TestCounts(t *testing.T) {
	dir := module(t, map[string]string{"a/a_test.go": good})
	_, sum, runErr, sumErr := both(t, dir, "m/a TestGood # the one\n\n")
	if runErr != nil || sumErr != nil {
		t.Errorf("%v, %v", runErr, sumErr)
	}
	if !strings.HasSuffix(sum, "\n2 passed, 0 failed, 1 skipped\n") || !strings.Contains(sum, "skipped m/a TestSkip: a_test.go:4: no KVM here") {
		t.Errorf("sum is %q", sum)
	}
}

func TestFailuresAreToldAndCounted(t *testing.T) {
	dir := module(t, map[string]string{
		"a/a_test.go": good,
		"b/b_test.go": "package b\nimport \"testing\"\nfunc TestBad(t *testing.T) { t.Error(\"the reason\") }\n",
		"c/c_test.go": "package c\nimport \"testing\"\nfunc TestC(t *testing.T) { undefined() }\n",
		"d/d_test.go": "package d\nimport (\"testing\"; \"os\")\nfunc TestMain(m *testing.M) { os.Exit(3) }\n",
	})
	show, sum, runErr, sumErr := both(t, dir, "")
	if runErr == nil || sumErr == nil {
		t.Errorf("%v, %v", runErr, sumErr)
	}
	for _, want := range []string{"the reason", "undefined: undefined", "fail m/b", "pass m/a"} {
		if !strings.Contains(show, want) {
			t.Errorf("%q is not told: %q", want, show)
		}
	}
	if !strings.HasSuffix(sum, "\n2 passed, 3 failed, 1 skipped\n") {
		t.Errorf("sum is %q", sum)
	}
}

func TestMust(t *testing.T) {
	dir := module(t, map[string]string{"a/a_test.go": good})
	for must, want := range map[string]string{
		"m/a TestSkip":            "it is skip",
		"m/a TestGone":            "it is absent",
		"m/a":                     `is not "package test"`,
		"# nothing but a comment": "names no test",
	} {
		if _, _, _, err := both(t, dir, must); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("must %q: %v", must, err)
		}
	}
}

func TestNothingRan(t *testing.T) {
	record := t.TempDir()
	var out strings.Builder
	if err := total(record, "", &out); err == nil || !strings.HasSuffix(out.String(), "\n0 passed, 0 failed, 0 skipped\n") {
		t.Errorf("%v, %q", err, &out)
	}
	if err := run([]string{"-record", record}, &out, &out); err == nil {
		t.Error("no command, no error")
	}
}
