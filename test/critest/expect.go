package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// outcome is how a spec ended.
type outcome string

const (
	passes outcome = "passes"
	fails  outcome = "fails"
	skips  outcome = "skips" // the suite found that the runtime does not offer it
)

// exception is a spec that does not pass, and why.
type exception struct {
	spec    string
	outcome outcome
	runc    outcome // on the same machine, in a list of another runtime
	why     string
}

// readExceptions reads a list: per spec a line "fails: name" or "skips: name",
// then indented "why: reason" and "runc: outcome". Lines that begin with #, and
// empty ones, are for the reader.
func readExceptions(name string) ([]exception, error) {
	raw, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	all, err := parseExceptions(string(raw))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return all, nil
}

func parseExceptions(text string) (all []exception, err error) {
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		key, value, ok := strings.Cut(line, ": ")
		known := true
		switch last := len(all) - 1; {
		case !ok:
			known = false
		case key == string(fails) || key == string(skips):
			all = append(all, exception{spec: value, outcome: outcome(key)})
		case last < 0:
			known = false
		case key == "why" && all[last].why == "":
			all[last].why = value
		case key == "runc" && all[last].runc == "" && slices.Contains([]outcome{passes, fails, skips}, outcome(value)):
			all[last].runc = outcome(value)
		default:
			known = false
		}
		if !known {
			return nil, fmt.Errorf("line %d: %.100q is not understood", n, line)
		}
	}
	seen := map[string]bool{}
	for _, e := range all {
		switch {
		case e.why == "":
			err = errors.Join(err, fmt.Errorf("%q: no reason is given", e.spec))
		case seen[e.spec]:
			err = errors.Join(err, fmt.Errorf("%q: listed twice", e.spec))
		}
		seen[e.spec] = true
	}
	return all, err
}

// result is a spec that ran.
type result struct {
	spec    string
	outcome outcome
	detail  string // of what does not pass
}

// judge lists what did not go as expected. If the run was of the whole suite,
// an exception that names no spec of it is a fault too.
func judge(list []exception, results []result, whole bool) (faults []string) {
	want := map[string]outcome{}
	for _, e := range list {
		want[e.spec] = e.outcome
	}
	for _, r := range results {
		expected, listed := want[r.spec]
		delete(want, r.spec)
		if !listed {
			expected = passes
		}
		if r.outcome != expected {
			faults = append(faults, fmt.Sprintf("%s, but %s was expected: %s", r.outcome, expected, r.spec))
		}
	}
	if whole {
		for _, e := range list {
			if _, left := want[e.spec]; left {
				faults = append(faults, fmt.Sprintf("did not run, but %s was expected: %s", e.outcome, e.spec))
			}
		}
	}
	return faults
}
