package envoy

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	"hauberk.dev/id"
	"hauberk.dev/internal/svidlink"
)

// Secret is a certificate with its key, or authorities.
type Secret struct {
	Name        string
	Chain       []byte // DER, leaf first; nil of authorities
	Key         []byte // PKCS #8
	Authorities []byte // DER; nil of a certificate
}

// secret reads a secret. What is refused of it never repeats its bytes.
func (r *reader) secret(s *tls.Secret) *Secret {
	out := &Secret{Name: s.Name}
	switch t := s.Type.(type) {
	case *tls.Secret_TlsCertificate:
		chain := r.inline("tls_certificate.certificate_chain", t.TlsCertificate.GetCertificateChain())
		key := r.inline("tls_certificate.private_key", t.TlsCertificate.GetPrivateKey())
		if chain == nil || key == nil {
			return out
		}
		leaf, err := out.chain(chain)
		if err != nil {
			r.refuse("tls_certificate.certificate_chain.inline_bytes", "", err.Error())
			return out
		}
		if out.Key, err = privateKey(key, leaf); err != nil {
			r.refuse("tls_certificate.private_key.inline_bytes", "", err.Error())
			return out
		}
		r.handable(out, leaf)
	case *tls.Secret_ValidationContext:
		if n := len(t.ValidationContext.GetMatchTypedSubjectAltNames()); n > 0 {
			r.refuse("validation_context.match_typed_subject_alt_names", fmt.Sprint(n), "who must answer is said where the secret is named")
		}
		if ca := r.inline("validation_context.trusted_ca", t.ValidationContext.GetTrustedCa()); ca != nil {
			if err := out.authorities(ca); err != nil {
				r.refuse("validation_context.trusted_ca.inline_bytes", "", err.Error())
			} else if err := (&svidlink.Bundle{Name: s.Name, DER: out.Authorities}).Check(); err != nil {
				r.refuse("validation_context.trusted_ca.inline_bytes", "", err.Error())
			}
		}
	default:
		r.refuse("type", "", "held are tls_certificate and validation_context")
	}
	return out
}

// handable refuses what the proxy would not take: it takes all secrets or none.
func (r *reader) handable(s *Secret, leaf *x509.Certificate) {
	if err := (&svidlink.Identity{Name: s.Name, Chain: s.Chain, Key: s.Key}).Check(); err != nil {
		r.refuse("tls_certificate.certificate_chain.inline_bytes", "", err.Error())
	}
	if !strings.HasPrefix(s.Name, "spiffe://") {
		return
	}
	if name, _, err := id.SVID(leaf); err != nil {
		r.refuse("name", s.Name, "want the SPIFFE id of the certificate: "+err.Error())
	} else if name != s.Name {
		r.refuse("name", s.Name, fmt.Sprintf("the certificate is that of %q", name))
	}
}

// inline is what a data source holds itself; a file or a variable would be this
// program's, which the control plane has no word on.
func (r *reader) inline(field string, s *core.DataSource) []byte {
	b := s.GetInlineBytes()
	if len(b) == 0 {
		b = []byte(s.GetInlineString())
	}
	if len(b) == 0 {
		r.refuse(field, "", "want inline_bytes or inline_string")
		return nil
	}
	return b
}

func (s *Secret) chain(text []byte) (leaf *x509.Certificate, err error) {
	all, err := id.ParseCertificates(text)
	if err != nil {
		return nil, err
	}
	for _, c := range all {
		s.Chain = append(s.Chain, c.Raw...)
	}
	if now := time.Now(); now.After(all[0].NotAfter) {
		return nil, fmt.Errorf("expired at %s", all[0].NotAfter.UTC().Format(time.RFC3339))
	}
	return all[0], nil
}

// maxAuthorities of a secret.
const maxAuthorities = 1024

func (s *Secret) authorities(text []byte) error {
	for n := 0; len(bytes.TrimSpace(text)) > 0; n++ {
		block, rest := pem.Decode(text)
		if block == nil || block.Type != "CERTIFICATE" || n == maxAuthorities {
			return fmt.Errorf("want PEM blocks of type CERTIFICATE alone, at most %d", maxAuthorities)
		}
		s.Authorities, text = append(s.Authorities, block.Bytes...), rest
	}
	_, err := id.ParseBundle(s.Authorities)
	return err
}

var errNoKey = errors.New("want one PEM block of a private key, not encrypted")

// privateKey is a key in PKCS #8, whatever form it came in.
func privateKey(text []byte, leaf *x509.Certificate) ([]byte, error) {
	block, rest := pem.Decode(text)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errNoKey
	}
	der := block.Bytes
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(der)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(der)
	default:
		return nil, errNoKey
	}
	if err != nil {
		return nil, errNoKey
	}
	if key != nil {
		if der, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
			return nil, errNoKey
		}
	}
	if _, err := id.ParseSigner(der, leaf); err != nil {
		return nil, err
	}
	return der, nil
}

// Secrets are the names of those that a listener needs.
func (l *Listener) Secrets() (names []string) {
	for _, c := range l.Chains {
		if c.TLS != nil {
			names = append(names, c.TLS.Certificates...)
			if c.TLS.Clients != "" {
				names = append(names, c.TLS.Clients)
			}
		}
	}
	return names
}

// Secrets are the names of those that a cluster needs.
func (c *Cluster) Secrets() (names []string) {
	if c.TLS != nil {
		names = append(names, c.TLS.Authorities)
		if c.TLS.Certificate != "" {
			names = append(names, c.TLS.Certificate)
		}
	}
	return names
}
