package mesh

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
)

// maxLogLine is how many bytes of lines wait.
const maxLogLine = 256 << 10

// requestLog gathers lines for the log of the proxy. Nobody waits for it: what
// has no room is dropped and counted.
type requestLog struct {
	mu      sync.Mutex
	pending bytes.Buffer
	running bool
	dropped atomic.Uint64
}

func (l *requestLog) add(p *Proxy, format string, r *api.Request) {
	line := logLine(format, r)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pending.Len()+len(line) > maxLogLine {
		l.dropped.Add(1)
		return
	}
	l.pending.Write(line)
	if !l.running {
		l.running = true
		p.running.Go(func() { l.write(p) })
	}
}

// write writes until nothing is left.
func (l *requestLog) write(p *Proxy) {
	for {
		l.mu.Lock()
		b := bytes.Clone(l.pending.Bytes())
		l.pending.Reset()
		if l.running = len(b) > 0; !l.running {
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
		p.requests.Write(b) // a full disk stops no request
	}
}

func logLine(format string, r *api.Request) []byte {
	if format == "json" {
		b, _ := json.Marshal(r) // of strings and numbers: it cannot fail
		return append(b, '\n')
	}
	status := strconv.Itoa(r.Status)
	if r.GRPC != "" {
		status = "grpc:" + r.GRPC
	}
	return fmt.Appendf(nil, "%s %s %s %s %s %q %q %s rule=%q status=%s received=%d sent=%d us=%d trace=%s\n", r.At.UTC().Format(time.RFC3339Nano), r.Instance, r.Service,
		r.Protocol, r.Peer, r.Method, r.Path, r.Verdict, r.Rule, status, r.Received, r.Sent, r.Micros, r.Trace)
}
