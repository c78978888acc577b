package id

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// maxChain bounds a certificate chain and a bundle of roots.
const maxChain = 16

// FromCertificate returns the one name a leaf certificate carries, under the
// leaf rules of X.509-SVID: exactly one URI, not a CA, digital signatures yes,
// signing certificates and revocation lists no. It does not verify the chain.
func FromCertificate(leaf *x509.Certificate) (Name, error) {
	raw, err := leafName(leaf)
	if err != nil {
		return Name{}, err
	}
	n, err := ParseName(raw)
	if err != nil {
		return Name{}, fmt.Errorf("certificate: %w", err)
	}
	return n, nil
}

// uriName is the URI as the certificate spells it. A parsed URL would have
// lost the difference between "%61" and "a".
func uriName(leaf *x509.Certificate) (string, error) {
	for _, ext := range leaf.Extensions {
		if !ext.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			continue
		}
		var seq asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &seq); err != nil || len(rest) > 0 {
			return "", errors.New("certificate: malformed subject alternative names")
		}
		for rest := seq.Bytes; len(rest) > 0; {
			var v asn1.RawValue
			var err error
			if rest, err = asn1.Unmarshal(rest, &v); err != nil {
				return "", fmt.Errorf("certificate: subject alternative names: %w", err)
			}
			if v.Tag == 6 {
				return string(v.Bytes), nil
			}
		}
	}
	return "", errors.New("certificate has no URI name")
}

// Verify checks a chain (leaf first) against the roots at a time and returns
// the leaf's name.
func Verify(chain []*x509.Certificate, roots *x509.CertPool, now time.Time, usage x509.ExtKeyUsage) (Name, error) {
	switch {
	case len(chain) == 0:
		return Name{}, errors.New("verify certificate: the peer presented none")
	case len(chain) > maxChain:
		return Name{}, fmt.Errorf("verify certificate: chain of %d, at most %d are allowed", len(chain), maxChain)
	case roots == nil:
		return Name{}, errors.New("verify certificate: no roots were given, so nothing can be verified")
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
	}); err != nil {
		return Name{}, fmt.Errorf("verify certificate %x: %w", chain[0].SerialNumber, err)
	}
	return FromCertificate(chain[0])
}

// ParseChain reads DER certificates, leaf first.
func ParseChain(der [][]byte) ([]*x509.Certificate, error) {
	if len(der) == 0 || len(der) > maxChain {
		return nil, fmt.Errorf("parse chain: %d certificates, want 1 to %d", len(der), maxChain)
	}
	var out []*x509.Certificate
	for i, d := range der {
		c, err := x509.ParseCertificate(d)
		if err != nil {
			return nil, fmt.Errorf("parse chain: certificate %d: %w", i, err)
		}
		out = append(out, c)
	}
	return out, nil
}

// MarshalCertificates is the PEM form of DER certificates.
func MarshalCertificates(der ...[]byte) []byte {
	var b bytes.Buffer
	for _, d := range der {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: d}))
	}
	return b.Bytes()
}

// ParseCertificates reads PEM certificates, and nothing but certificates.
func ParseCertificates(raw []byte) ([]*x509.Certificate, error) {
	if len(raw) > 1<<20 {
		return nil, fmt.Errorf("parse certificates: %d bytes, at most %d are allowed", len(raw), 1<<20)
	}
	var der [][]byte
	for len(bytes.TrimSpace(raw)) > 0 {
		block, rest := pem.Decode(raw)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("parse certificates: there is something else than PEM blocks of type CERTIFICATE")
		}
		der, raw = append(der, block.Bytes), rest
	}
	return ParseChain(der)
}

// ParsePool reads PEM certificates into a set of roots, of at least one.
func ParsePool(raw []byte) (*x509.CertPool, error) {
	certs, err := ParseCertificates(raw)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range certs {
		if !c.IsCA {
			return nil, fmt.Errorf("parse roots: certificate %x is not a CA", c.SerialNumber)
		}
		pool.AddCert(c)
	}
	return pool, nil
}
