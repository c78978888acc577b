package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"hauberk.dev/api/node"
	"hauberk.dev/evidence"
	"hauberk.dev/id"
	"hauberk.dev/ledger"
)

// Certificate is an issued identity, as the node protocol carries it.
type Certificate = node.Certificate

// Request is a node asking for an identity of one of its instances. Node is
// the name the node proved on the connection the request came by; the rest is
// what it says.
type Request struct {
	node.CSR
	Node id.Name
}

// Refusal says why no identity is issued.
type Refusal struct {
	Reason  string // one CamelCase word, stable
	Message string
	Fix     string
}

func (r *Refusal) Error() string {
	return fmt.Sprintf("issue identity: %s: %s; %s", r.Reason, r.Message, r.Fix)
}

// Checked is a request that passed every check of one Issuer. It can be
// signed once, and soon.
type Checked struct {
	issuer *Issuer
	used   atomic.Bool
	at     time.Time
	name   id.Name
	public crypto.PublicKey
	ticket evidence.Ticket
}

// Name is the identity that will be issued.
func (c *Checked) Name() id.Name { return c.name }

// Ticket the identity rests on.
func (c *Checked) Ticket() evidence.Ticket { return c.ticket }

// checkedFor bounds the time between Check and Sign.
const checkedFor = 10 * time.Second

const maxCSR = 8 << 10

// Check decides whether a request may be signed. Its error is a *Refusal.
func (i *Issuer) Check(r Request) (*Checked, error) {
	now := i.opt.Clock()
	t, err := i.checkTicket(r, now)
	if err != nil {
		return nil, err
	}
	name, err := id.Workload(i.domain, t.Namespace, t.Workload)
	if err != nil {
		return nil, &Refusal{"TicketInvalid", err.Error(), "rename the workload"}
	}
	public, err := checkCSR(r.Request, name)
	if err != nil {
		return nil, &Refusal{"RequestInvalid", err.Error(), "the mesh must ask for exactly the identity of its ticket, with a fresh P-256 or Ed25519 key"}
	}
	if err := i.checkGuest(r, t, now); err != nil {
		return nil, err
	}
	if err := i.checkEpoch(t, name); err != nil {
		return nil, err
	}
	return &Checked{issuer: i, at: now, name: name, public: public, ticket: t}, nil
}

func (i *Issuer) checkTicket(r Request, now time.Time) (evidence.Ticket, error) {
	var none evidence.Ticket
	if i.opt.Tickets == nil || i.opt.TicketKeys == nil || i.opt.Epoch == nil {
		return none, &Refusal{"NotConfigured", "the issuer has no source of live tickets, ticket keys or revocations", "configure them; nothing is issued on trust"}
	}
	t, err := evidence.VerifyTicket(r.Ticket, now, i.opt.TicketKeys())
	if err != nil {
		var expired *evidence.ExpiredError
		if errors.As(err, &expired) {
			return none, &Refusal{"TicketExpired", err.Error(), "the node must use the ticket in its latest desired state"}
		}
		return none, &Refusal{"TicketInvalid", err.Error(), "only tickets signed by this control plane count"}
	}
	switch caller := r.Node; {
	case caller.Kind() != id.KindNode || caller.TrustDomain() != i.domain:
		return none, &Refusal{"NotANode", fmt.Sprintf("the caller is %q, not a node of trust domain %q", caller, i.domain), "only nodes ask for identities of workloads"}
	case t.Node != caller.Node():
		return none, &Refusal{"WrongNode", fmt.Sprintf("ticket %s is for node %q and node %q presents it", t.ID, t.Node, caller.Node()), "a ticket is good on its own node only; if it was copied, revoke the instance"}
	case r.Instance != t.Instance:
		return none, &Refusal{"WrongInstance", fmt.Sprintf("ticket %s is for instance %q and the request for %q", t.ID, t.Instance, r.Instance), "send the ticket of the instance"}
	}
	if err := i.opt.Tickets.Live(t); err != nil {
		return none, &Refusal{"TicketNotLive", fmt.Sprintf("ticket %s of instance %s: %v", t.ID, t.Instance, err), "an instance that should not run gets no identity; look at hauberk why " + t.Instance}
	}
	return t, nil
}

// checkGuest compares what booted, and what guards it, with the ticket.
func (i *Issuer) checkGuest(r Request, t evidence.Ticket, now time.Time) error {
	if r.Measurement != t.Measurement {
		return &Refusal{"MeasurementDiffers", fmt.Sprintf("instance %s booted %+v, the ticket says %+v", t.Instance, r.Measurement, t.Measurement), "restart the workload so that it gets a ticket for the guest the node now boots"}
	}
	if t.Measurement.GuardOff {
		if i.opt.InsecureGuardOff {
			return nil
		}
		return &Refusal{"GuardOff", fmt.Sprintf("instance %s was booted with its Guard switched off", t.Instance), "start the node without the flag that switches the Guard off"}
	}
	age := now.Sub(r.Guard.At)
	switch {
	case r.Guard.At.IsZero():
		return &Refusal{"GuardSilent", fmt.Sprintf("instance %s: the Guard has never been heard of", t.Instance), "wait for the guest to finish booting"}
	case age >= heartbeatAge || age < -backDate:
		return &Refusal{"GuardStale", fmt.Sprintf("instance %s: the Guard was last heard of at %s, and it is %s; it must be within %s", t.Instance, r.Guard.At.Format(time.RFC3339), now.Format(time.RFC3339), heartbeatAge), "look at the guest's log and at the node's clock"}
	case r.Guard.Programs <= 0:
		return &Refusal{"GuardDetached", fmt.Sprintf("instance %s: the Guard has %d programs attached", t.Instance, r.Guard.Programs), "restart the workload; its guest is not protected"}
	case r.Guard.Generation < t.GuardGeneration:
		return &Refusal{"GuardOutdated", fmt.Sprintf("instance %s enforces policy generation %d, the ticket demands %d", t.Instance, r.Guard.Generation, t.GuardGeneration), "wait for the policy to arrive in the guest"}
	}
	return nil
}

func (i *Issuer) checkEpoch(t evidence.Ticket, name id.Name) error {
	e := i.opt.Epoch()
	for _, x := range []struct {
		what, value string
		revoked     []string
	}{
		{"instance", t.Instance, e.Instances},
		{"identity", name.String(), e.Identities},
		{"image digest", t.Digest, e.Digests},
	} {
		if slices.Contains(x.revoked, x.value) {
			return &Refusal{"Revoked", fmt.Sprintf("%s %s is revoked since epoch %d or before", x.what, x.value, e.Number), "see hauberk why " + t.Instance + "; a person must release it from containment"}
		}
	}
	return nil
}

var oidSAN = asn1.ObjectIdentifier{2, 5, 29, 17}

// checkCSR returns the key of a request that asks for the name and nothing
// else.
func checkCSR(der []byte, name id.Name) (crypto.PublicKey, error) {
	if len(der) == 0 || len(der) > maxCSR {
		return nil, fmt.Errorf("certificate request of %d bytes, want 1 to %d", len(der), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := id.CheckPublicKey(csr.PublicKey); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request: it does not prove possession of its key: %w", err)
	}
	// The request is compared byte for byte with the only one that is right,
	// so no reading of names can differ between two parsers.
	want, err := sanOf(name)
	if err != nil {
		return nil, err
	}
	if len(csr.Extensions) != 1 || !csr.Extensions[0].Id.Equal(oidSAN) || !bytes.Equal(csr.Extensions[0].Value, want) {
		return nil, fmt.Errorf("certificate request asks for names %v %v %v %v and %d extensions, want exactly the URI name %s", csr.URIs, csr.DNSNames, csr.IPAddresses, csr.EmailAddresses, len(csr.Extensions), name)
	}
	return csr.PublicKey, nil
}

// sanOf is the one-name subject alternative name extension, encoded.
func sanOf(name id.Name) ([]byte, error) {
	return asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(name.String())}})
}

// Sign issues the identity that c was checked for. It works once, on the
// Issuer that checked, within seconds; revocations are looked at again.
func (i *Issuer) Sign(ctx context.Context, c *Checked) (Certificate, error) {
	if c == nil || c.issuer != i || i == nil {
		return Certificate{}, errors.New("sign identity: it was not checked by this issuer")
	}
	if c.used.Swap(true) {
		return Certificate{}, errors.New("sign identity: it was signed before; check again")
	}
	now := i.opt.Clock()
	if age := now.Sub(c.at); age > checkedFor || age < 0 {
		return Certificate{}, fmt.Errorf("sign identity: it was checked %s ago; check again", age)
	}
	if err := i.checkEpoch(c.ticket, c.name); err != nil {
		return Certificate{}, err
	}
	leaf, err := i.leaf(now, i.opt.Lifetime)
	if err != nil {
		return Certificate{}, err
	}
	leaf.URIs = append(leaf.URIs, c.name.URL())
	t := c.ticket
	return i.sign(ctx, leaf, c.public, ledger.Entry{
		Kind: "identity.issue", Actor: t.Node, Subject: c.name.String(), Node: t.Node, Digest: t.Digest,
		Namespace: t.Namespace, Application: t.Application, Workload: t.Workload, Instance: t.Instance,
		Text: fmt.Sprintf("identity %s issued to instance %s on node %s against ticket %s", c.name, t.Instance, t.Node, t.ID),
	}, map[string]any{"ticket": t.ID, "ticketIndex": t.LedgerIndex, "guardGeneration": t.GuardGeneration, "measurement": t.Measurement})
}
