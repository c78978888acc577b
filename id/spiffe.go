package id

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
)

// ParseSPIFFE reads any SPIFFE id, of whoever issues them: Name is the few that
// Hauberk itself gives. The path is "" or begins with a slash.
func ParseSPIFFE(s string) (trustDomain, path string, err error) {
	if len(s) > maxName {
		return "", "", fmt.Errorf("parse SPIFFE id: %d bytes, at most %d are allowed", len(s), maxName)
	}
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok {
		return "", "", fmt.Errorf("parse SPIFFE id %q: does not begin with spiffe://", s)
	}
	trustDomain = rest
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		trustDomain, path = rest[:i], rest[i:]
	}
	if trustDomain == "" || len(trustDomain) > 255 || strings.Trim(trustDomain, "abcdefghijklmnopqrstuvwxyz0123456789-._") != "" {
		return "", "", fmt.Errorf("parse SPIFFE id %q: trust domain is not 1 to 255 of a-z, 0-9, dot, dash and underscore", s)
	}
	if path == "" {
		return trustDomain, "", nil
	}
	for segment := range strings.SplitSeq(path[1:], "/") {
		if segment == "" || segment == "." || segment == ".." || !isSegment(segment) {
			return "", "", fmt.Errorf("parse SPIFFE id %q: path segment %q is not of letters, digits, dot, dash and underscore", s, segment)
		}
	}
	return trustDomain, path, nil
}

func isSegment(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return false
		}
	}
	return true
}

// SVID is the one SPIFFE id that a leaf certificate carries, whoever issued it,
// under the leaf rules of X.509-SVID. It does not verify the chain.
func SVID(leaf *x509.Certificate) (name, trustDomain string, err error) {
	if name, err = leafName(leaf); err != nil {
		return "", "", err
	}
	if trustDomain, _, err = ParseSPIFFE(name); err != nil {
		return "", "", fmt.Errorf("certificate: %w", err)
	}
	return name, trustDomain, nil
}

// leafName is the URI of a leaf: exactly one, not a CA, digital signatures yes,
// signing certificates and revocation lists no.
func leafName(leaf *x509.Certificate) (string, error) {
	switch {
	case len(leaf.URIs) != 1:
		return "", fmt.Errorf("certificate has %d URI names, want exactly one", len(leaf.URIs))
	case leaf.IsCA:
		return "", errors.New("certificate is a CA, not a leaf")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return "", errors.New("certificate may not make digital signatures")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return "", errors.New("certificate may sign certificates or revocation lists")
	}
	return uriName(leaf)
}

// maxDER bounds certificates that follow one another.
const maxDER = 1 << 20

// ParseDER reads certificates in DER that follow one another, leaf first where it
// is a chain, as SPIFFE's Workload API sends them.
func ParseDER(raw []byte) ([]*x509.Certificate, error) {
	if len(raw) > maxDER {
		return nil, fmt.Errorf("parse certificates: %d bytes, at most %d are allowed", len(raw), maxDER)
	}
	all, err := x509.ParseCertificates(raw)
	switch {
	case err != nil:
		return nil, fmt.Errorf("parse certificates: %w", err)
	case len(all) == 0:
		return nil, errors.New("parse certificates: none")
	}
	return all, nil
}

// ParseBundle reads the authorities of a trust domain, in DER one after another.
func ParseBundle(raw []byte) (*x509.CertPool, error) {
	all, err := ParseDER(raw)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range all {
		if !c.IsCA {
			return nil, fmt.Errorf("parse bundle: certificate %x is not a CA", c.SerialNumber)
		}
		pool.AddCert(c)
	}
	return pool, nil
}

// ParseSigner reads a private key in PKCS #8 and checks that it is that of a leaf.
// The key is of whatever kind the issuer gives.
func ParseSigner(der []byte, leaf *x509.Certificate) (crypto.Signer, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("parse key: it is not one in PKCS #8") // the cause may tell of its bytes
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("parse key: %T does not sign", key)
	}
	mine, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, fmt.Errorf("parse key: %w", err)
	}
	if !bytes.Equal(mine, leaf.RawSubjectPublicKeyInfo) {
		theirs, err := x509.MarshalPKIXPublicKey(leaf.PublicKey)
		if err != nil || !bytes.Equal(mine, theirs) {
			return nil, errors.New("parse key: it is not that of the certificate")
		}
	}
	return signer, nil
}
