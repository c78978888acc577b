package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"hauberk.dev/id"
	"hauberk.dev/ledger"
)

// IssueNode issues the identity of a machine's agent. That the key is the
// machine's is for the caller to know.
func (i *Issuer) IssueNode(ctx context.Context, node string, public crypto.PublicKey) (Certificate, error) {
	name, err := id.Node(i.domain, node)
	if err != nil {
		return Certificate{}, fmt.Errorf("issue node certificate: %w", err)
	}
	return i.issueSystem(ctx, name, nil, public)
}

// IssueServer issues the identity of a part of Hauberk (control plane,
// ingress, node) that others also reach under host names or addresses, such
// as the API server.
func (i *Issuer) IssueServer(ctx context.Context, name id.Name, hosts []string, public crypto.PublicKey) (Certificate, error) {
	if name.Kind() == id.KindWorkload || name.IsZero() || name.TrustDomain() != i.domain {
		return Certificate{}, fmt.Errorf("issue server certificate: %q is not a part of Hauberk in trust domain %q; workloads get identities against tickets only", name, i.domain)
	}
	return i.issueSystem(ctx, name, hosts, public)
}

func (i *Issuer) issueSystem(ctx context.Context, name id.Name, hosts []string, public crypto.PublicKey) (Certificate, error) {
	leaf, err := i.leaf(i.opt.Clock(), longLifetime)
	if err != nil {
		return Certificate{}, err
	}
	leaf.URIs = append(leaf.URIs, name.URL())
	for _, h := range hosts {
		if a, err := netip.ParseAddr(h); err == nil {
			leaf.IPAddresses = append(leaf.IPAddresses, a.AsSlice())
		} else if hostPattern.MatchString(h) && len(h) <= 253 {
			leaf.DNSNames = append(leaf.DNSNames, h)
		} else {
			return Certificate{}, fmt.Errorf("issue server certificate: host %q is neither a DNS name nor an address", h)
		}
	}
	text := fmt.Sprintf("certificate of %s issued", name)
	if len(hosts) > 0 {
		text += " for hosts " + strings.Join(hosts, ", ")
	}
	return i.sign(ctx, leaf, public, ledger.Entry{Kind: "identity.system", Actor: "ca", Subject: name.String(), Node: name.Node(), Text: text},
		map[string]any{"hosts": hosts})
}

var (
	hostPattern    = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	accountPattern = regexp.MustCompile(`^[A-Za-z0-9][-A-Za-z0-9.:@_]{0,126}$`)
)

// IssueAccount issues a client certificate for the Kubernetes-style API: the
// user is its common name, the groups its organisations. It carries no SPIFFE
// id, so it opens no door of the mesh or of a node.
func (i *Issuer) IssueAccount(ctx context.Context, user string, groups []string, public crypto.PublicKey) (Certificate, error) {
	if !accountPattern.MatchString(user) {
		return Certificate{}, fmt.Errorf("issue account certificate: user %q is not of the form %s", user, accountPattern)
	}
	if len(groups) > 16 {
		return Certificate{}, errors.New("issue account certificate: more than 16 groups")
	}
	for _, g := range groups {
		if !accountPattern.MatchString(g) {
			return Certificate{}, fmt.Errorf("issue account certificate: group %q is not of the form %s", g, accountPattern)
		}
	}
	leaf, err := i.leaf(i.opt.Clock(), longLifetime)
	if err != nil {
		return Certificate{}, err
	}
	leaf.Subject = pkix.Name{CommonName: user, Organization: groups}
	leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return i.sign(ctx, leaf, public, ledger.Entry{Kind: "identity.account", Actor: "ca", Subject: user,
		Text: fmt.Sprintf("client certificate of account %s in groups [%s] issued", user, strings.Join(groups, ", "))},
		map[string]any{"groups": groups})
}

// RequestKey returns the key of a certificate request once the request has
// proved possession of it. Names in the request are ignored.
func RequestKey(der []byte) (crypto.PublicKey, error) {
	if len(der) == 0 || len(der) > maxCSR {
		return nil, fmt.Errorf("certificate request of %d bytes, want 1 to %d", len(der), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request: it does not prove possession of its key: %w", err)
	}
	return csr.PublicKey, id.CheckPublicKey(csr.PublicKey)
}
