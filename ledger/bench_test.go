package ledger

import (
	"slices"
	"sync"
	"testing"
	"time"
)

// BenchmarkAppend measures one durable append at a time, and sixteen callers
// that share batches.
func BenchmarkAppend(b *testing.B) {
	for _, c := range []struct {
		name    string
		callers int
	}{{"alone", 1}, {"sixteen", 16}} {
		b.Run(c.name, func(b *testing.B) {
			l := openLog(b, b.TempDir(), newSigner(b))
			var mu sync.Mutex
			var took []time.Duration
			var wg sync.WaitGroup
			work := make(chan int, b.N)
			for i := range b.N {
				work <- i
			}
			close(work)
			b.ResetTimer()
			for range c.callers {
				wg.Go(func() {
					for i := range work {
						began := time.Now()
						if _, err := l.Append(b.Context(), entry(i)); err != nil {
							b.Error(err)
							return
						}
						mu.Lock()
						took = append(took, time.Since(began))
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
		})
	}
}
