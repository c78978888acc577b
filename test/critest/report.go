package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
)

// suiteReport is the part of ginkgo's report that is read here.
type suiteReport struct {
	SpecialSuiteFailureReasons []string
	SpecReports                []struct {
		ContainerHierarchyTexts []string
		LeafNodeType            string
		LeafNodeText            string
		State                   string
		Failure                 struct{ Message string }
	}
}

// readReport returns what became of every spec that was selected. A suite that
// was cut short, or ran nothing, is an error.
func readReport(name string) (results []result, err error) {
	raw, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var suites []suiteReport
	if err := json.Unmarshal(raw, &suites); err != nil {
		return nil, fmt.Errorf("read report: %w", err)
	}
	for _, suite := range suites {
		for _, why := range suite.SpecialSuiteFailureReasons {
			if !strings.Contains(why, "Detected Programmatic Focus") {
				err = errors.Join(err, errors.New(why))
			}
		}
		for _, s := range suite.SpecReports {
			spec := strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")
			switch {
			case s.LeafNodeType != "It" && s.State != "passed":
				err = errors.Join(err, fmt.Errorf("%s %s: %s", s.LeafNodeType, s.State, s.Failure.Message))
			case s.LeafNodeType != "It":
			case s.State == "passed":
				results = append(results, result{spec, passes, ""})
			case s.State == "skipped" && s.Failure.Message == "", s.State == "pending":
				// Not selected.
			case s.State == "skipped":
				results = append(results, result{spec, skips, s.Failure.Message})
			default:
				results = append(results, result{spec, fails, s.State + ": " + s.Failure.Message})
			}
		}
	}
	if err == nil && len(results) == 0 {
		err = errors.New("no spec was run")
	}
	return results, err
}
