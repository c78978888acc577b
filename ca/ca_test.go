package ca_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"hauberk.dev/api/node"
	"hauberk.dev/ca"
	"hauberk.dev/evidence"
	"hauberk.dev/id"
	"hauberk.dev/ledger"
	"hauberk.dev/plan"
)

const td = "hauberk.test"

// book is a ledger in memory that can be full.
type book struct {
	entries []ledger.Entry
	err     error
}

func (b *book) Append(_ context.Context, e ledger.Entry) (uint64, error) {
	if b.err != nil {
		return 0, b.err
	}
	b.entries = append(b.entries, e)
	return uint64(len(b.entries) - 1), nil
}

type live struct{ err error }

func (l *live) Live(evidence.Ticket) error { return l.err }

// world is an issuer with everything around it under the test's hand.
type world struct {
	t       *testing.T
	dir     string
	now     time.Time
	book    book
	live    live
	epoch   plan.Epoch
	tickets *evidence.KeySigner
	opt     ca.Options
	issuer  *ca.Issuer
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, dir: filepath.Join(t.TempDir(), "ca"), now: time.Now().UTC()}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if w.tickets, err = evidence.NewSigner(key, "control plane"); err != nil {
		t.Fatal(err)
	}
	w.opt = ca.Options{
		Clock: func() time.Time { return w.now }, Tickets: &w.live, Recorder: &w.book,
		TicketKeys: func() []evidence.Key { return []evidence.Key{w.tickets.Key()} },
		Epoch:      func() plan.Epoch { return w.epoch },
	}
	w.issuer = w.open()
	return w
}

func (w *world) open() *ca.Issuer {
	w.t.Helper()
	i, err := ca.Open(w.dir, td, w.opt)
	if err != nil {
		w.t.Fatal(err)
	}
	return i
}

func measurement() node.Measurement {
	h := func(c string) string { return strings.Repeat(c, 64) }
	return node.Measurement{Kernel: h("1"), Initrd: h("2"), CommandLine: h("3"), Agent: h("4"), Guard: h("5")}
}

func (w *world) ticket() evidence.Ticket {
	return evidence.Ticket{
		ID: "t-1", Instance: "web-1", Namespace: "bank", Workload: "web", Application: "bank", Repository: "bank/web",
		Digest: "sha256:" + strings.Repeat("a", 64), SandboxClass: "vm", Node: "n1", Measurement: measurement(),
		GuardGeneration: 3, LedgerIndex: 7, NotBefore: w.now.Add(-time.Minute), NotAfter: w.now.Add(time.Hour),
	}
}

func (w *world) sign(t evidence.Ticket) json.RawMessage {
	w.t.Helper()
	raw, err := evidence.SignTicket(t, w.tickets)
	if err != nil {
		w.t.Fatal(err)
	}
	return raw
}

func csr(t testing.TB, key crypto.Signer, change func(*x509.CertificateRequest)) []byte {
	t.Helper()
	u, _ := url.Parse("spiffe://" + td + "/ns/bank/sa/web")
	r := &x509.CertificateRequest{URIs: []*url.URL{u}}
	if change != nil {
		change(r)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (w *world) request(key crypto.Signer) ca.Request {
	w.t.Helper()
	n, err := id.Node(td, "n1")
	if err != nil {
		w.t.Fatal(err)
	}
	return ca.Request{Node: n, CSR: node.CSR{
		Instance: "web-1", Ticket: w.sign(w.ticket()), Request: csr(w.t, key, nil), Measurement: measurement(),
		Guard: node.GuardHeartbeat{At: w.now.Add(-time.Second), Generation: 3, Programs: 30},
	}}
}

// TestIssue has the result judged by go-spiffe and by crypto/x509.
func TestIssue(t *testing.T) {
	w := newWorld(t)
	key := newKey(t)
	c, err := w.issuer.Check(w.request(key))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := w.issuer.Sign(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := id.MarshalKey(key)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := x509svid.Parse(id.MarshalCertificates(cert.Chain...), keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	domain := spiffeid.RequireTrustDomainFromString(td)
	bundle, err := x509bundle.Parse(domain, w.issuer.Roots())
	if err != nil {
		t.Fatal(err)
	}
	if got, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil || got.String() != "spiffe://hauberk.test/ns/bank/sa/web" {
		t.Errorf("go-spiffe: %v, %v", got, err)
	}
	roots, err := id.ParsePool(w.issuer.Roots())
	if err != nil {
		t.Fatal(err)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if n, err := id.Verify(svid.Certificates, roots, w.now, usage); err != nil || n != c.Name() {
			t.Errorf("usage %v: %v, %v", usage, n, err)
		}
	}
	leaf := svid.Certificates[0]
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life < 10*time.Minute || life > 10*time.Minute+11*time.Second {
		t.Errorf("lifetime %s", life)
	}
	if len(w.book.entries) != 1 || !strings.Contains(string(w.book.entries[0].Body), cert.Serial) || w.book.entries[0].Instance != "web-1" {
		t.Errorf("ledger: %+v", w.book.entries)
	}
	if _, err := id.Verify(svid.Certificates, roots, w.now.Add(11*time.Minute), x509.ExtKeyUsageClientAuth); err == nil {
		t.Error("good after its end")
	}
}

func TestEd25519(t *testing.T) {
	w := newWorld(t)
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c, err := w.issuer.Check(w.request(key))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.issuer.Sign(t.Context(), c); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	for _, c := range []struct {
		name, reason string
		change       func(w *world, r *ca.Request)
	}{
		{"no ticket", "TicketInvalid", func(w *world, r *ca.Request) { r.Ticket = nil }},
		{"foreign ticket", "TicketInvalid", func(w *world, r *ca.Request) {
			s, _ := evidence.NewSigner(newKey(t), "mallory")
			r.Ticket, _ = evidence.SignTicket(w.ticket(), s)
		}},
		{"no ticket keys", "TicketInvalid", func(w *world, r *ca.Request) {
			w.opt.TicketKeys = func() []evidence.Key { return nil }
		}},
		{"expired", "TicketExpired", func(w *world, r *ca.Request) { w.now = w.now.Add(2 * time.Hour); r.Guard.At = w.now }},
		{"not yet", "TicketExpired", func(w *world, r *ca.Request) {
			tk := w.ticket()
			tk.NotBefore = w.now.Add(time.Minute)
			r.Ticket = w.sign(tk)
		}},
		{"not live", "TicketNotLive", func(w *world, r *ca.Request) { w.live.err = errors.New("the instance was deleted") }},
		{"other node", "WrongNode", func(w *world, r *ca.Request) { r.Node, _ = id.Node(td, "n2") }},
		{"workload asks", "NotANode", func(w *world, r *ca.Request) { r.Node, _ = id.Workload(td, "bank", "n1") }},
		{"foreign node", "NotANode", func(w *world, r *ca.Request) { r.Node, _ = id.Node("other.test", "n1") }},
		{"nobody asks", "NotANode", func(w *world, r *ca.Request) { r.Node = id.Name{} }},
		{"other instance", "WrongInstance", func(w *world, r *ca.Request) { r.Instance = "web-2" }},
		{"other kernel", "MeasurementDiffers", func(w *world, r *ca.Request) { r.Measurement.Kernel = strings.Repeat("9", 64) }},
		{"guard off", "GuardOff", func(w *world, r *ca.Request) {
			tk := w.ticket()
			tk.Measurement.GuardOff, r.Measurement.GuardOff = true, true
			r.Ticket = w.sign(tk)
		}},
		{"guard off unsaid", "MeasurementDiffers", func(w *world, r *ca.Request) { r.Measurement.GuardOff = true }},
		{"guard silent", "GuardSilent", func(w *world, r *ca.Request) { r.Guard = node.GuardHeartbeat{} }},
		{"guard stale", "GuardStale", func(w *world, r *ca.Request) { r.Guard.At = w.now.Add(-15 * time.Second) }},
		{"guard in the future", "GuardStale", func(w *world, r *ca.Request) { r.Guard.At = w.now.Add(time.Minute) }},
		{"guard detached", "GuardDetached", func(w *world, r *ca.Request) { r.Guard.Programs = 0 }},
		{"guard outdated", "GuardOutdated", func(w *world, r *ca.Request) { r.Guard.Generation = 2 }},
		{"instance revoked", "Revoked", func(w *world, r *ca.Request) { w.epoch.Instances = []string{"web-1"} }},
		{"identity revoked", "Revoked", func(w *world, r *ca.Request) { w.epoch.Identities = []string{"spiffe://" + td + "/ns/bank/sa/web"} }},
		{"digest revoked", "Revoked", func(w *world, r *ca.Request) { w.epoch.Digests = []string{"sha256:" + strings.Repeat("a", 64)} }},
		{"no request", "RequestInvalid", func(w *world, r *ca.Request) { r.Request = nil }},
		{"large request", "RequestInvalid", func(w *world, r *ca.Request) { r.Request = make([]byte, 9<<10) }},
		{"tampered request", "RequestInvalid", func(w *world, r *ca.Request) { r.Request[len(r.Request)-1] ^= 1 }},
		{"weak curve", "RequestInvalid", func(w *world, r *ca.Request) { r.Request = csr(t, p384, nil) }},
		{"other name", "RequestInvalid", func(w *world, r *ca.Request) {
			r.Request = csr(t, key, func(c *x509.CertificateRequest) { c.URIs[0].Path = "/ns/bank/sa/vault" })
		}},
		{"two names", "RequestInvalid", func(w *world, r *ca.Request) {
			r.Request = csr(t, key, func(c *x509.CertificateRequest) { c.URIs = append(c.URIs, c.URIs[0]) })
		}},
		{"host name too", "RequestInvalid", func(w *world, r *ca.Request) {
			r.Request = csr(t, key, func(c *x509.CertificateRequest) { c.DNSNames = []string{"web"} })
		}},
		{"no name", "RequestInvalid", func(w *world, r *ca.Request) {
			r.Request = csr(t, key, func(c *x509.CertificateRequest) { c.URIs = nil })
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			r := w.request(key)
			c.change(w, &r)
			w.issuer = w.open() // with changed options
			got, err := w.issuer.Check(r)
			var refusal *ca.Refusal
			if got != nil || !errors.As(err, &refusal) || refusal.Reason != c.reason || refusal.Message == "" || refusal.Fix == "" {
				t.Errorf("got %v, %v; want reason %s", got, err, c.reason)
			}
			if len(w.book.entries) != 0 {
				t.Errorf("ledger: %+v", w.book.entries)
			}
		})
	}
}

func TestNothingConfigured(t *testing.T) {
	w := newWorld(t)
	r := w.request(newKey(t))
	bare, err := ca.Open(t.TempDir(), td, ca.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var refusal *ca.Refusal
	if _, err := bare.Check(r); !errors.As(err, &refusal) || refusal.Reason != "NotConfigured" {
		t.Errorf("check: %v", err)
	}
	if _, err := bare.IssueNode(t.Context(), "n1", newKey(t).Public()); err == nil {
		t.Error("issued without a ledger")
	}
}

func TestGuardOffForTest(t *testing.T) {
	w := newWorld(t)
	w.opt.InsecureGuardOff = true
	w.issuer = w.open()
	r := w.request(newKey(t))
	tk := w.ticket()
	tk.Measurement.GuardOff, r.Measurement.GuardOff = true, true
	r.Ticket, r.Guard = w.sign(tk), node.GuardHeartbeat{}
	if _, err := w.issuer.Check(r); err != nil {
		t.Error(err)
	}
	r = w.request(newKey(t)) // booted with a Guard: the flag changes nothing
	r.Guard.Programs = 0
	if _, err := w.issuer.Check(r); err == nil {
		t.Error("a guest whose Guard fell off got an identity")
	}
}

// TestChecked tries every wrong use of the proof.
func TestChecked(t *testing.T) {
	w := newWorld(t)
	check := func(i *ca.Issuer) *ca.Checked {
		c, err := i.Check(w.request(newKey(t)))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	other := w.open()
	used := check(w.issuer)
	if _, err := w.issuer.Sign(t.Context(), used); err != nil {
		t.Fatal(err)
	}
	before := len(w.book.entries)
	for name, try := range map[string]func() error{
		"nil":     func() error { _, err := w.issuer.Sign(t.Context(), nil); return err },
		"zero":    func() error { _, err := w.issuer.Sign(t.Context(), new(ca.Checked)); return err },
		"reused":  func() error { _, err := w.issuer.Sign(t.Context(), used); return err },
		"foreign": func() error { _, err := w.issuer.Sign(t.Context(), check(other)); return err },
		"old": func() error {
			c := check(w.issuer)
			w.now = w.now.Add(11 * time.Second)
			_, err := w.issuer.Sign(t.Context(), c)
			return err
		},
		"revoked meanwhile": func() error {
			c := check(w.issuer)
			w.epoch.Instances = []string{"web-1"}
			defer func() { w.epoch = plan.Epoch{} }()
			_, err := w.issuer.Sign(t.Context(), c)
			return err
		},
		"ledger full": func() error {
			c := check(w.issuer)
			w.book.err = errors.New("no space")
			defer func() { w.book.err = nil }()
			cert, err := w.issuer.Sign(t.Context(), c)
			if len(cert.Chain) != 0 {
				t.Error("a certificate without a record")
			}
			return err
		},
	} {
		if err := try(); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
	if len(w.book.entries) != before {
		t.Errorf("ledger: %+v", w.book.entries[before:])
	}
}

func TestSystemCertificates(t *testing.T) {
	w := newWorld(t)
	roots, err := id.ParsePool(w.issuer.Roots())
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	n, err := w.issuer.IssueNode(t.Context(), "n1", key.Public())
	if err != nil {
		t.Fatal(err)
	}
	chain, err := id.ParseChain(n.Chain)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := id.Verify(chain, roots, w.now, x509.ExtKeyUsageClientAuth); err != nil || got.Node() != "n1" {
		t.Errorf("node: %v, %v", got, err)
	}
	control, err := id.Control(td)
	if err != nil {
		t.Fatal(err)
	}
	s, err := w.issuer.IssueServer(t.Context(), control, []string{"localhost", "127.0.0.1", "::1"}, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if chain, err = id.ParseChain(s.Chain); err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"localhost", "127.0.0.1", "::1"} {
		if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: host, CurrentTime: w.now}); err != nil {
			t.Error(err)
		}
	}
	a, err := w.issuer.IssueAccount(t.Context(), "admin", []string{"system:masters"}, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if chain, err = id.ParseChain(a.Chain); err != nil {
		t.Fatal(err)
	}
	if chain[0].Subject.CommonName != "admin" || chain[0].Subject.Organization[0] != "system:masters" {
		t.Errorf("account: %v", chain[0].Subject)
	}
	if _, err := id.Verify(chain, roots, w.now, x509.ExtKeyUsageClientAuth); err == nil {
		t.Error("an account certificate is an identity in the mesh")
	}
	if len(w.book.entries) != 3 {
		t.Errorf("ledger: %+v", w.book.entries)
	}
	workload, _ := id.Workload(td, "bank", "web")
	foreign, _ := id.Control("other.test")
	for name, try := range map[string]func() error{
		"workload without ticket": func() error { _, err := w.issuer.IssueServer(t.Context(), workload, nil, key.Public()); return err },
		"foreign domain":          func() error { _, err := w.issuer.IssueServer(t.Context(), foreign, nil, key.Public()); return err },
		"bad host": func() error {
			_, err := w.issuer.IssueServer(t.Context(), control, []string{"*"}, key.Public())
			return err
		},
		"bad node": func() error { _, err := w.issuer.IssueNode(t.Context(), "N 1", key.Public()); return err },
		"no key":   func() error { _, err := w.issuer.IssueNode(t.Context(), "n1", nil); return err },
		"bad user": func() error { _, err := w.issuer.IssueAccount(t.Context(), "", nil, key.Public()); return err },
		"bad group": func() error {
			_, err := w.issuer.IssueAccount(t.Context(), "a", []string{"a,b"}, key.Public())
			return err
		},
	} {
		if err := try(); err == nil {
			t.Errorf("%s: issued", name)
		}
	}
}

func TestRootStays(t *testing.T) {
	w := newWorld(t)
	first := w.issuer.Roots()
	if string(w.open().Roots()) != string(first) {
		t.Error("the root changed when opened again")
	}
	if _, err := ca.Open(w.dir, "other.test", w.opt); err == nil || !strings.Contains(err.Error(), "other.test") {
		t.Errorf("another trust domain: %v", err)
	}
	foreign := newWorld(t)
	raw, err := os.ReadFile(filepath.Join(foreign.dir, "root.crt"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "root.crt"), raw, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Open(w.dir, td, w.opt); err == nil || !strings.Contains(err.Error(), "root.key") {
		t.Errorf("a foreign certificate: %v", err)
	}
	if fi, err := os.Stat(filepath.Join(w.dir, "root.key")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", fi.Mode(), err)
	}
	if err := os.Chmod(filepath.Join(w.dir, "root.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Open(w.dir, td, w.opt); err == nil || !strings.Contains(err.Error(), "0644") {
		t.Errorf("a key that others can read: %v", err)
	}
	for _, life := range []time.Duration{time.Second, 2 * time.Hour, -time.Minute} {
		if _, err := ca.Open(t.TempDir(), td, ca.Options{Lifetime: life}); err == nil {
			t.Errorf("lifetime %s accepted", life)
		}
	}
}

// TestConstrained shows that the root is worth nothing outside its domain.
func TestConstrained(t *testing.T) {
	w := newWorld(t)
	key, err := id.LoadKey(filepath.Join(w.dir, "root.key"))
	if err != nil {
		t.Fatal(err)
	}
	certs, err := id.ParseCertificates(w.issuer.Roots())
	if err != nil {
		t.Fatal(err)
	}
	roots, err := id.ParsePool(w.issuer.Roots())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := id.Workload("other.test", "bank", "web")
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: certs[0].SerialNumber, URIs: []*url.URL{foreign.URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: w.now, NotAfter: w.now.Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, certs[0], newKey(t).Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := id.ParseChain([][]byte{der})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := id.Verify(chain, roots, w.now, x509.ExtKeyUsageClientAuth); err == nil {
		t.Errorf("the root of %s vouches for %s", td, n)
	}
}

func FuzzRequest(f *testing.F) {
	f.Add(csr(f, newKey(f), nil))
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(t *testing.T, der []byte) {
		if public, err := ca.RequestKey(der); err == nil && id.CheckPublicKey(public) != nil {
			t.Fatalf("accepted key %T", public)
		}
	})
}
