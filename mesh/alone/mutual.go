package alone

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
)

// Clients says which clients may come in: those that show a certificate.
type Clients struct {
	CA          string   `yaml:"ca"`          // who has signed it
	Authorities string   `yaml:"authorities"` // in place of ca: what is handed over under this name
	Bundles     []string `yaml:"bundles"`     // or trust domains: clients show a SPIFFE id of one, and its bundle decides
	Names       []string `yaml:"names"`       // SPIFFE ids or DNS names; one may end in *; none: any
	Optional    bool     `yaml:"optional"`    // those without one may come in too
}

var errNotNamed = errors.New("the client's certificate has no name that is allowed here")

// readPool reads certificates of authorities.
func readPool(path string) (*x509.CertPool, [sha256.Size]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, [sha256.Size]byte{}, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, [sha256.Size]byte{}, fmt.Errorf("%s holds no certificate in PEM", path)
	}
	return pool, sha256.Sum256(b), nil
}

// serverTLS is how a listener ends TLS. Its certificates and authorities are read
// again when their files change, for the connections after that.
type serverTLS struct {
	certs *certificates
	rules *Clients
	base  *tls.Config
	trust *trust            // by what is handed over; nil: by a file, or nobody is asked
	sum   [sha256.Size]byte // of the authorities in force
	now   atomic.Pointer[tls.Config]
}

func newServerTLS(l *Listener, from *identities) (*serverTLS, error) {
	certs, err := newCertificates(l.TLS.Certificates, from)
	if err != nil {
		return nil, err
	}
	s := &serverTLS{certs: certs, rules: l.TLS.Clients, base: &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: certs.pick}}
	if l.TLS.MinVersion == "1.3" {
		s.base.MinVersion = tls.VersionTLS13
	}
	if l.Protocol == "http" {
		s.base.NextProtos = map[string][]string{"on": {"h2", "http/1.1"}, "only": {"h2"}, "off": {"http/1.1"}}[l.HTTP2]
	}
	s.now.Store(s.base)
	switch {
	case s.rules == nil:
		return s, nil
	case s.rules.CA == "":
		s.trustGiven(from)
		return s, nil
	}
	pool, sum, err := readPool(s.rules.CA)
	if err != nil {
		return nil, err
	}
	s.believe(pool, sum)
	return s, nil
}

// trustGiven has clients verified by what is handed over at the moment they come.
func (s *serverTLS) trustGiven(from *identities) {
	s.trust = &trust{source: from, bundles: s.rules.Bundles, authorities: s.rules.Authorities, names: s.rules.Names, usage: x509.ExtKeyUsageClientAuth}
	c := s.base.Clone()
	c.SessionTicketsDisabled = true // each handshake shows the certificate of its time
	c.ClientAuth = tls.RequireAnyClientCert
	if s.rules.Optional {
		c.ClientAuth = tls.RequestClientCert
	}
	c.VerifyConnection = func(state tls.ConnectionState) error {
		if s.rules.Optional && len(state.PeerCertificates) == 0 {
			return nil
		}
		return s.trust.verify(state)
	}
	s.now.Store(c)
}

// believe puts authorities in force. Sessions that others have vouched for are not
// taken up again: the tickets of another configuration cannot be read.
func (s *serverTLS) believe(pool *x509.CertPool, sum [sha256.Size]byte) {
	c := s.base.Clone()
	c.ClientCAs, c.ClientAuth = pool, tls.RequireAndVerifyClientCert
	if s.rules.Optional {
		c.ClientAuth = tls.VerifyClientCertIfGiven
	}
	c.VerifyConnection = func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 || s.rules.names(state.PeerCertificates[0]) {
			return nil // one that must show a certificate has done so
		}
		return errNotNamed
	}
	s.sum = sum
	s.now.Store(c)
}

// config is for tls.Server: what is in force when a client comes.
func (s *serverTLS) config() *tls.Config { return s.now.Load() }

func (s *serverTLS) refresh(log *slog.Logger, listener string) {
	s.certs.refresh(log, "listener", listener)
	if s.rules == nil || s.trust != nil {
		return
	}
	pool, sum, err := readPool(s.rules.CA)
	switch {
	case err != nil:
		log.Error("read changed authorities: the old ones stay", "listener", listener, "err", err)
	case sum != s.sum:
		s.believe(pool, sum)
		log.Info("authorities changed", "listener", listener)
	}
}

// names says whether a certificate has a name that is allowed.
func (c *Clients) names(cert *x509.Certificate) bool {
	if len(c.Names) == 0 {
		return true
	}
	for _, name := range c.Names {
		for _, u := range cert.URIs {
			if isNamed(name, u.String()) {
				return true
			}
		}
		for _, d := range cert.DNSNames {
			if isNamed(strings.ToLower(name), strings.ToLower(d)) {
				return true
			}
		}
	}
	return false
}

func isNamed(pattern, name string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(name, prefix)
	}
	return name == pattern
}

// peer is a client that has shown a certificate.
type peer struct {
	name      string // its SPIFFE id, else its first DNS name
	forwarded []byte // what servers are told of it, as Envoy's x-forwarded-client-cert
}

// peerOf is who a connection comes from, nil if it does not say.
func peerOf(c *tls.Conn) *peer {
	certs := c.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return nil
	}
	p := &peer{forwarded: fmt.Appendf(nil, "Hash=%x", sha256.Sum256(certs[0].Raw))}
	for _, u := range certs[0].URIs {
		p.add("URI", u.String())
	}
	for _, d := range certs[0].DNSNames {
		p.add("DNS", d)
	}
	return p
}

func (p *peer) add(kind, name string) {
	if strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c > '~' || strings.ContainsRune(`",;=`, c) }) {
		name = url.QueryEscape(name)
	}
	if p.name == "" {
		p.name = name
	}
	p.forwarded = append(append(append(append(p.forwarded, ';'), kind...), '='), name...)
}

// verify checks a server by the names its certificate may have, whatever host it
// was reached as.
func (t *ClientTLS) verify(roots *x509.CertPool) func(tls.ConnectionState) error {
	allowed := &Clients{Names: t.Names}
	return func(state tls.ConnectionState) error {
		certs := state.PeerCertificates
		if len(certs) == 0 {
			return errNoCertificate
		}
		others := x509.NewCertPool()
		for _, c := range certs[1:] {
			others.AddCert(c)
		}
		if _, err := certs[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: others}); err != nil {
			return err
		}
		if !allowed.names(certs[0]) {
			return errors.New("the server's certificate has no name that is allowed here")
		}
		return nil
	}
}

// upstreamTLS is how an upstream is spoken to; its files are read again when they
// change.
type upstreamTLS struct {
	of    Upstream
	shown *certificates // nil: none
	trust *trust        // by what is handed over, nil: by a file or the system
	rules string
	given string // which authorities were in force when servers were last checked
	now   atomic.Pointer[tls.Config]
}

func newUpstreamTLS(u Upstream, from *identities) (*upstreamTLS, error) {
	t := &upstreamTLS{of: u}
	if c := u.TLS.Certificate; c != nil {
		var err error
		if t.shown, err = newCertificates([]Certificate{*c}, from); err != nil {
			return nil, err
		}
	}
	cfg, rules, err := u.TLS.config(u)
	if err != nil {
		return nil, err
	}
	if u.TLS.Authorities != "" || len(u.TLS.Bundles) > 0 {
		t.trust = &trust{source: from, bundles: u.TLS.Bundles, authorities: u.TLS.Authorities, names: u.TLS.Names, host: cfg.ServerName, usage: x509.ExtKeyUsageServerAuth}
		t.given = from.sum(t.trust.pools())
		cfg.InsecureSkipVerify = true // by the system's authorities; those handed over decide
		cfg.VerifyConnection = t.trust.verify
	}
	t.put(cfg, rules)
	return t, nil
}

func (t *upstreamTLS) put(cfg *tls.Config, rules string) {
	if t.shown != nil {
		cfg.GetClientCertificate = func(asked *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return t.shown.one(asked.SupportsCertificate)
		}
	}
	t.rules = rules
	t.now.Store(cfg)
}

// refresh reads changed files. It tells whether servers must be checked anew.
func (t *upstreamTLS) refresh(log *slog.Logger) (anew bool) {
	if t.shown != nil {
		t.shown.refresh(log, "upstream", t.of.Name)
	}
	if t.trust != nil {
		before := t.given
		t.given = t.trust.source.sum(t.trust.pools())
		return t.given != before
	}
	if t.of.TLS.CA == "" {
		return false
	}
	cfg, rules, err := t.of.TLS.config(t.of)
	switch {
	case err != nil:
		log.Error("read changed authorities: the old ones stay", "upstream", t.of.Name, "err", err)
	case rules != t.rules:
		t.put(cfg, rules)
		log.Info("authorities changed", "upstream", t.of.Name)
		return true
	}
	return false
}
