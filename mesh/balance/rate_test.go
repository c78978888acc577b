package balance

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestBucket(t *testing.T) {
	b, err := NewBucket(Rate{Requests: 10, Per: time.Second, Burst: 5})
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		at   time.Duration
		n    int64
		ok   bool
		wait time.Duration
	}{
		{0, 3, true, 0}, {0, 2, true, 0}, {0, 1, false, 100 * time.Millisecond},
		{99 * time.Millisecond, 1, false, time.Millisecond}, {100 * time.Millisecond, 1, true, 0},
		{100 * time.Millisecond, 0, true, 0}, {300 * time.Millisecond, 3, false, 100 * time.Millisecond}, {300 * time.Millisecond, 2, true, 0},
		{time.Hour, 5, true, 0}, {time.Hour, 1, false, 100 * time.Millisecond}, // it does not fill above its depth
		{time.Hour, 6, false, 0}, {time.Hour, -1, false, 0}, // never
	} {
		if ok, wait := b.Take(Time(c.at), c.n); ok != c.ok || wait != c.wait {
			t.Errorf("step %d: %v, %v; want %v, %v", i, ok, wait, c.ok, c.wait)
		}
	}
	for _, r := range []Rate{{}, {Requests: 1}, {Requests: -1, Per: time.Second}, {Requests: 1e9, Per: time.Second}, {Requests: 1, Per: 48 * time.Hour}, {Requests: 1, Per: time.Hour, Burst: 1e6}, {Requests: 1, Per: time.Second, Burst: -1}} {
		if _, err := NewBucket(r); err == nil {
			t.Errorf("%+v was taken", r)
		}
	}
}

// Exactly so many pass, whoever asks at once, and over time the rate holds to a
// thousandth.
func TestBucketIsExact(t *testing.T) {
	b, err := NewBucket(Rate{Requests: 1000, Per: time.Second, Burst: 777})
	if err != nil {
		t.Fatal(err)
	}
	var passed atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				if ok, _ := b.Take(0, 1); ok {
					passed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if passed.Load() != 777 {
		t.Errorf("%d passed a burst of 777", passed.Load())
	}
	for _, rate := range []int64{1, 3, 7, 999, 65_537, 700_001, 1_000_000} {
		b, err := NewBucket(Rate{Requests: rate, Per: time.Second, Burst: 1})
		if err != nil {
			t.Fatal(err)
		}
		const n = 5000
		now := Time(0)
		for range n + 1 {
			ok, wait := b.Take(now, 1)
			if !ok {
				now = now.Add(wait)
				if ok, _ := b.Take(now, 1); !ok {
					t.Fatalf("rate %d: the wait was too short", rate)
				}
			}
		}
		want := float64(n) / float64(rate) * 1e9
		if math.Abs(float64(now)-want) > want/1000*1.5+1 {
			t.Errorf("%d requests at %d/s take %v ns, want %.0f", n, rate, now, want)
		}
	}
}

func TestBuckets(t *testing.T) {
	b, err := NewBuckets(Rate{Requests: 2, Per: time.Second}, shards)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		for _, key := range []string{"a", "b"} {
			if ok, _ := b.Take(0, key, 1); !ok {
				t.Errorf("token %d of %s", i, key)
			}
		}
	}
	if ok, wait := b.Take(0, "a", 1); ok || wait != 500*time.Millisecond {
		t.Errorf("a third of a: %v, %v", ok, wait)
	}
	// A flood of keys is held to one bucket for each shard, and forgotten.
	passed := 0
	for i := range 10_000 {
		if ok, _ := b.Take(0, fmt.Sprint("flood ", i), 1); ok {
			passed++
		}
	}
	if passed > 2*shards*2 {
		t.Errorf("%d of a flood passed", passed)
	}
	if ok, _ := b.Take(0, "a", 1); ok {
		t.Error("a flood has made the limiter forget a")
	}
	kept := 0
	for i := range b.shards {
		kept += len(b.shards[i].keys)
	}
	if kept > shards {
		t.Errorf("%d keys are kept, at most %d", kept, shards)
	}
	if ok, _ := b.Take(Time(time.Hour), "fresh", 1); !ok {
		t.Error("no room for a new key after the others have ended")
	}
	for _, keys := range []int{0, -1} {
		if _, err := NewBuckets(Rate{Requests: 1, Per: time.Second}, keys); err == nil {
			t.Errorf("%d keys", keys)
		}
	}
}

func TestFaults(t *testing.T) {
	f, err := NewFaults(Fault{Abort: Million / 10, Delay: Million / 4, For: time.Second, Status: 503})
	if err != nil {
		t.Fatal(err)
	}
	const n = 100_000
	aborts, delays, both := 0, 0, 0
	r := seeded()
	for range n {
		i := f.Next(r())
		if i.Abort {
			aborts++
			if i.Status != 503 {
				t.Fatal(i)
			}
		}
		if i.Wait == time.Second {
			delays++
			if i.Abort {
				both++
			}
		}
		if i != (Injury{}) {
			f.Over()
		}
	}
	for _, c := range []struct{ got, want int }{{aborts, n / 10}, {delays, n / 4}, {both, n / 40}} {
		if math.Abs(float64(c.got-c.want)) > 6*math.Sqrt(float64(c.want)) {
			t.Errorf("%d, want %d", c.got, c.want)
		}
	}
	if f.active.Load() != 0 {
		t.Error("faults are left")
	}
	f, err = NewFaults(Fault{Abort: Million, Status: 500, Active: 3})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		if got := f.Next(r()).Abort; got != (i < 3) {
			t.Errorf("fault %d at once: %v", i, got)
		}
	}
	f.Over()
	if !f.Next(r()).Abort {
		t.Error("no fault after one is over")
	}
	for _, bad := range []Fault{{Abort: Million + 1, Status: 1}, {Abort: 1}, {Delay: 1}, {Delay: 1, For: -1}, {Active: -1}} {
		if _, err := NewFaults(bad); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}
