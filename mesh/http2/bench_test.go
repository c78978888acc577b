package http2

import (
	"io"
	"net/http"
	"testing"
)

// BenchmarkRequests asks for 1 KB at a time, by itself and through a relay: the
// difference is what the relay costs.
func BenchmarkRequests(b *testing.B) {
	body := make([]byte, 1<<10)
	server := serveHTTP(b, func(w http.ResponseWriter, r *http.Request) { w.Write(body) })
	r := newRelay(b, server)
	for name, address := range map[string]string{"direct": server, "relay": r.address()} {
		b.Run(name, func(b *testing.B) {
			client := httpClient(b)
			b.ReportAllocs()
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					resp, err := client.Get("http://" + address + "/")
					if err != nil {
						b.Error(err)
						return
					}
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			})
		})
	}
}
