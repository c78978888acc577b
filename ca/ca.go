// Package ca issues identities: it checks, then signs.
//
// A workload gets a certificate of minutes, and only against a live launch
// ticket for its instance on the node that asks, a guest that booted as the
// ticket says, a Guard that has just been heard of, and no revocation. Check
// is the only maker of what Sign takes. The package keeps the one key that
// every identity chains to and is the only room that signs identities; it
// opens no socket and keeps no list of what it issued, which is in the ledger.
package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"hauberk.dev/evidence"
	"hauberk.dev/id"
	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/ledger"
	"hauberk.dev/plan"
)

// Defaults and bounds.
const (
	DefaultLifetime = 10 * time.Minute // of a workload's certificate
	maxLifetime     = time.Hour
	longLifetime    = 24 * time.Hour // of a node's, server's, account's
	rootLifetime    = 10 * 365 * 24 * time.Hour
	// backDate forgives clocks that are a little behind, as SPIRE does.
	backDate = 10 * time.Second
	// heartbeatAge is how old the last word of a Guard may be.
	heartbeatAge = 15 * time.Second
)

// Tickets says whether an instance is still wanted.
type Tickets interface {
	// Live returns nil while the ticket's instance should run on its node.
	Live(evidence.Ticket) error
}

// Recorder writes to the ledger. An entry is durable when Append returns.
type Recorder interface {
	Append(context.Context, ledger.Entry) (uint64, error)
}

// Options of an Issuer. Tickets, TicketKeys, Epoch and Recorder have no
// default: without one of them nothing is issued to workloads.
type Options struct {
	Clock    func() time.Time // time.Now if nil
	Lifetime time.Duration    // DefaultLifetime if 0
	Tickets  Tickets
	// TicketKeys are the keys that sign tickets, asked at each check.
	TicketKeys func() []evidence.Key
	// Epoch is what is no longer trusted, asked at each check and once more
	// just before signing.
	Epoch    func() plan.Epoch
	Recorder Recorder
	// InsecureGuardOff lets guests that were booted with their Guard switched
	// off have identities, to prove that the attack checks notice.
	InsecureGuardOff bool
}

// Issuer holds the signing key of a trust domain.
type Issuer struct {
	domain string
	key    *ecdsa.PrivateKey
	root   *x509.Certificate
	opt    Options
}

// Open reads the key and the root certificate in dir, or makes them.
func Open(dir, trustDomain string, o Options) (*Issuer, error) {
	if err := id.CheckTrustDomain(trustDomain); err != nil {
		return nil, fmt.Errorf("open ca: %w", err)
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.Lifetime == 0 {
		o.Lifetime = DefaultLifetime
	}
	if o.Lifetime < time.Minute || o.Lifetime > maxLifetime {
		return nil, fmt.Errorf("open ca: lifetime %s is out of range, want %s to %s", o.Lifetime, time.Minute, maxLifetime)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open ca: %w", err)
	}
	key, err := id.LoadOrCreateKey(filepath.Join(dir, "root.key"))
	if err != nil {
		return nil, fmt.Errorf("open ca: %w", err)
	}
	i := &Issuer{domain: trustDomain, key: key, opt: o}
	if err := i.loadRoot(filepath.Join(dir, "root.crt")); err != nil {
		return nil, fmt.Errorf("open ca: %w", err)
	}
	return i, nil
}

// loadRoot reads the certificate of the key, or signs it.
func (i *Issuer) loadRoot(path string) error {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if raw, err = i.signRoot(); err == nil {
			err = atomicfile.Write(path, raw, 0o644)
		}
	}
	if err != nil {
		return err
	}
	certs, err := id.ParseCertificates(raw)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	root := certs[0]
	now := i.opt.Clock()
	switch {
	case len(certs) != 1:
		return fmt.Errorf("%s: has %d certificates, want one", path, len(certs))
	case !i.key.PublicKey.Equal(root.PublicKey):
		return fmt.Errorf("%s: is not the certificate of root.key beside it; restore both from one copy", path)
	case !root.IsCA || root.CheckSignatureFrom(root) != nil:
		return fmt.Errorf("%s: is not a self-signed CA", path)
	case len(root.URIs) != 1 || root.URIs[0].String() != "spiffe://"+i.domain:
		return fmt.Errorf("%s: is the root of %v, not of trust domain %q; use another directory for another trust domain", path, root.URIs, i.domain)
	case now.After(root.NotAfter) || now.Before(root.NotBefore):
		return fmt.Errorf("%s: is good from %s to %s and it is %s; check the clock, or move the directory away to begin a new root",
			path, root.NotBefore.Format(time.RFC3339), root.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	i.root = root
	return nil
}

// signRoot makes a root that is good for names of one trust domain only and
// for no further CA.
func (i *Issuer) signRoot() ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	td, err := id.Control(i.domain)
	if err != nil {
		return nil, err
	}
	uri := td.URL()
	uri.Path = ""
	now := i.opt.Clock()
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "Hauberk root of " + i.domain, SerialNumber: serial.Text(16)},
		NotBefore:    now.Add(-backDate), NotAfter: now.Add(rootLifetime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		PermittedDNSDomainsCritical: true, // Go's name for all name constraints
		PermittedURIDomains:         []string{i.domain},
	}
	t.URIs = append(t.URIs, uri)
	der, err := x509.CreateCertificate(rand.Reader, t, t, i.key.Public(), i.key)
	if err != nil {
		return nil, fmt.Errorf("sign root: %w", err)
	}
	return id.MarshalCertificates(der), nil
}

// Roots are the PEM certificates that identities of the trust domain chain to.
func (i *Issuer) Roots() []byte { return id.MarshalCertificates(i.root.Raw) }

// TrustDomain of the issuer.
func (i *Issuer) TrustDomain() string { return i.domain }

func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, fmt.Errorf("make serial: %w", err)
	}
	b[0] = b[0]&0x7f | 0x40 // positive, and always as long
	return new(big.Int).SetBytes(b), nil
}

// leaf is the part that all certificates share.
func (i *Issuer) leaf(now time.Time, life time.Duration) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	end := now.Add(life)
	if end.After(i.root.NotAfter) {
		end = i.root.NotAfter
	}
	return &x509.Certificate{
		SerialNumber: serial, NotBefore: now.Add(-backDate), NotAfter: end.Truncate(time.Second),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, nil
}

// sign records that a certificate will be, then makes it.
func (i *Issuer) sign(ctx context.Context, t *x509.Certificate, public crypto.PublicKey, e ledger.Entry, body map[string]any) (Certificate, error) {
	if i.opt.Recorder == nil {
		return Certificate{}, errors.New("sign certificate: there is no ledger to record it in")
	}
	if err := id.CheckPublicKey(public); err != nil {
		return Certificate{}, fmt.Errorf("sign certificate: %w", err)
	}
	key, err := evidence.NewKey(public, e.Subject)
	if err != nil {
		return Certificate{}, fmt.Errorf("sign certificate: %w", err)
	}
	serial := fmt.Sprintf("%x", t.SerialNumber)
	body["serial"], body["notAfter"], body["key"] = serial, t.NotAfter.UTC(), key.ID
	e.Time = i.opt.Clock()
	e.Text += fmt.Sprintf(", serial %s, until %s", serial, t.NotAfter.UTC().Format(time.RFC3339))
	if e.Body, err = json.Marshal(body); err != nil {
		return Certificate{}, fmt.Errorf("sign certificate: %w", err)
	}
	at, err := i.opt.Recorder.Append(ctx, e)
	if err != nil {
		return Certificate{}, fmt.Errorf("sign certificate: record intent: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, i.root, public, i.key)
	if err != nil {
		e.Kind, e.Text = "identity.failed", fmt.Sprintf("signing failed, nothing was issued for entry %d: %v", at, err)
		_, logged := i.opt.Recorder.Append(context.WithoutCancel(ctx), e)
		return Certificate{}, errors.Join(fmt.Errorf("sign certificate: %w", err), logged)
	}
	// The root is not part of the chain. An intermediate would follow the leaf.
	return Certificate{Chain: [][]byte{der}, Serial: serial, NotAfter: t.NotAfter.UTC()}, nil
}
