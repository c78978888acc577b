package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/plan"
	"hauberk.dev/xds"
	"hauberk.dev/xds/envoy"
	"hauberk.dev/xds/proxyfile"
)

const (
	proxyTimeout = 20 * time.Second // of one question to the proxy
	maxAnswer    = 1 << 20
	watchPeriod  = 2 * time.Second
)

// carrier carries plans to the proxy.
type carrier struct {
	writer proxyfile.Writer
	file   string
	log    *slog.Logger
	proxy  *http.Client

	mu     sync.Mutex
	want   string // digest of what the proxy last took, "" before
	kept   string // digest of what the file holds
	away   string // why the proxy could not be asked
	has    string // digest of what is in force, as the proxy says
	change time.Time
}

func newCarrier(c *config, log *slog.Logger) *carrier {
	socket := c.Proxy.Admin
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	return &carrier{
		writer: c.writer(), file: c.Proxy.File, log: log,
		proxy: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: proxyTimeout},
	}
}

// begin writes the file that the proxy begins with, if there is none yet: it
// serves nothing, and can be told.
func (c *carrier) begin() error {
	if _, err := os.Stat(c.file); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text, _, err := c.writer.Write(&plan.Proxy{})
	if err != nil {
		return err
	}
	return atomicfile.Write(c.file, text, 0o600)
}

// check refuses, by itself, what the proxy could not do.
func (c *carrier) check(value any) error {
	switch v := value.(type) {
	case *envoy.Listener:
		return c.writer.Listener(&v.Listener)
	case *envoy.RouteTable:
		return c.writer.Hosts(v.Hosts)
	case *envoy.Cluster:
		return c.writer.Cluster(&v.Cluster)
	}
	return nil
}

// apply has the proxy take a plan, and keeps it for the proxy's next start. What
// the proxy does not take is an *xds.Refusal.
func (c *carrier) apply(ctx context.Context, p *plan.Proxy) error {
	text, index, err := c.writer.Write(p)
	if err != nil {
		return &xds.Refusal{Why: err.Error()}
	}
	digest := fmt.Sprintf("%x", sha256.Sum256(text))
	has, err := c.ask(ctx)
	if err != nil {
		return err
	}
	if has != digest {
		if err := c.put(ctx, text, index); err != nil {
			return err
		}
		c.log.Info("the proxy has taken a plan", "listeners", len(p.Listeners), "clusters", len(p.Clusters), "digest", digest)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.has, c.want = digest, digest; has != digest {
		c.change = time.Now()
	}
	if c.kept == digest {
		return nil
	}
	if err := atomicfile.Write(c.file, text, 0o600); err != nil {
		return fmt.Errorf("keep what is in force: %w", err)
	}
	c.kept = digest
	return nil
}

// ask asks the proxy for the digest of what is in force.
func (c *carrier) ask(ctx context.Context) (digest string, err error) {
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.away = ""; err != nil {
			c.away = err.Error()
		}
	}()
	status, body, err := c.do(ctx, http.MethodGet, "/status", nil)
	if err != nil {
		return "", err
	}
	var answer struct{ Digest string }
	if err := json.Unmarshal(body, &answer); err != nil || status != http.StatusOK {
		return "", fmt.Errorf("ask the proxy: status %d, %d bytes: no word of what is in force", status, len(body))
	}
	return answer.Digest, nil
}

func (c *carrier) do(ctx context.Context, method, path string, body []byte) (status int, answer []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://proxy"+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	r, err := c.proxy.Do(req)
	if err != nil {
		return 0, nil, fmt.Errorf("ask the proxy: %w", err)
	}
	defer r.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(r.Body, maxAnswer))
	if err != nil {
		return 0, nil, fmt.Errorf("ask the proxy: %w", err)
	}
	return r.StatusCode, answer, nil
}

// put has the proxy take a configuration.
func (c *carrier) put(ctx context.Context, text []byte, index proxyfile.Index) error {
	status, body, err := c.do(ctx, http.MethodPut, "/config", text)
	if err != nil {
		return err
	}
	var answer refusal
	switch {
	case status == http.StatusOK:
		return nil
	case status != http.StatusUnprocessableEntity && status != http.StatusRequestEntityTooLarge:
		return fmt.Errorf("tell the proxy: status %d", status)
	case json.Unmarshal(body, &answer) != nil || answer.Reason == "":
		return fmt.Errorf("tell the proxy: status %d without a reason", status)
	}
	return answer.of(index)
}

// refusal is the proxy's own.
type refusal struct {
	Reason string
	Faults []struct{ Field, Why string }
}

// of says which resource the first fault is of.
func (r *refusal) of(index proxyfile.Index) *xds.Refusal {
	out := &xds.Refusal{Why: "the proxy: " + r.Reason}
	if len(r.Faults) == 0 {
		return out
	}
	f := r.Faults[0]
	list, rest, _ := strings.Cut(f.Field, "[")
	number, rest, _ := strings.Cut(rest, "]")
	i, err := strconv.Atoi(number)
	name := func(all []string) bool {
		if err != nil || i < 0 || i >= len(all) {
			return false
		}
		out.Name, out.Why = all[i], strings.TrimPrefix(rest, ".")+": "+f.Why
		return true
	}
	switch list {
	case "upstreams":
		out.Kind = envoy.Clusters
		name(index.Upstreams)
	case "listeners":
		out.Kind = envoy.Listeners
		name(index.Listeners)
	case "hosts":
		out.Kind = envoy.Listeners
		if name(index.Hosts) {
			out.Why = "routes: " + out.Why
		}
	}
	return out
}

// watch asks the proxy now and then whether what was applied is still in force:
// one that began anew from an older file is told again.
func (c *carrier) watch(ctx context.Context, again func()) error {
	tick := time.NewTicker(watchPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		has, err := c.ask(ctx)
		c.mu.Lock()
		lost := err == nil && c.want != "" && has != c.want
		if err == nil {
			c.has = has
		}
		c.mu.Unlock()
		if lost {
			c.log.Warn("the proxy has another configuration than the one it took: telling it again", "digest", has)
			again()
		}
	}
}
