//go:build !race

// Under the race detector sync.Pool forgets on purpose.

package hbone

import (
	"context"
	"io"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"time"
)

// TestChunksComeBack: what is taken from a pool returns to it, however a stream
// ends. While nothing is collected, a pool makes what it misses.
func TestChunksComeBack(t *testing.T) {
	var made atomic.Int64
	newChunk, newFrame := chunks.New, frames.New
	t.Cleanup(func() { chunks.New, frames.New = newChunk, newFrame }) // after the connection has ended
	chunks.New = func() any { made.Add(1); return newChunk() }
	frames.New = func() any { made.Add(1); return newFrame() }
	c := both(t, echo)
	runtime.GC() // twice: what other tests have left in the pools goes
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const streams = 400
	buf := make([]byte, 30_000)
	for i := range streams {
		s, err := c.Open(ctx, "10.0.0.1:1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Write(buf[:1+i*70]); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(s, buf[:1+i*70*(i%4)/4]); err != nil { // all of it, or less
			t.Fatal(err)
		}
		s.Reset(CodeCancel)
	}
	if n := made.Load(); n == 0 || n > streams/4 {
		t.Errorf("%d buffers made for %d streams", n, streams)
	}
}
