package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"
)

// figure is one measured quantity.
type figure struct {
	Part string  `json:"part"`
	What string  `json:"what"`
	Unit string  `json:"unit"`
	N    int     `json:"n"`
	P50  float64 `json:"p50"`
	P99  float64 `json:"p99"`
	Max  float64 `json:"max"`
	Note string  `json:"note,omitempty"`
}

// spread sums samples up. Of fewer than a hundred the p99 is the slowest.
func spread(what, unit, note string, samples []float64) figure {
	f := figure{What: what, Unit: unit, N: len(samples), Note: note}
	if len(samples) == 0 {
		f.Note = "nothing was measured"
		return f
	}
	s := slices.Sorted(slices.Values(samples))
	at := func(q float64) float64 { return s[min(len(s)-1, int(q*float64(len(s))))] }
	f.P50, f.P99, f.Max = at(.5), at(.99), s[len(s)-1]
	return f
}

func single(what, unit, note string, v float64) figure {
	return spread(what, unit, note, []float64{v})
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
func mib(b uint64) float64       { return float64(b) / (1 << 20) }

// minus is what a adds to b, at the same place of both distributions.
func (f figure) minus(g figure, what, note string) figure {
	return figure{What: what, Unit: f.Unit, N: min(f.N, g.N), P50: f.P50 - g.P50, P99: f.P99 - g.P99, Max: f.Max - g.Max, Note: note}
}

// ratio says how many times g the figure is, by medians.
func (f figure) ratio(g figure) string {
	if g.P50 == 0 {
		return "nothing to compare with"
	}
	return fmt.Sprintf("%.2fx of %s", f.P50/g.P50, g.What)
}

// report is a run.
type report struct {
	Conditions conditions `json:"conditions"`
	LoadAfter  string     `json:"loadAfter"`
	Figures    []figure   `json:"figures"`
}

func (r report) print(w io.Writer) error {
	c := r.Conditions
	guest := "none: no part started a machine"
	if c.GuestKernel != "" {
		guest = fmt.Sprintf("%s, %d MiB, 1 processor, Guard attached", c.GuestKernel, c.GuestMiB)
	}
	for _, line := range [][2]string{
		{"date", c.Date}, {"commit", c.Commit}, {"processor", fmt.Sprintf("%s, %d cores", c.CPU, c.Cores)},
		{"host memory", fmt.Sprintf("%d MiB", c.HostMiB)}, {"host kernel", c.Kernel}, {"QEMU", c.QEMU}, {"accelerator", c.Accelerator},
		{"guest", guest},
		{"rivals", c.Rivals}, {"load average", c.Load + " before, " + r.LoadAfter + " after"},
	} {
		fmt.Fprintf(w, "%-13s %s\n", line[0], line[1])
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	last := ""
	for _, f := range r.Figures {
		if f.Part != last {
			fmt.Fprintf(t, "\n%s\tp50\tp99\tmax\tn\t\t\n", f.Part)
			last = f.Part
		}
		if f.N == 1 {
			fmt.Fprintf(t, "  %s\t%s\t\t\t1\t%s\t%s\n", f.What, number(f.P50), f.Unit, f.Note)
			continue
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%d\t%s\t%s\n", f.What, number(f.P50), number(f.P99), number(f.Max), f.N, f.Unit, f.Note)
	}
	return t.Flush()
}

// number prints three digits that mean something.
func number(v float64) string {
	switch {
	case v >= 100 || v <= -100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10 || v <= -10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
