package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestSpread(t *testing.T) {
	var hundred []float64
	for i := range 100 {
		hundred = append(hundred, float64(100-i))
	}
	for _, c := range []struct {
		samples       []float64
		n             int
		p50, p99, max float64
	}{
		{nil, 0, 0, 0, 0},
		{[]float64{7}, 1, 7, 7, 7},
		{[]float64{3, 1, 2}, 3, 2, 3, 3},
		{hundred, 100, 51, 100, 100},
	} {
		f := spread("", "", "", c.samples)
		if f.N != c.n || f.P50 != c.p50 || f.P99 != c.p99 || f.Max != c.max {
			t.Errorf("%d samples: %+v, want %+v", len(c.samples), f, c)
		}
	}
	if hundred[0] != 100 {
		t.Error("spread sorted its caller's samples")
	}
}

func TestCompare(t *testing.T) {
	f, g := spread("ours", "us", "", []float64{30, 40, 50}), spread("theirs", "us", "", []float64{10, 20, 30})
	if d := f.minus(g, "added", ""); d.P50 != 20 || d.Max != 20 || d.Unit != "us" {
		t.Errorf("difference %+v", d)
	}
	if got := f.ratio(g); got != "2.00x of theirs" {
		t.Errorf("ratio %q", got)
	}
	if got := f.ratio(figure{}); got != "nothing to compare with" {
		t.Errorf("ratio to nothing %q", got)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0.00", 1.234: "1.23", -1.234: "-1.23", 12.34: "12.3", -12.34: "-12.3", 123.4: "123"} {
		if got := number(v); got != want {
			t.Errorf("%v is printed %q, want %q", v, got, want)
		}
	}
}

func TestChoose(t *testing.T) {
	if all, err := choose(""); err != nil || len(all) != len(parts) {
		t.Errorf("all: %d parts, %v", len(all), err)
	}
	if two, err := choose("mesh,launch"); err != nil || len(two) != 2 || two[0].name != "mesh" {
		t.Errorf("two: %v, %v", two, err)
	}
	for _, bad := range []string{"meshes", "mesh,", ","} {
		if got, err := choose(bad); err == nil {
			t.Errorf("choose %q gives %v", bad, got)
		}
	}
}

// A figure without its conditions is worth nothing, so a report has both.
func TestPrint(t *testing.T) {
	r := report{Conditions: surroundings(t.Context()), LoadAfter: load(), Figures: []figure{
		spread("many", "ms", "a note", []float64{1, 2, 3}), single("one", "MiB", "", 4)}}
	r.Conditions.Accelerator = "tcg"
	var out bytes.Buffer
	if err := r.print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"date ", "commit ", "processor ", "host kernel ", "tcg", "load average ", "many", "a note", "4.00"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, &out)
		}
	}
	if c := r.Conditions; c.Cores < 1 || c.HostMiB < 1 || c.CPU == "unknown" || c.Load == "unknown" {
		t.Errorf("conditions %+v", c)
	}
}

func TestBeginning(t *testing.T) {
	var b beginning
	for range 3 {
		if n, err := b.Write(make([]byte, 500)); n != 500 || err != nil {
			t.Fatal(n, err)
		}
	}
	if len(b.String()) != beginningBytes {
		t.Errorf("%d bytes were kept", len(b.String()))
	}
}

// A bar is met or missed, or the straight path takes more than it by itself.
func TestWithin(t *testing.T) {
	for _, c := range []struct {
		added, straight figure
		want            string
	}{
		{figure{P50: 200, P99: 501}, figure{P50: 20, P99: 60}, "at most 200 p50: met, 500 p99: MISSED"},
		{figure{P50: 201, P99: -7000}, figure{P50: 20, P99: 9000}, "at most 200 p50: MISSED, 500 p99: cannot be told"},
	} {
		if got := within(c.added, c.straight); got != c.want {
			t.Errorf("%q, not %q", got, c.want)
		}
	}
}
