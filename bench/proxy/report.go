package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"hauberk.dev/bench/stages"
)

// report is a run.
type report struct {
	Date       string   `json:"date"`
	Cores      int      `json:"coresOfAProxy"`
	Processors int      `json:"processors"` // of the machine
	Shared     bool     `json:"shared"`     // what loads is on those of the proxies
	Proxies    []string `json:"proxies"`
	Load       string   `json:"loadBefore"`
	LoadAfter  string   `json:"loadAfter"`
	Rows       []row    `json:"rows"`
	Idle       []held   `json:"idle"`
	Faults     []string `json:"faults,omitempty"` // what was not measured, and why

	Costs []stages.Cost `json:"costs,omitempty"`
}

// reports are those of all counts of processors.
type reports []report

func (all reports) write(out io.Writer) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(all)
}

func (all reports) print(out io.Writer) error {
	for i, r := range all {
		if i > 0 {
			fmt.Fprintln(out)
		}
		if err := r.print(out); err != nil {
			return err
		}
	}
	return nil
}

// fault is nil if all was measured.
func (all reports) fault() error {
	n := 0
	for _, r := range all {
		n += len(r.Faults)
	}
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%d faults, which the tables name", n)
}

func (r report) print(out io.Writer) error {
	apart := "what loads it and answers has the others"
	if r.Shared {
		apart = "what loads it and answers shares them"
	}
	fmt.Fprintf(out, "%s, a proxy has %d of %d processors, %s; load average %s before, %s after\n", r.Date, r.Cores, r.Processors, apart, r.Load, r.LoadAfter)
	for _, c := range r.Costs {
		fmt.Fprintln(out)
		if err := c.Print(out); err != nil {
			return err
		}
	}
	for _, f := range r.Faults {
		fmt.Fprintln(out, "not measured:", f)
	}
	if len(r.Rows) == 0 {
		return nil
	}
	for _, p := range r.Proxies {
		fmt.Fprintln(out, p)
	}
	fmt.Fprintln(out, "added: microseconds more than the straight way has at the same place of its distribution; the straight way's own stand beside it")
	fmt.Fprintln(out, "(x): times that of nginx, or of HAProxy where nginx speaks none of it; no ratio of what is within a microsecond of nothing")
	t := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	for _, row := range r.Rows {
		row.print(t)
	}
	fmt.Fprint(t, "\nmemory\tKiB\tKiB a connection\tidle connections\n")
	for _, h := range r.Idle {
		fmt.Fprintf(t, "  %s\t%d\t%.1f\t%d\n", h.Name, h.KiB, h.Connection, h.Idle)
	}
	fmt.Fprint(t, "\nasked of hauberk-mesh\tat most\tmeasured\n")
	for _, b := range bars {
		fmt.Fprintf(t, "  %s\t%g\t%s\n", b.what, b.most, b.judge(r))
	}
	return t.Flush()
}

// bar is what is asked of hauberk-mesh, in one row.
type bar struct {
	what   string
	row    part
	figure int  // of those that a cell has beside another
	ofIt   bool // as times that of nginx, in place of milliseconds
	most   float64
}

// bars are those that this program can see. The hop through both sides of the mesh
// is measured by scripts/bench -only mesh.
var bars = []bar{
	{"added with mutual TLS, 1 KiB, 1000/s, p50, ms", part{"mtls", 1, 1000}, 0, false, 0.2},
	{"the same, p99, ms", part{"mtls", 1, 1000}, 1, false, 0.5},
	{"processor time of a request, HTTP/1, 1 KiB, times nginx's", part{"http", 1, 0}, 4, true, 1.2},
	{"the same with mutual TLS", part{"mtls", 1, 0}, 4, true, 1.2},
}

func (b bar) judge(r report) string {
	i := slices.IndexFunc(r.Rows, func(r row) bool { return part{r.Spoken, r.KiB, r.Rate} == b.row })
	if i < 0 {
		return "was not asked"
	}
	straight, _ := r.Rows[i].named("straight")
	ours, _ := r.Rows[i].named("hauberk-mesh")
	v, seen := ours.beside(straight)[b.figure]/1000, ours.measured() && straight.measured()
	if b.ofIt {
		nginx, _ := r.Rows[i].named("nginx")
		v, seen = ours.CPU/nginx.CPU, ours.measured() && nginx.measured() && nginx.CPU > 0
	}
	whole := straight.beside(cell{})[b.figure] / 1000
	switch {
	case !seen:
		return "was not measured"
	case !b.ofIt && whole > b.most:
		return fmt.Sprintf("cannot be told: %.3f without a proxy", whole) // something else was at work
	case v <= b.most:
		return fmt.Sprintf("%.3f: met", v)
	}
	return fmt.Sprintf("%.3f: MISSED", v)
}

func (r row) print(t io.Writer) {
	straight, there := r.named("straight")
	there = there && straight.Fault == ""
	rival, found := r.named("nginx")
	if !found || rival.Fault != "" {
		rival, found = r.named("HAProxy")
	}
	found = found && rival.Fault == ""
	fmt.Fprintf(t, "\n%s, %d KiB, %s\tadded p50\t\tp99\t\tp99.9\t\trequests/s\t\tCPU us/request\t\tn\n", r.Spoken, r.KiB, named(r.Rate))
	for _, c := range r.Ways {
		if c.Fault == "" && !there {
			c.Fault = "nothing to subtract: straight failed"
		}
		if c.Fault != "" {
			fmt.Fprintf(t, "  %s\tnot measured: %s\n", c.Name, strings.ReplaceAll(c.Fault, "\n", "; "))
			continue
		}
		if c.Name == straight.Name {
			fmt.Fprintf(t, "  %s (whole)\t%.0f\t\t%.0f\t\t%.0f\t\t%.0f\t\t\t\t%d\n", c.Name, c.P50, c.P99, c.P999, c.PerSec, c.Requests)
			continue
		}
		mine, its := c.beside(straight), rival.beside(straight)
		if !found {
			its = [5]float64{}
		}
		fmt.Fprintf(t, "  %s", c.Name)
		for i, form := range []string{"%.0f", "%.0f", "%.0f", "%.0f", "%.1f"} {
			fmt.Fprintf(t, "\t"+form+"\t%s", mine[i], ratio(mine[i], its[i]))
		}
		fmt.Fprintf(t, "\t%d\n", c.Requests)
	}
}

func (r row) named(name string) (cell, bool) {
	i := slices.IndexFunc(r.Ways, func(c cell) bool { return c.Name == name })
	if i < 0 {
		return cell{}, false
	}
	return r.Ways[i], true
}

func (c cell) measured() bool { return c.Fault == "" && c.Requests > 0 }

// beside is what a way adds to the straight one, the requests and what one costs.
func (c cell) beside(straight cell) [5]float64 {
	return [5]float64{c.P50 - straight.P50, c.P99 - straight.P99, c.P999 - straight.P999, c.PerSec, c.CPU}
}

// ratio says nothing of figures too small to divide.
func ratio(mine, its float64) string {
	if mine < 1 || its < 1 {
		return ""
	}
	return fmt.Sprintf("(%.2fx)", mine/its)
}
