package main

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"time"

	"hauberk.dev/internal/run"
	"hauberk.dev/xds"
	"hauberk.dev/xds/jwks"
	"hauberk.dev/xds/workload"
)

// told is what GET /status tells of. What is not asked for is nil.
type told struct {
	client   *xds.Client
	carrier  *carrier
	workload *workload.Client
	fetchers []*jwks.Fetcher
}

// answer is what GET /status says. It holds no key.
type answer struct {
	Server   *xds.Status      `json:"xds,omitempty"`
	Proxy    *carried         `json:"proxy,omitempty"`
	Workload *workload.Status `json:"workload,omitempty"`
	Keys     []jwks.Status    `json:"keys,omitempty"`
}

// carried is what the proxy was told.
type carried struct {
	Digest string    `json:"digest"` // of what is in force there
	Kept   string    `json:"kept"`   // of what its file holds
	Change time.Time `json:"change,omitzero"`
	Error  string    `json:"error,omitempty"`
}

func (t *told) answer() (a answer) {
	if t.client != nil {
		s := t.client.Status()
		a.Server, a.Proxy = &s, t.carrier.carried()
	}
	if t.workload != nil {
		s := t.workload.Status()
		a.Workload = &s
	}
	for _, f := range t.fetchers {
		a.Keys = append(a.Keys, f.Status())
	}
	return a
}

func (c *carrier) carried() *carried {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &carried{Digest: c.has, Kept: c.kept, Change: c.change, Error: c.away}
}

func tell(ctx context.Context, ln net.Listener, all *told) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(all.answer())
	})
	srv := &http.Server{Handler: mux, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, IdleTimeout: 5 * time.Second, MaxHeaderBytes: 8 << 10}
	return run.HTTP("status", srv, ln, time.Second).Run(ctx)
}
