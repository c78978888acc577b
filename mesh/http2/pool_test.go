//go:build !race

// Under the race detector sync.Pool forgets on purpose.

package http2

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"time"

	"hauberk.dev/test/meshload"
)

// TestChunksComeBack: what is taken from a pool returns to it, however a stream
// ends. While nothing is collected, a pool makes what it misses. The client takes
// 4 KiB of an answer at a time, so that most of it is held.
func TestChunksComeBack(t *testing.T) {
	var made atomic.Int64
	newChunk := chunks.New
	t.Cleanup(func() { chunks.New = newChunk }) // after the relay has ended
	chunks.New = func() any { made.Add(1); return newChunk() }
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(meshload.Serve("http2", ln, &meshload.Ledger{}))
	r := newRelay(t, ln.Addr().String())
	tr := &http.Transport{Protocols: new(http.Protocols), HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: 4 << 10}}
	tr.Protocols.SetUnencryptedHTTP2(true)
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr, Timeout: time.Minute}
	runtime.GC() // twice: what other tests have left in the pool goes
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	const streams, size = 400, 30_000
	for i := range streams {
		resp, err := client.Post(fmt.Sprintf("http://%s/%d", r.address(), i), "", bytes.NewReader(make([]byte, size)))
		if err != nil {
			t.Fatal(err)
		}
		part := int64(size * (i % 4) / 3) // all of it, or less
		if n, err := io.CopyN(io.Discard, resp.Body, part); n != part {
			t.Fatal(n, err)
		}
		resp.Body.Close()
	}
	if n := made.Load(); n == 0 || n > streams/4 {
		t.Errorf("%d chunks made for %d streams", n, streams)
	}
}
