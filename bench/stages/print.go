package stages

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"
)

// Cost is what one request costs, and how that divides.
type Cost struct {
	What     string        `json:"what"`
	Each     time.Duration `json:"nanosecondsARequest"` // by the scheduler's count
	Requests int           `json:"requests"`
	Shares   []Share       `json:"shares"`
}

// Print writes one table: the share of each stage, and that share of what a request
// costs.
func (c Cost) Print(out io.Writer) error {
	sum, samples := Sum(c.Shares)
	t := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(out, "%s: %.1f us of processor time a request, %d requests, %d samples\n", c.What, us(c.Each), c.Requests, samples)
	fmt.Fprint(t, "share\tus/request\tsamples\t  stage\n")
	for _, s := range c.Shares {
		part := float64(s.Time) / float64(max(sum, 1))
		fmt.Fprintf(t, "%.1f%%\t%.2f\t%d\t  %s\n", 100*part, part*us(c.Each), s.Samples, s.Stage)
	}
	return t.Flush()
}

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
