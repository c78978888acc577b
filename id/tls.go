package id

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// Credential is what one side of a connection proves itself with, and the
// roots it judges the other side by.
type Credential struct {
	Certificate tls.Certificate
	Roots       *x509.CertPool
}

// Source returns the credential of the moment. It is asked at each handshake,
// so a renewed certificate and new roots need no restart.
type Source func() (Credential, error)

// Static is a Source that never changes.
func Static(c Credential) Source { return func() (Credential, error) { return c, nil } }

var errNobodyExpected = errors.New("no expected peer was given, so none is let in")

// ServerTLS is TLS 1.3 for a server whose clients prove a name that expected
// accepts. A nil expected lets nobody in.
func ServerTLS(source Source, expected func(Name) error) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ClientAuth:             tls.RequireAnyClientCert, // verified below, under the roots of the moment
		SessionTicketsDisabled: true,                     // a resumed session would outlive its certificate
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			c, err := source()
			return &c.Certificate, err
		},
		VerifyConnection: verifier(source, expected, x509.ExtKeyUsageClientAuth),
	}
}

// ClientTLS is TLS 1.3 for a client of a server that proves a name that
// expected accepts. A nil expected accepts nobody.
func ClientTLS(source Source, expected func(Name) error) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // host names mean nothing here; VerifyConnection checks the identity
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			c, err := source()
			return &c.Certificate, err
		},
		VerifyConnection: verifier(source, expected, x509.ExtKeyUsageServerAuth),
	}
}

func verifier(source Source, expected func(Name) error, usage x509.ExtKeyUsage) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		c, err := source()
		if err != nil {
			return err
		}
		n, err := Verify(cs.PeerCertificates, c.Roots, time.Now(), usage)
		if err != nil {
			return err
		}
		if expected == nil {
			return fmt.Errorf("peer %s: %w", n, errNobodyExpected)
		}
		if err := expected(n); err != nil {
			return fmt.Errorf("peer %s: %w", n, err)
		}
		return nil
	}
}

// Only expects one name.
func Only(want Name) func(Name) error {
	return func(got Name) error {
		if want.IsZero() || got != want {
			return fmt.Errorf("want %q", want)
		}
		return nil
	}
}

// AnyOf expects any name of one kind in one trust domain.
func AnyOf(kind Kind, trustDomain string) func(Name) error {
	return func(got Name) error {
		if got.Kind() != kind || got.TrustDomain() != trustDomain {
			return fmt.Errorf("is not a name of the expected kind in trust domain %q", trustDomain)
		}
		return nil
	}
}

// PeerName is the name of the other side of a connection that ServerTLS or
// ClientTLS has verified.
func PeerName(cs *tls.ConnectionState) (Name, error) {
	if cs == nil || !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return Name{}, errors.New("peer name: the connection has no verified peer")
	}
	return FromCertificate(cs.PeerCertificates[0])
}
