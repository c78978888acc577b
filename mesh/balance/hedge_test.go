package balance

import (
	"strings"
	"testing"
	"time"
)

func TestHedgeChecked(t *testing.T) {
	h, err := Hedge{After: time.Second}.Checked()
	if err != nil || h.Tries != 2 || h.Percent != 10 {
		t.Errorf("%+v, %v", h, err)
	}
	for want, h := range map[string]Hedge{
		"neither a time nor a percentile": {},
		"percentile 20;":                  {Percentile: 20},
		"percentile 100;":                 {Percentile: 100},
		"9 tries at once":                 {After: 1, Tries: 9},
		"1 tries at once":                 {After: 1, Tries: 1},
		"-1ns":                            {After: -1},
		"999 second tries":                {After: 1, Percent: 999},
	} {
		if _, err := h.Checked(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, not %q", h, err, want)
		}
	}
}

// TestHedgerRoom lets one request in ten be tried twice, and no more than ten come
// together.
func TestHedgerRoom(t *testing.T) {
	h, _ := Hedge{After: time.Second}.Checked()
	x := NewHedger(*h)
	again := 0
	for range 1000 {
		if d, ok := x.Wait(0); d != time.Second || !ok {
			t.Fatalf("%v %v", d, ok)
		}
		if x.Again() {
			again++
		}
	}
	if again < 100 || again > 101 {
		t.Errorf("%d of 1000 were tried twice", again)
	}
	for range 1000 {
		x.Wait(0)
	}
	for again = 0; x.Again(); again++ {
	}
	if again != hedgeBurst {
		t.Errorf("%d at once", again)
	}
}

func TestHedgerPercentile(t *testing.T) {
	h, _ := Hedge{Percentile: 95}.Checked()
	x := NewHedger(*h)
	now := Time(time.Hour)
	for i := range 99 {
		x.Took(now, time.Duration(i+1)*time.Millisecond)
	}
	if d, ok := x.Wait(now); ok {
		t.Errorf("%v is known of 99 answers", d)
	}
	x.Took(now, 100*time.Millisecond)
	near := func(d time.Duration, ok bool, want time.Duration) {
		t.Helper()
		if !ok || d < want || d > want*9/8 {
			t.Errorf("%v %v, not about %v", d, ok, want)
		}
	}
	d, ok := x.Wait(now)
	near(d, ok, 95*time.Millisecond)
	// Others take their place, a window after the other.
	for range 3 {
		now = now.Add(latencyWindow)
		for range 128 {
			x.Took(now, 2*time.Second)
		}
	}
	d, ok = x.Wait(now)
	near(d, ok, 2*time.Second)
	// What is old is not known any more.
	if d, ok := x.Wait(now.Add(3 * latencyWindow)); ok {
		t.Errorf("%v is known of nothing", d)
	}
	h.After = time.Millisecond
	x = NewHedger(*h)
	if d, ok := x.Wait(now); d != time.Millisecond || !ok {
		t.Errorf("%v %v", d, ok)
	}
	if n := testing.AllocsPerRun(1000, func() { x.Wait(now); x.Took(now, time.Second); x.Again() }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestBucketsOfDurations(t *testing.T) {
	last := -1
	for d := time.Duration(1); d < 4*time.Hour; d += d/16 + 1 {
		b := bucketOf(d)
		if b < last || top(b) < d && b < buckets-1 || d > time.Millisecond && b < buckets-1 && top(b) > d*9/8+1 {
			t.Fatalf("%v is in bucket %d to %v, after %d", d, b, top(b), last)
		}
		last = b
	}
}
