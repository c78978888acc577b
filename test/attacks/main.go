// Command attacks runs the Guard's corpus of attacks and of ordinary acts in
// real guests, three ways on each kernel, and prints what came of each: without
// the Guard, where an attack must work or it proves nothing, with its policy in
// audit mode, and with it enforced. Then it runs real programs of Debian without
// the Guard and under the ready-made policies that fit.
//
//	go run ./test/attacks [-kernels 6.1,6.12] [-o table|json]
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// row is one attack or ordinary act, as the tests of package guard report it.
type row struct {
	Name     string `json:"name"`
	Items    string `json:"items,omitempty"`
	Scenario string `json:"scenario"`
	Benign   bool   `json:"benign,omitempty"`
	Rule     string `json:"rule,omitempty"`
	// Attributed to its process, container, program and policy.
	Attributed bool   `json:"attributed,omitempty"`
	Open       string `json:"open"`
	Audit      string `json:"audit"`
	Enforce    string `json:"enforce"`
}

// realRow is a real program's act under a ready-made policy.
type realRow struct {
	Name    string  `json:"name"`
	Policy  string  `json:"policy"`
	Open    string  `json:"open"`
	Enforce string  `json:"enforce"`
	Seconds float64 `json:"seconds"`
}

type report struct {
	Series string `json:"series"`
	Kernel string `json:"kernel"`
	Rows   []row  `json:"rows"`
	// Reality is what came of real programs.
	Reality []realRow `json:"reality"`
}

func main() {
	kernels := flag.String("kernels", "6.1,6.12", "series of guest kernels")
	output := flag.String("o", "table", "table or json")
	flag.Parse()
	if flag.NArg() > 0 || *output != "table" && *output != "json" {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var reports []report
	failed := false
	for _, series := range strings.Split(*kernels, ",") {
		r, err := run(ctx, series)
		if err != nil {
			fmt.Fprintf(os.Stderr, "attacks: kernel %s: %v\n", series, err)
			failed = true
		}
		reports = append(reports, r)
	}
	if *output == "json" {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		_ = e.Encode(reports)
	} else {
		table(os.Stdout, reports)
	}
	if failed {
		os.Exit(1)
	}
}

// run has the tests of package guard run in one series of kernels. What they
// wrote is given even if they failed.
func run(ctx context.Context, series string) (report, error) {
	r := report{Series: series}
	dir, err := os.MkdirTemp("", "attacks")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	fmt.Fprintf(os.Stderr, "kernel %s: three machines run the corpus, two run real programs …\n", series)
	began := time.Now()
	test := exec.CommandContext(ctx, "go", "test", "-count=1", "-timeout=2h", "-run", "^(TestAttacks|TestReality)$", "./guard")
	test.Env = append(os.Environ(), "HAUBERK_ATTACKS="+dir, "HAUBERK_REALITY=all")
	if series != "6.1" {
		test.Env = append(test.Env, "HAUBERK_TEST_KERNEL="+series)
	}
	test.Cancel = func() error { return test.Process.Signal(os.Interrupt) }
	test.WaitDelay = 10 * time.Second
	test.Stdout, test.Stderr = os.Stderr, os.Stderr
	failed := test.Run()
	fmt.Fprintf(os.Stderr, "kernel %s: %.0f s\n", series, time.Since(began).Seconds())
	for _, part := range []struct {
		name string
		into any
	}{{"corpus.json", &r}, {"reality.json", &r.Reality}} {
		raw, err := os.ReadFile(filepath.Join(dir, part.name))
		if err == nil {
			err = json.Unmarshal(raw, part.into)
		}
		if err != nil {
			return r, fmt.Errorf("no whole report was written: %w (%v)", err, failed)
		}
	}
	if failed != nil {
		return r, fmt.Errorf("some did not end as they must: see FAILS in the table (%w)", failed)
	}
	return r, nil
}

func table(w io.Writer, reports []report) {
	for _, r := range reports {
		fmt.Fprintf(w, "\nkernel %s (%s)\n", r.Series, r.Kernel)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "ATTACK\tITEMS\tPOLICY\tOPEN\tAUDIT\tENFORCE\tRULE")
		for _, x := range r.Rows {
			if !x.Benign {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", x.Name, x.Items, x.Scenario, x.Open, x.Audit, x.Enforce, x.Rule)
			}
		}
		fmt.Fprintln(t, "ORDINARY ACT\t\tPOLICY\tOPEN\tAUDIT\tENFORCE\t")
		for _, x := range r.Rows {
			if x.Benign {
				fmt.Fprintf(t, "%s\t\t%s\t%s\t%s\t%s\t\n", x.Name, x.Scenario, x.Open, x.Audit, x.Enforce)
			}
		}
		fmt.Fprintln(t, "REAL PROGRAM\t\tPOLICY\tOPEN\t\tENFORCE\tSECONDS")
		for _, x := range r.Reality {
			fmt.Fprintf(t, "%s\t\t%s\t%s\t\t%s\t%.1f\n", x.Name, x.Policy, x.Open, x.Enforce, x.Seconds)
		}
		_ = t.Flush()
	}
	fmt.Fprintln(w)
	for _, r := range reports {
		fmt.Fprintln(w, r.totals())
	}
}

func (r report) totals() string {
	var attacks, open, audit, enforce, known, benign, worked, real, ran int
	for _, x := range r.Rows {
		if x.Benign {
			benign++
			worked += one(x.Open != "FAILS" && x.Audit != "FAILS" && x.Enforce != "FAILS")
			continue
		}
		attacks++
		open += one(x.Open == "works")
		audit += one(x.Audit == "reported" || x.Audit == "denied" || x.Audit == "killed")
		enforce += one(x.Enforce == "denied" || x.Enforce == "killed")
		known += one(x.Attributed)
	}
	for _, x := range r.Reality {
		real++
		ran += one(x.Open == "works" && x.Enforce == "works")
	}
	return fmt.Sprintf("kernel %s: %d attacks: %d work without the Guard, %d seen under audit, %d stopped and seen when enforced, %d attributed; %d ordinary acts: %d not hindered; %d acts of real programs: %d not hindered",
		r.Series, attacks, open, audit, enforce, known, benign, worked, real, ran)
}

func one(is bool) int {
	if is {
		return 1
	}
	return 0
}
