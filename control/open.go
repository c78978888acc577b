package control

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/ca"
	"hauberk.dev/contain"
	"hauberk.dev/control/rollout"
	"hauberk.dev/evidence"
	"hauberk.dev/id"
	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/version"
	"hauberk.dev/kube"
	"hauberk.dev/ledger"
	"hauberk.dev/registry"
	"hauberk.dev/release"
)

// openLedger opens the log and rebuilds the book of incidents from it.
func (c *Control) openLedger() error {
	origin := c.conf.TrustDomain + "/ledger"
	signer, err := ledger.LoadOrCreateSigner(c.path("ledger.key"), origin)
	if err != nil {
		return err
	}
	if c.log, err = ledger.Open(c.path("ledger"), origin, signer); err != nil {
		return err
	}
	c.book = contain.New(c)
	c.rollouts = rollout.New(guardRecorder{c}, guardContents(c.path("guard")), c.now)
	return c.log.Scan(0, func(at uint64, e ledger.Entry) error {
		if err := errors.Join(c.book.Replay(e.Kind, e.Body), c.rollouts.Replay(e.Kind, e.Body)); err != nil {
			return fmt.Errorf("read ledger entry %d: %w", at, err)
		}
		return nil
	})
}

// openKeys opens the CA and the key that signs tickets.
func (c *Control) openKeys() error {
	key, err := id.LoadOrCreateKey(c.path("ticket.key"))
	if err != nil {
		return err
	}
	if c.tickets, err = evidence.NewSigner(key, "tickets of "+c.conf.TrustDomain); err != nil {
		return err
	}
	c.issuer, err = ca.Open(c.path("ca"), c.conf.TrustDomain, ca.Options{
		Clock: c.now, Tickets: liveTickets{c}, Epoch: c.book.Epoch, Recorder: c.log,
		TicketKeys:       func() []evidence.Key { return []evidence.Key{c.tickets.Key()} },
		InsecureGuardOff: c.conf.InsecureGuardOff,
	})
	return err
}

// openGate opens the registry's content and the gate before it.
func (c *Control) openGate() (err error) {
	if c.content, err = registry.Open(c.path("registry")); err != nil {
		return err
	}
	key, err := id.LoadOrCreateKey(c.path("release.key"))
	if err != nil {
		return err
	}
	signer, err := evidence.NewSigner(key, "gate of "+c.conf.TrustDomain)
	if err != nil {
		return err
	}
	c.gate, err = release.New(c.gateOptions(signer))
	return err
}

// liveTickets tells the CA which instances should be running.
type liveTickets struct{ c *Control }

// Live returns nil while the ticket's instance is wanted on its node.
func (l liveTickets) Live(t evidence.Ticket) error {
	k, i, ok := l.c.instance(t.Instance)
	switch {
	case !ok:
		return fmt.Errorf("instance %s is not known", t.Instance)
	case k.Namespace != t.Namespace || i.workload != t.Workload || i.digest != t.Digest || i.node != t.Node:
		return fmt.Errorf("instance %s is another one now", t.Instance)
	case i.deleting || i.final():
		return fmt.Errorf("instance %s has ended", t.Instance)
	case i.status.Phase == wire.PhaseContained:
		return fmt.Errorf("instance %s is contained", t.Instance)
	}
	return nil
}

// serverCredential makes the control plane's own identity, renewed while it
// runs by being issued again at half its life.
func (c *Control) serverCredential(ctx context.Context) (id.Source, ca.Certificate, *ecdsa.PrivateKey, error) {
	none := func(err error) (id.Source, ca.Certificate, *ecdsa.PrivateKey, error) {
		return nil, ca.Certificate{}, nil, err
	}
	key, err := id.LoadOrCreateKey(c.path("server.key"))
	if err != nil {
		return none(err)
	}
	name, err := id.Control(c.conf.TrustDomain)
	if err != nil {
		return none(err)
	}
	roots, err := id.ParsePool(c.issuer.Roots())
	if err != nil {
		return none(err)
	}
	host, _, err := net.SplitHostPort(c.conf.API)
	if err != nil {
		return none(fmt.Errorf("read --listen %q: %w: use host:port, such as 127.0.0.1:7443", c.conf.API, err))
	}
	issue := func() (ca.Certificate, error) {
		return c.issuer.IssueServer(ctx, name, []string{host, "localhost"}, key.Public())
	}
	cert, err := issue()
	if err != nil {
		return none(err)
	}
	c.renewing = &renewal{issue: issue, key: key, roots: roots, now: c.now}
	if err := c.renewing.take(cert); err != nil {
		return none(err)
	}
	return c.renewing.source, cert, key, nil
}

// join admits a node: the kernel has vouched that root on this machine asks.
func (c *Control) join(ctx context.Context, in admin.Join) (admin.Joined, error) {
	public, err := ca.RequestKey(in.Request)
	if err != nil {
		return admin.Joined{}, err
	}
	key, ok := public.(*ecdsa.PublicKey)
	if !ok {
		return admin.Joined{}, fmt.Errorf("join %s: its key is %T, not ECDSA P-256", in.Node, public)
	}
	cert, err := c.issuer.IssueNode(ctx, in.Node, key)
	if err != nil {
		return admin.Joined{}, err
	}
	return admin.Joined{Chain: cert.Chain, Roots: string(c.issuer.Roots()), TrustDomain: c.conf.TrustDomain, NotAfter: cert.NotAfter}, nil
}

// openAPI opens the API server.
func (c *Control) openAPI(cert ca.Certificate, key *ecdsa.PrivateKey) error {
	pem, err := id.MarshalKey(key)
	if err != nil {
		return err
	}
	c.api, err = kube.Open(kube.Options{
		Dir: c.path("api"), Address: c.conf.API, Certificate: id.MarshalCertificates(cert.Chain...), Key: pem,
		ClientRoots: c.issuer.Roots(), Version: version.String(), Log: c.slog,
	})
	return err
}

// account makes a client certificate for the API, in files that clients read
// again when it is renewed.
func (c *Control) account(ctx context.Context, user string, groups []string) (kube.Access, error) {
	if err := os.MkdirAll(c.path("accounts"), 0o700); err != nil {
		return kube.Access{}, fmt.Errorf("account %s: %w", user, err)
	}
	a := kube.Access{Server: c.api.URL(), Roots: c.issuer.Roots(),
		CertificateFile: c.path("accounts", user+".crt"), KeyFile: c.path("accounts", user+".key")}
	key, err := id.LoadOrCreateKey(a.KeyFile)
	if err != nil {
		return kube.Access{}, err
	}
	cert, err := c.issuer.IssueAccount(ctx, user, groups, key.Public())
	if err != nil {
		return kube.Access{}, err
	}
	return a, atomicfile.Write(a.CertificateFile, id.MarshalCertificates(cert.Chain...), 0o600)
}

// accounts renews the certificates of the control plane itself and of the
// administrator, and writes the administrator's kubeconfig.
func (c *Control) accounts(ctx context.Context) (own kube.Access, err error) {
	admin, err := c.account(ctx, "admin", []string{kube.GroupMasters})
	if err != nil {
		return own, err
	}
	inline := kube.Access{Server: admin.Server, Roots: admin.Roots}
	if inline.Certificate, err = os.ReadFile(admin.CertificateFile); err != nil {
		return own, fmt.Errorf("write kubeconfig: %w", err)
	}
	if inline.Key, err = os.ReadFile(admin.KeyFile); err != nil {
		return own, fmt.Errorf("write kubeconfig: %w", err)
	}
	if err := kube.WriteKubeconfig(c.kubeconfigPath(), inline); err != nil {
		return own, err
	}
	return c.account(ctx, "hauberkd", []string{kube.GroupMasters})
}

// issue checks and signs an identity for an instance; a refusal is recorded.
func (c *Control) issue(ctx context.Context, node string, in wire.CSR) (wire.Certificate, error) {
	name, err := id.Node(c.conf.TrustDomain, node)
	if err != nil {
		return wire.Certificate{}, err
	}
	if h, ok := c.hub.heartbeat(node, in.Instance); ok && h.Programs < in.Guard.Programs && h.Programs > 0 {
		in.Guard.Programs = h.Programs // the worse of two answers counts
	}
	checked, err := c.issuer.Check(ca.Request{CSR: in, Node: name})
	if err != nil {
		c.note(c.recordRefusal(ctx, in.Instance, err))
		if refused := (*ca.Refusal)(nil); errors.As(err, &refused) {
			return wire.Certificate{}, &wire.Error{Reason: refused.Reason, Message: err.Error()}
		}
		return wire.Certificate{}, err
	}
	return c.issuer.Sign(ctx, checked)
}

// recordRefusal notes an identity that was not issued, once in a while.
func (c *Control) recordRefusal(ctx context.Context, instanceName string, why error) error {
	if _, now := c.denials.admit(instanceName, "identity\x00"+why.Error(), c.now()); !now {
		return nil
	}
	k, i, ok := c.instance(instanceName)
	if !ok {
		k = key{"", instanceName}
	}
	return c.record(ctx, contain.Record{Kind: "identity.refused", Namespace: k.Namespace, Application: i.application,
		Workload: i.workload, Instance: k.Name, Text: "no identity for " + k.Name + ": " + why.Error()})
}

// renewal hands out a certificate and issues the next at half its life.
type renewal struct {
	issue func() (ca.Certificate, error)
	key   *ecdsa.PrivateKey
	roots *x509.CertPool
	now   func() time.Time

	mu      sync.Mutex
	current id.Credential
	renewAt time.Time
}

func (r *renewal) take(cert ca.Certificate) error {
	chain, err := id.ParseChain(cert.Chain)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = id.Credential{Certificate: tls.Certificate{Certificate: cert.Chain, PrivateKey: r.key, Leaf: chain[0]}, Roots: r.roots}
	r.renewAt = r.now().Add(cert.NotAfter.Sub(r.now()) / 2)
	return nil
}

// source is asked at each handshake.
func (r *renewal) source() (id.Credential, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.current, nil
}

// due says whether it is time for the next certificate.
func (r *renewal) due() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.now().Before(r.renewAt)
}
