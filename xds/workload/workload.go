// Package workload asks a SPIFFE Workload API for the X.509-SVIDs of this process
// and the bundles by which others are verified, and hands on whatever it says next.
//
// A response counts whole or not at all: one in which anything is not as X.509-SVID
// has it changes nothing, and the reason is told. While the API is away what it said
// stays, until it expires. The package keeps nothing on disk and speaks TLS with
// nobody.
package workload

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"time"

	api "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"hauberk.dev/id"
	"hauberk.dev/internal/svidlink"
)

// Bounds that no option changes.
const (
	maxResponse  = svidlink.MaxMessage
	maxSVIDs     = 32
	maxFederated = 128
	maxWhy       = 1 << 10 // bytes of what the API says of itself
)

// Options of a Client.
type Options struct {
	// Endpoint in SPIFFE's words: unix:///path or tcp://address:port.
	Endpoint string
	// Take gets everything there is whenever that changes. The set is its own.
	Take func(*svidlink.Set)
	Log  *slog.Logger

	// Each 0 means the value in parentheses.
	RetryMin time.Duration // first wait before asking again (500 ms)
	RetryMax time.Duration // longest one (30 s)
	First    time.Duration // for the first response (30 s)
	// Denied is for how long an API that says there is nothing for this process
	// is asked again before its earlier answers are let go of (10 s): one that has
	// just begun may not know yet.
	Denied time.Duration
}

// Client follows one Workload API.
type Client struct {
	o Options

	mu     sync.Mutex
	set    *svidlink.Set // in force; nil before the first
	stat   Status
	denied time.Time // since when, zero if it is not
}

// Status is what a client knows of itself. It holds no key.
type Status struct {
	Endpoint  string    `json:"endpoint"`
	Connected bool      `json:"connected"`
	Error     string    `json:"error,omitempty"`
	Updates   uint64    `json:"updates"`
	Refused   uint64    `json:"refused"` // responses that changed nothing
	Names     []string  `json:"names,omitempty"`
	Bundles   []string  `json:"bundles,omitempty"`
	Until     time.Time `json:"until,omitzero"` // the first of them ends
}

// New makes a client that does nothing yet.
func New(o Options) (*Client, error) {
	if _, err := Target(o.Endpoint); err != nil {
		return nil, err
	}
	if o.Take == nil {
		return nil, errors.New("make workload client: nobody takes what it says")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	for _, d := range []struct {
		v         *time.Duration
		otherwise time.Duration
	}{{&o.RetryMin, 500 * time.Millisecond}, {&o.RetryMax, 30 * time.Second}, {&o.First, 30 * time.Second}, {&o.Denied, 10 * time.Second}} {
		if *d.v <= 0 {
			*d.v = d.otherwise
		}
	}
	return &Client{o: o, stat: Status{Endpoint: o.Endpoint}}, nil
}

// Target is an endpoint in gRPC's words.
func Target(endpoint string) (string, error) {
	if path, ok := strings.CutPrefix(endpoint, "unix://"); ok && strings.HasPrefix(path, "/") {
		return endpoint, nil
	}
	if address, ok := strings.CutPrefix(endpoint, "tcp://"); ok {
		if _, err := netip.ParseAddrPort(address); err == nil {
			return "passthrough:///" + address, nil
		}
	}
	return "", fmt.Errorf("workload API %q: want unix:///path, or tcp:// with an IP address and a port", endpoint)
}

// Run asks until ctx ends. An API that is away or says what cannot be is asked
// again; it never ends Run.
func (c *Client) Run(ctx context.Context) error {
	target, err := Target(c.o.Endpoint)
	if err != nil {
		return err
	}
	// The owner of the socket is the proof: SPIFFE has no other here.
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponse)),
		// As often as servers tolerate that were told nothing.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 5 * time.Minute, Timeout: 20 * time.Second}),
		grpc.WithNoProxy(), grpc.WithDisableServiceConfig(), grpc.WithUserAgent("hauberk"))
	if err != nil {
		return fmt.Errorf("reach %q: %w", c.o.Endpoint, err)
	}
	defer conn.Close()
	wait := c.o.RetryMin
	for ctx.Err() == nil {
		conn.ResetConnectBackoff()
		answered, err := c.stream(ctx, api.NewSpiffeWorkloadAPIClient(conn))
		if ctx.Err() != nil {
			break
		}
		if answered {
			wait = c.o.RetryMin
		}
		if status.Code(err) == codes.InvalidArgument {
			wait = c.o.RetryMax // it will not like the same question better
		}
		c.away(err)
		pause := wait/2 + rand.N(wait/2+1)
		wait = min(wait*2, c.o.RetryMax)
		c.o.Log.Warn("workload API is away; what it said stays until it expires", "endpoint", c.o.Endpoint, "again in", pause, "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.set != nil {
		c.set.Clear()
		c.set = nil
	}
	return nil
}

// stream reads responses until the stream ends. One on which nothing newer comes
// while what was said runs out is left, and the API asked anew: it may be gone
// without a word, or have forgotten.
func (c *Client) stream(parent context.Context, server api.SpiffeWorkloadAPIClient) (answered bool, err error) {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(parent, "workload.spiffe.io", "true"))
	defer cancel()
	late := time.AfterFunc(c.o.First, cancel)
	defer late.Stop()
	responses, err := server.FetchX509SVID(ctx, &api.X509SVIDRequest{})
	for err == nil {
		var r *api.X509SVIDResponse
		if r, err = responses.Recv(); err == nil {
			answered = true
			c.handle(r, time.Now())
			late.Reset(max(c.left()*3/4, c.o.First))
		}
	}
	if ctx.Err() != nil && parent.Err() == nil {
		err = fmt.Errorf("no answer within %v", c.o.First)
		if answered {
			err = errors.New("nothing newer, and what it said runs out")
		}
	}
	return answered, err
}

// left is for how long what was said holds.
func (c *Client) left() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Until(c.stat.Until)
}

// handle puts a response in force, or says why not.
func (c *Client) handle(r *api.X509SVIDResponse, now time.Time) {
	set, until, err := Read(r, now)
	for _, s := range r.GetSvids() {
		clear(s.GetX509SvidKey()) // Read has copied it
	}
	c.mu.Lock()
	c.stat.Connected, c.stat.Error, c.denied = true, "", time.Time{}
	if err != nil {
		c.stat.Refused++
		c.stat.Error = "refused what it said: " + clip(err.Error())
		c.mu.Unlock()
		c.o.Log.Error("workload API: response refused, what was before stays", "endpoint", c.o.Endpoint, "err", err)
		c.tell()
		return
	}
	if c.set != nil {
		c.set.Clear()
	}
	c.set = set
	c.stat.Updates++
	c.stat.Until, c.stat.Names, c.stat.Bundles = until, nil, nil
	for i := range set.Identities {
		c.stat.Names = append(c.stat.Names, set.Identities[i].Name)
	}
	for _, b := range set.Bundles {
		c.stat.Bundles = append(c.stat.Bundles, b.Name)
	}
	names := c.stat.Names
	c.mu.Unlock()
	if n := len(r.GetCrl()); n > 0 {
		c.o.Log.Warn("workload API: revocation lists are not looked at", "lists", n)
	}
	c.o.Log.Info("workload API has told identities", "names", names, "until", until.UTC().Format(time.RFC3339))
	c.tell()
}

// tell hands on what is in force, with what is wrong with the API.
func (c *Client) tell() {
	c.mu.Lock()
	set := &svidlink.Set{}
	if c.set != nil {
		set = c.set.Clone()
	}
	if c.stat.Error != "" {
		set.Why = fmt.Sprintf("the Workload API at %s: %s", c.o.Endpoint, c.stat.Error)
	}
	c.mu.Unlock()
	c.o.Take(set)
}

// away notes the end of a stream. What the API takes back for good is let go of.
func (c *Client) away(err error) {
	c.mu.Lock()
	c.stat.Connected, c.stat.Error = false, clip(err.Error())
	switch now := time.Now(); {
	case status.Code(err) != codes.PermissionDenied:
		c.denied = time.Time{}
	case c.denied.IsZero():
		c.denied = now
	case now.Sub(c.denied) >= c.o.Denied && c.set != nil:
		c.set.Clear()
		c.set = nil
		c.stat.Names, c.stat.Bundles, c.stat.Until = nil, nil, time.Time{}
		c.o.Log.Error("workload API: there is nothing for this process any more; what it said before is let go of", "for", now.Sub(c.denied))
	}
	c.mu.Unlock()
	c.tell()
}

// Status tells how things stand.
func (c *Client) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stat
}

func clip(s string) string {
	if len(s) > maxWhy {
		return s[:maxWhy] + "..."
	}
	return s
}

// Read judges a response by X.509-SVID's rules. Keys of the set are copies. until is
// when the first of its leaves ends.
func Read(r *api.X509SVIDResponse, now time.Time) (set *svidlink.Set, until time.Time, err error) {
	set = &svidlink.Set{}
	defer func() {
		if err != nil {
			set.Clear()
			set = nil
		}
	}()
	switch n, f := len(r.GetSvids()), len(r.GetFederatedBundles()); {
	case n == 0:
		return set, until, errors.New("svids: none")
	case n > maxSVIDs || f > maxFederated:
		return set, until, fmt.Errorf("%d svids and %d federated bundles; at most %d and %d", n, f, maxSVIDs, maxFederated)
	}
	bundles := bundles{by: map[string]string{}}
	hints := map[string]bool{}
	for i, s := range r.GetSvids() {
		leaf, err := bundles.svid(s, now)
		if err != nil {
			return set, until, fmt.Errorf("svids[%d] %.200q: %w", i, s.GetSpiffeId(), err)
		}
		hint := s.GetHint()
		if hints[hint] {
			hint = "" // the first of those that share one has it
		}
		hints[hint] = true
		set.Identities = append(set.Identities, svidlink.Identity{Name: s.GetSpiffeId(), Hint: hint, Chain: s.GetX509Svid(),
			Key: append([]byte(nil), s.GetX509SvidKey()...)})
		if until.IsZero() || leaf.NotAfter.Before(until) {
			until = leaf.NotAfter
		}
	}
	for name, der := range r.GetFederatedBundles() {
		domain, path, err := id.ParseSPIFFE(name)
		if err == nil && path != "" {
			err = errors.New("want the id of a trust domain, without a path")
		}
		if err == nil {
			_, err = bundles.add(domain, der)
		}
		if err != nil {
			return set, until, fmt.Errorf("federated_bundles %.200q: %w", name, err)
		}
	}
	set.Bundles = bundles.all
	return set, until, nil
}

// bundles are those of a response, one for each trust domain.
type bundles struct {
	by  map[string]string
	all []svidlink.Bundle
}

func (b *bundles) add(domain string, der []byte) (*x509.CertPool, error) {
	roots, err := id.ParseBundle(der)
	if err != nil {
		return nil, err
	}
	if before, there := b.by[domain]; there {
		if before != string(der) {
			return nil, fmt.Errorf("trust domain %s has two bundles", domain)
		}
		return roots, nil
	}
	b.by[domain] = string(der)
	b.all = append(b.all, svidlink.Bundle{Name: "spiffe://" + domain, DER: der})
	return roots, nil
}

// svid checks one identity, and that its own bundle vouches for it: a peer would
// find out otherwise.
func (b *bundles) svid(s *api.X509SVID, now time.Time) (*x509.Certificate, error) {
	if len(s.GetHint()) > maxWhy {
		return nil, fmt.Errorf("hint: %d bytes; at most %d", len(s.GetHint()), maxWhy)
	}
	chain, err := id.ParseDER(s.GetX509Svid())
	if err != nil {
		return nil, fmt.Errorf("x509_svid: %w", err)
	}
	name, domain, err := id.SVID(chain[0])
	if err != nil {
		return nil, fmt.Errorf("x509_svid: %w", err)
	}
	if name != s.GetSpiffeId() {
		return nil, fmt.Errorf("x509_svid: is that of %q", name)
	}
	if _, err := id.ParseSigner(s.GetX509SvidKey(), chain[0]); err != nil {
		return nil, fmt.Errorf("x509_svid_key: %w", err)
	}
	roots, err := b.add(domain, s.GetBundle())
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return nil, fmt.Errorf("x509_svid: by its own bundle: %w", err)
	}
	return chain[0], nil
}
