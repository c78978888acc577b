// Package xds carries a plan over the wire: it asks an xDS server for the
// resources of a proxy, by the delta protocol on one aggregated stream, and
// makes one plan of them.
//
// What the server says is believed resource by resource: one that cannot be
// held is refused with the field, the value and the reason, the others of the
// same response count, and what was in force under its name stays. A cluster
// is used once its endpoints are known, a listener once its routes are. While
// the server is away everything stays as it was. Everything the server can
// make grow has a bound.
//
// The package applies nothing and keeps no key: plans and secrets go to whoever
// asked.
package xds

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"hauberk.dev/plan"
	"hauberk.dev/xds/envoy"
)

// Bounds that no option changes.
const (
	maxName    = 1 << 10   // bytes of a resource's name
	maxVersion = 256       // bytes of a resource's version
	maxNonce   = 1 << 10   // bytes
	maxListed  = 5 << 19   // bytes of names and versions of a kind: a reconnect tells them in one request
	maxAsked   = 512 << 10 // bytes of names in one request
	maxDetail  = 4 << 10   // bytes of the reason in one NACK
	maxRefused = 64        // refusals that the status remembers, per kind

	sendPatience = time.Minute // for a server that does not read
)

// Options of a Client.
type Options struct {
	// Server in gRPC's words: "host:port" or "unix:///path".
	Server string
	// Credentials of the connection. There is no default, so that nobody
	// speaks in the clear because a line was forgotten.
	Credentials credentials.TransportCredentials
	Node        Node
	// Apply makes a plan true. It gets the newest plan only: what changed
	// while it was at work comes as one. A plan it returns an error for is
	// given to it again later.
	Apply func(context.Context, *plan.Proxy) error
	// Check refuses, with a reason for the server, what Apply could not do: a
	// *envoy.Listener, *envoy.RouteTable, *envoy.Cluster or *envoy.EndpointTable.
	// Nil refuses nothing.
	Check func(value any) error
	// Secrets gets the certificates and authorities that clusters and listeners
	// name, whenever they change, and before the plan that needs them is applied.
	// It may keep the values. Nil asks for none: then the proxy has them in files.
	Secrets func(context.Context, []*envoy.Secret) error
	// Local says that the proxy has a secret of that name in a file, so that it
	// is not asked for. Nil: none.
	Local func(name string) bool
	// OnDemand asks only for clusters that listeners and routes name, or Want
	// was called for, instead of all.
	OnDemand bool
	// Confirm answers a response only once Apply has made true what is ready of
	// it: an ACK means that it is in force, and a *Refusal of Apply is the reason
	// of a NACK. Any other error of Apply is waited out before the answer.
	Confirm bool
	Log     *slog.Logger

	// Each 0 means the value in parentheses.
	MaxMessage   int           // bytes of one response (16 MiB)
	MaxResources int           // of one kind (20,000)
	MaxBytes     int           // of all resources (256 MiB)
	Patience     time.Duration // a listener waits for clusters (15 s)
	RetryMin     time.Duration // first wait before a reconnect (500 ms)
	RetryMax     time.Duration // longest one (30 s)
	OpenTimeout  time.Duration // the server lets a stream begin (30 s)
	ApplyAgain   time.Duration // wait after an error of Apply (5 s)
}

// Node says to the server who asks.
type Node struct {
	ID, Cluster  string
	Region, Zone string
	Metadata     map[string]string
}

// Client keeps a proxy's resources as the server wants them.
type Client struct {
	o     Options
	dirty chan struct{} // a plan is to be made
	wants chan struct{} // other names are wanted

	applying sync.Mutex // held while a plan is made and applied
	hands    [sha256.Size]byte
	handed   bool                 // hands is of the secrets that were handed on last
	held     map[string]*resource // secrets of the plan in force, however often its successor is tried

	mu    sync.Mutex
	store store
	stat  counts
}

// counts is what a Status tells beside the store.
type counts struct {
	connected   bool
	attempts    int
	err         string
	applied     uint64
	applyErr    string
	digest      string
	waiting     []string
	acks, nacks uint64
}

// New makes a client that does nothing yet.
func New(o Options) (*Client, error) {
	switch {
	case o.Server == "":
		return nil, errors.New("make xds client: no server named")
	case o.Credentials == nil:
		return nil, errors.New("make xds client: no credentials: the server must be proved, or its socket be one nobody else opens")
	case o.Node.ID == "":
		return nil, errors.New("make xds client: no node id")
	case o.Apply == nil:
		return nil, errors.New("make xds client: nobody applies the plan")
	}
	if o.Check == nil {
		o.Check = func(any) error { return nil }
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	set(&o.MaxMessage, 16<<20)
	set(&o.MaxResources, 20_000)
	set(&o.MaxBytes, 256<<20)
	set(&o.Patience, 15*time.Second)
	set(&o.RetryMin, 500*time.Millisecond)
	set(&o.RetryMax, 30*time.Second)
	set(&o.OpenTimeout, 30*time.Second)
	set(&o.ApplyAgain, 5*time.Second)
	return &Client{
		o: o, dirty: make(chan struct{}, 1), wants: make(chan struct{}, 1),
		store: newStore(o),
	}, nil
}

func set[T int | time.Duration](v *T, otherwise T) {
	if *v <= 0 {
		*v = otherwise
	}
}

// Run asks the server until ctx ends. A server that is away, broken or hostile
// is asked again; it never ends Run.
func (c *Client) Run(ctx context.Context) error {
	conn, err := grpc.NewClient(c.o.Server,
		grpc.WithTransportCredentials(c.o.Credentials),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(c.o.MaxMessage)),
		// The wait between tries is ours; gRPC's stays below it.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: c.o.RetryMin / 2, Multiplier: 1.6, MaxDelay: c.o.RetryMax},
			MinConnectTimeout: 10 * time.Second,
		}),
		// As often as servers tolerate that were told nothing.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 5 * time.Minute, Timeout: 20 * time.Second}),
		grpc.WithNoProxy(), grpc.WithDisableServiceConfig(), grpc.WithUserAgent("hauberk-mesh"),
	)
	if err != nil {
		return fmt.Errorf("reach %q: %w", c.o.Server, err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var applying sync.WaitGroup
	applying.Go(func() { c.apply(ctx) })
	defer applying.Wait()
	defer cancel()

	wait := c.o.RetryMin
	for ctx.Err() == nil {
		conn.ResetConnectBackoff()
		answered, err := c.stream(ctx, discovery.NewAggregatedDiscoveryServiceClient(conn))
		if ctx.Err() != nil {
			break
		}
		if answered {
			wait = c.o.RetryMin
		}
		c.away(err, answered)
		pause := wait/2 + rand.N(wait/2+1)
		wait = min(wait*2, c.o.RetryMax)
		c.o.Log.Warn("xds server is away; what it said stays in force", "server", c.o.Server, "again in", pause, "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	return nil
}

func (c *Client) away(err error, answered bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stat.connected, c.stat.err = false, clip(err.Error(), maxDetail)
	if answered {
		c.stat.attempts = 0
	}
	c.stat.attempts++
}

// apply hands the newest plan on, as often as it changes.
func (c *Client) apply(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.dirty:
		case <-timer.C:
		}
		c.applying.Lock()
		again, err := c.force(ctx)
		c.applying.Unlock()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			again = c.o.ApplyAgain
		}
		timer.Reset(again)
		// On-demand names follow what is in force.
		poke(c.wants)
	}
}

// force makes the plan of what is ready and has it applied, and says after which
// time to do so again though nothing was heard.
func (c *Client) force(ctx context.Context) (again time.Duration, err error) {
	c.mu.Lock()
	early := c.store.secrets(c.held) // with those that only what is replaced needs
	p, again := c.store.build(time.Now())
	late := c.store.secrets(nil)
	digest, waiting := c.store.digest(), c.store.waiting()
	c.mu.Unlock()
	if p == nil {
		return again, nil
	}
	if err = c.hand(ctx, early); err == nil {
		if err = c.o.Apply(ctx, p); err == nil {
			err = c.hand(ctx, late)
		}
	}
	if err == nil {
		c.held = late
	}
	if ctx.Err() != nil {
		return again, ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stat.waiting = waiting
	if err == nil {
		c.stat.applied++
		c.stat.digest, c.stat.applyErr = digest, ""
		return again, nil
	}
	c.stat.applyErr = clip(err.Error(), maxDetail)
	c.o.Log.Error("apply plan of xds server", "err", err)
	return again, err
}

// Again has the plan in force applied again: who applies it has lost it.
func (c *Client) Again() { poke(c.dirty) }

// poke leaves a note that stays until it is read.
func poke(note chan struct{}) {
	select {
	case note <- struct{}{}:
	default:
	}
}

// Want asks for a cluster by name until release is called, for who needs one
// that no route names. It has a meaning only with OnDemand; else all clusters
// come anyway.
func (c *Client) Want(cluster string) (release func(), err error) {
	if err := envoy.Nameable(cluster); err != nil {
		return nil, fmt.Errorf("want cluster %q: %w", clip(cluster, maxName), err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.store.asked) >= c.o.MaxResources && c.store.asked[cluster] == 0 {
		return nil, fmt.Errorf("want cluster %q: %d are wanted already", cluster, c.o.MaxResources)
	}
	c.store.asked[cluster]++
	c.store.refer()
	poke(c.wants)
	return sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.store.asked[cluster]--; c.store.asked[cluster] == 0 {
			delete(c.store.asked, cluster)
		}
		c.store.refer()
		poke(c.wants)
		poke(c.dirty)
	}), nil
}

// Status is what a client knows of itself.
type Status struct {
	Server    string `json:"server"`
	Connected bool   `json:"connected"`
	// Attempts since the server last answered, and what ended the last.
	Attempts int    `json:"attempts,omitempty"`
	Error    string `json:"error,omitempty"`
	// Applied counts plans that were applied; ApplyError is why the newest
	// was not.
	Applied    uint64 `json:"applied"`
	ApplyError string `json:"applyError,omitempty"`
	// Digest of the resources that the plan in force was made of: see Digest.
	// With Waiting empty all of them are in force.
	Digest    string         `json:"digest"`
	Resources map[string]int `json:"resources"`
	Waiting   []string       `json:"waiting,omitempty"`
	Refused   []string       `json:"refused,omitempty"`
	Acks      uint64         `json:"acks"`
	Nacks     uint64         `json:"nacks"`
}

// Status tells how things stand.
func (c *Client) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return Status{
		Server: c.o.Server, Connected: c.stat.connected, Attempts: c.stat.attempts, Error: c.stat.err,
		Applied: c.stat.applied, ApplyError: c.stat.applyErr, Digest: c.stat.digest,
		Resources: c.store.count(), Waiting: c.stat.waiting, Refused: c.store.refusals(),
		Acks: c.stat.acks, Nacks: c.stat.nacks,
	}
}

// clip bounds foreign text, between two characters: protobuf takes no part of one.
func clip(s string, n int) string {
	if len(s) <= n {
		return strings.ToValidUTF8(s, "\uFFFD")
	}
	return strings.ToValidUTF8(s[:n], "") + "..."
}
