package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/ca"
	"hauberk.dev/contain"
	"hauberk.dev/control/rollout"
	"hauberk.dev/evidence"
	"hauberk.dev/id"
	"hauberk.dev/image"
	"hauberk.dev/kube"
	"hauberk.dev/ledger"
	"hauberk.dev/plan"
	"hauberk.dev/registry"
	"hauberk.dev/release"
)

// Config of a control plane.
type Config struct {
	// State is the folder of everything that must survive; Run that of
	// sockets. Both belong to the process's user alone.
	State, Run string
	// API and Door are host:port addresses.
	API, Door   string
	TrustDomain string
	// InsecureGuardOff gives identities to guests booted without the Guard, to
	// prove that the checks notice.
	InsecureGuardOff bool
	// Observe is what the proxies of all nodes note of requests; nil is counts.
	Observe *plan.Observe
	Log     io.Writer
	// Now is the clock; nil means the system's.
	Now func() time.Time
}

// scratch is where submissions are unpacked. What a killed process left there
// is removed at the next start.
const scratch = "scratch"

// Control is a control plane.
type Control struct {
	conf    Config
	now     func() time.Time
	slog    *slog.Logger
	started time.Time

	log        *ledger.Log
	book       *contain.Book
	rollouts   *rollout.Book
	issuer     *ca.Issuer
	tickets    *evidence.KeySigner
	content    *registry.Store
	gate       *release.Gate
	api        *kube.Server
	store      *kube.Store
	self       id.Source
	renewing   *renewal
	hub        *hub
	denials    denials
	accusers   accusers
	meter      meter
	lessons    lessons
	conditions conditions // of access policies, compiled
	untold     told       // records about policies that have no event yet
	wake       chan struct{}
	filled     chan struct{} // closed once there is a world

	mu      sync.Mutex
	world   world                   // of the last round
	refused map[rollout.Name]string // why policies are not in force as they are written, shown to people

	// The reconciler's own.
	retries     map[key]retry
	orders      map[string]planGeneration
	booted      map[string]bool // instances whose boot is recorded
	lastAddress netip.Addr
	numbers     map[key]map[string]uint64 // generation of each content of a workload's policies
	given       map[key]wire.Guard        // to instances, with its number
	loads       map[key]load              // of instances' Guards
	indexes     map[string]*image.Index   // of images, as the pre-check needs them
	refusals    map[rollout.Name]refusal  // what the pre-check last said
	shown       map[string]int            // receipts of an incident its resource shows, plus one
	owned       map[key]string            // applications as last recorded
}

// planGeneration numbers the plans of one node.
type planGeneration struct {
	body   string
	number uint64
}

// Open opens the ledger, the keys and the stores below c.State. It serves
// nothing yet; Run does.
func Open(ctx context.Context, c Config) (_ *Control, err error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	p := &Control{
		conf: c, now: c.Now, started: c.Now(),
		slog: slog.New(slog.NewTextHandler(c.Log, nil)),
		wake: make(chan struct{}, 1), filled: make(chan struct{}), retries: map[key]retry{},
		orders: map[string]planGeneration{}, booted: map[string]bool{},
		shown: map[string]int{}, owned: map[key]string{},
		numbers: map[key]map[string]uint64{}, refusals: map[rollout.Name]refusal{}, indexes: map[string]*image.Index{}, given: map[key]wire.Guard{}, loads: map[key]load{},
	}
	kube.SetLog(p.slog)
	p.hub = newHub(c.Now, p.look)
	if err := os.RemoveAll(filepath.Join(c.State, scratch)); err != nil {
		return nil, fmt.Errorf("open control plane: %w", err)
	}
	for _, dir := range []string{c.State, c.Run, filepath.Join(c.State, scratch)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open control plane: %w", err)
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	if err := p.openLedger(); err != nil {
		return nil, err
	}
	if err := p.openKeys(); err != nil {
		return nil, err
	}
	if err := p.openGate(); err != nil {
		return nil, err
	}
	return p, nil
}

func (c *Control) path(elem ...string) string {
	return filepath.Join(append([]string{c.conf.State}, elem...)...)
}

// Close releases what Open took.
func (c *Control) Close() error {
	if c.log == nil {
		return nil
	}
	return c.log.Close()
}

// look asks for another round of the reconciler, soon.
func (c *Control) look() {
	select {
	case c.wake <- struct{}{}:
	default: // one is due already
	}
}

// note logs an error that nobody waits for.
func (c *Control) note(err error) {
	if err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, net.ErrClosed) {
		c.slog.Warn(err.Error())
	}
}

// record writes to the ledger and returns once it is durable.
func (c *Control) record(ctx context.Context, r contain.Record) error {
	_, err := c.append(ctx, r)
	return err
}

func (c *Control) append(ctx context.Context, r contain.Record) (uint64, error) {
	n, err := c.log.Append(ctx, ledger.Entry{
		Time: c.now().UTC(), Kind: r.Kind, Actor: "hauberkd", Namespace: r.Namespace,
		Application: r.Application, Workload: r.Workload, Instance: r.Instance, Incident: r.Incident,
		Node: r.Node, Digest: r.Digest, Text: r.Text, Body: r.Body,
	})
	if err != nil {
		return 0, fmt.Errorf("record %s: %w", r.Kind, err)
	}
	return n, nil
}

// Record lets the book of incidents write through the control plane's ledger.
func (c *Control) Record(ctx context.Context, r contain.Record) error { return c.record(ctx, r) }

// instance finds an instance by its id, which is unique in the trust domain.
func (c *Control) instance(idName string) (key, instance, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, i := range c.world.instances {
		if k.Name == idName {
			return k, i, true
		}
	}
	return key{}, instance{}, false
}

// desiredFor numbers and encodes the orders of a node.
func (c *Control) desiredFor(w world, node string) ([]byte, error) {
	d := w.desired(node)
	d.Roots = string(c.issuer.Roots())
	d.TicketKeys = []string{string(c.tickets.Key().PEM())}
	body, err := json.Marshal(d.Mesh)
	if err != nil {
		return nil, fmt.Errorf("encode orders of %s: %w", node, err)
	}
	g := c.orders[node]
	if g.body != string(body) {
		// Time in front keeps generations rising across restarts.
		g = planGeneration{string(body), max(g.number+1, uint64(c.now().UnixMilli()))}
		c.orders[node] = g
	}
	d.Mesh.Generation = g.number
	out, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encode orders of %s: %w", node, err)
	}
	return out, nil
}
