package main

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// report is a run.
type report struct {
	Date      string   `json:"date"`
	Cores     int      `json:"coresOfAProxy"`
	Proxies   []string `json:"proxies"`
	Load      string   `json:"loadBefore"`
	LoadAfter string   `json:"loadAfter"`
	Rows      []row    `json:"rows"`
	Idle      []held   `json:"idle"`
}

func (r report) print(out io.Writer) error {
	fmt.Fprintf(out, "%s, a proxy has %d processor, what loads it and answers another; load average %s before, %s after\n", r.Date, r.Cores, r.Load, r.LoadAfter)
	for _, p := range r.Proxies {
		fmt.Fprintln(out, p)
	}
	fmt.Fprintln(out, "added: microseconds more than the straight way has at the same place of its distribution; the straight way's own stand beside it")
	t := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	for _, row := range r.Rows {
		fmt.Fprintf(t, "\n%s, %d KiB, %s\tadded p50\tp99\tp99.9\trequests/s\tCPU us/request\tof nginx's\tn\n", row.Spoken, row.KiB, named(row.Rate))
		var nginx, straight cell
		for _, c := range row.Ways {
			switch c.Name {
			case "nginx":
				nginx = c
			case "straight":
				straight = c
			}
		}
		for _, c := range row.Ways {
			if c.Name == straight.Name {
				fmt.Fprintf(t, "  %s (whole)\t%.0f\t%.0f\t%.0f\t%.0f\t\t\t%d\n", c.Name, c.P50, c.P99, c.P999, c.PerSec, c.Requests)
				continue
			}
			ratio := ""
			if nginx.CPU > 0 {
				ratio = fmt.Sprintf("%.2fx", c.CPU/nginx.CPU)
			}
			fmt.Fprintf(t, "  %s\t%.0f\t%.0f\t%.0f\t%.0f\t%.1f\t%s\t%d\n", c.Name, c.P50-straight.P50, c.P99-straight.P99, c.P999-straight.P999, c.PerSec, c.CPU, ratio, c.Requests)
		}
	}
	fmt.Fprintf(t, "\nmemory\tKiB\tKiB a connection, of %d idle\n", idleConnections)
	for _, h := range r.Idle {
		fmt.Fprintf(t, "  %s\t%d\t%.1f\n", h.Name, h.KiB, h.Connection)
	}
	return t.Flush()
}
