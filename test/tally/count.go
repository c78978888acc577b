package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// event is a line of go test -json, as cmd/test2json documents it.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build output
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

type test struct{ pkg, name string }

// count is what became of every test.
type count struct {
	told   io.Writer // hears of each package; nil while a record is read
	result map[test]string
	output map[test]*strings.Builder
	builds map[string]*strings.Builder
	broken []string // packages that failed without a failed test
}

func newCount() *count {
	return &count{result: map[test]string{}, output: map[test]*strings.Builder{}, builds: map[string]*strings.Builder{}}
}

func (c *count) read(r io.Reader) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if strings.HasPrefix(line, "{") {
			var e event
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				return fmt.Errorf("read event: %w: %.200q", err, line)
			}
			c.event(e)
		} else if c.told != nil {
			io.WriteString(c.told, line)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (c *count) event(e event) {
	t := test{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		keep(c.builds, e.ImportPath, e.Output)
	case "output":
		keep(c.output, t, e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			c.packageEnds(e)
			return
		}
		c.result[t] = e.Action
		if e.Action == "pass" {
			delete(c.output, t)
		}
	}
}

// keep gathers output, up to what a person would read.
func keep[K comparable](m map[K]*strings.Builder, k K, text string) {
	if m[k] == nil {
		m[k] = &strings.Builder{}
	}
	if m[k].Len() < 64<<10 {
		m[k].WriteString(text)
	}
}

func (c *count) packageEnds(e event) {
	if e.Action == "fail" && !c.hasFailed(e.Package) {
		c.broken = append(c.broken, e.Package)
	}
	if c.told == nil {
		return
	}
	fmt.Fprintf(c.told, "%-4s %s %.1fs\n", e.Action, e.Package, e.Elapsed)
	if e.Action != "fail" {
		return
	}
	for t, out := range c.output {
		if t.pkg == e.Package && (t.name == "" || c.result[t] != "skip") {
			fmt.Fprint(c.told, out)
		}
	}
	if out := c.builds[e.FailedBuild]; out != nil {
		fmt.Fprint(c.told, out)
	}
}

func (c *count) hasFailed(pkg string) bool {
	for t, r := range c.result {
		if t.pkg == pkg && r == "fail" {
			return true
		}
	}
	return false
}

// report prints what was skipped and why, what failed, what must have run and
// did not, and last the line that counts.
func (c *count) report(w io.Writer, required []test) error {
	var errs []error
	n := map[string]int{}
	var names []test
	for t := range c.result {
		names = append(names, t)
	}
	slices.SortFunc(names, func(a, b test) int { return strings.Compare(a.pkg+a.name, b.pkg+b.name) })
	for _, t := range names {
		r := c.result[t]
		n[r]++
		if r == "skip" {
			fmt.Fprintf(w, "skipped %s %s: %s\n", t.pkg, t.name, c.reason(t))
		}
		if r == "fail" {
			fmt.Fprintf(w, "failed %s %s\n", t.pkg, t.name)
		}
	}
	for _, p := range c.broken {
		fmt.Fprintf(w, "failed %s: before or after its tests\n", p)
	}
	for _, t := range required {
		if got := c.result[t]; got != "pass" {
			switch got {
			case "": // never ran
				got = "absent"
				n["fail"]++
			case "skip":
				n["fail"]++
			}
			errs = append(errs, fmt.Errorf("%s %s must pass: it is %s: %w", t.pkg, t.name, got, errFailed))
		}
	}
	failed := n["fail"] + len(c.broken)
	if failed > 0 {
		errs = append(errs, errFailed)
	}
	if n["pass"] == 0 {
		errs = append(errs, fmt.Errorf("no test passed: %w", errFailed))
	}
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(w, err)
	}
	fmt.Fprintf(w, "%d passed, %d failed, %d skipped\n", n["pass"], failed, n["skip"])
	return errors.Join(errs...)
}

// reason is what a test said when it was skipped.
func (c *count) reason(t test) string {
	if c.output[t] == nil {
		return "no reason given"
	}
	var said []string
	for line := range strings.Lines(c.output[t].String()) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "===") && !strings.HasPrefix(line, "---") {
			said = append(said, line)
		}
	}
	return strings.Join(said, " ")
}

// readMust reads "package test" lines; # begins a comment.
func readMust(name string) (list []test, err error) {
	raw, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(raw)) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) != 2 {
			return nil, fmt.Errorf("read %s: %q is not \"package test\"", name, strings.TrimSpace(line))
		}
		list = append(list, test{f[0], f[1]})
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("read %s: it names no test", name)
	}
	return list, nil
}
