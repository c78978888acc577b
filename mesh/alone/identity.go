package alone

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/id"
	"hauberk.dev/internal/svidlink"
)

// How long a process that takes another's place waits for identities: for those of its
// file, and for those of what the other was told, which waits meanwhile.
const (
	awaitTime     = 10 * time.Second
	awaitToldTime = 2 * time.Second
)

// firstIdentity is the name of the first of a Workload API's identities.
const firstIdentity = "default"

// identities are certificates and authorities that hauberk-xds hands over. They
// are in memory only, outlive reloads, and are asked for at each handshake.
type identities struct {
	path string
	log  *slog.Logger
	now  atomic.Pointer[proven]
	away atomic.Pointer[string] // why nobody hands them over, nil if somebody does
	// changed has a note when other authorities are in force.
	changed chan struct{}

	mu    sync.Mutex
	short []string // why handshakes were refused when that was last looked at

	rotations atomic.Uint64
	malformed atomic.Uint64
	refused   atomic.Uint64 // handshakes, for want of a certificate or an authority
}

// proven is what was handed over last. It never changes.
type proven struct {
	certs []shownAs
	pools map[string]pool // by name
	why   string          // what the source says of itself
}

// shownAs is a certificate under its name.
type shownAs struct {
	name, hint string
	cert       *tls.Certificate
}

type pool struct {
	roots *x509.CertPool
	sum   [sha256.Size]byte
}

func newIdentities(path string, log *slog.Logger) *identities {
	none := "nothing was asked yet"
	n := &identities{path: path, log: log, changed: make(chan struct{}, 1)}
	n.now.Store(&proven{})
	n.away.Store(&none)
	return n
}

// run takes what is handed over until ctx ends.
func (n *identities) run(ctx context.Context) {
	svidlink.Follow(ctx, n.path, n.take, func(err error) {
		if err == nil {
			n.away.Store(nil)
			n.log.Info("identities are handed over", "from", n.path)
			return
		}
		why := err.Error()
		if before := n.away.Swap(&why); before == nil || *before != why {
			n.log.Warn("nobody hands identities over: those there are stay until they expire", "err", err)
		}
	})
}

// await asks until a world has all it needs: who takes the place of another, which
// has it, must not refuse handshakes in its stead.
func (n *identities) await(ctx context.Context, w *world, most time.Duration) error {
	if n == nil || len(w.unready(time.Now())) == 0 {
		return nil
	}
	inner, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	svidlink.Follow(inner, n.path, func(s *svidlink.Set) error {
		err := n.take(s)
		if len(w.unready(time.Now())) == 0 {
			cancel()
		}
		return err
	}, func(err error) {
		if err != nil {
			why := err.Error()
			n.away.Store(&why)
		}
	})
	if why := w.unready(time.Now()); len(why) > 0 {
		return errors.New(strings.Join(why, "; "))
	}
	return nil
}

// take puts a set in force, all of it or nothing.
func (n *identities) take(s *svidlink.Set) error {
	defer s.Clear()
	next, err := read(s)
	if err != nil {
		n.malformed.Add(1)
		n.log.Error("identities refused: those before stay", "err", err)
		return err
	}
	before := n.now.Swap(next)
	for _, h := range next.certs {
		if old := before.find(h.name); old == nil || !slices.Equal(old.Certificate[0], h.cert.Certificate[0]) {
			n.rotations.Add(1)
			n.log.Info("identity in force", "name", h.name, "serial", fmt.Sprintf("%x", h.cert.Leaf.SerialNumber), "until", h.cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	if why := next.why; why != "" && why != before.why {
		n.log.Warn("the source of identities says", "why", why)
	}
	select {
	case n.changed <- struct{}{}:
	default:
	}
	return nil
}

func read(s *svidlink.Set) (*proven, error) {
	p := &proven{pools: map[string]pool{}, why: s.Why}
	for i := range s.Identities {
		d := &s.Identities[i]
		chain, err := id.ParseDER(d.Chain)
		if err != nil {
			return nil, fmt.Errorf("identity %q: %w", d.Name, err)
		}
		if strings.HasPrefix(d.Name, "spiffe://") {
			if name, _, err := id.SVID(chain[0]); err != nil || name != d.Name {
				return nil, fmt.Errorf("identity %q: %w", d.Name, errors.Join(err, fmt.Errorf("the certificate is that of %q", name)))
			}
		}
		key, err := id.ParseSigner(d.Key, chain[0])
		if err != nil {
			return nil, fmt.Errorf("identity %q: %w", d.Name, err)
		}
		cert := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
		for _, c := range chain {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
		p.certs = append(p.certs, shownAs{d.Name, d.Hint, cert})
	}
	for _, b := range s.Bundles {
		roots, err := id.ParseBundle(b.DER)
		if err != nil {
			return nil, fmt.Errorf("bundle %q: %w", b.Name, err)
		}
		p.pools[b.Name] = pool{roots, sha256.Sum256(b.DER)}
	}
	return p, nil
}

// find is the certificate of a name, else the first with it as its hint.
func (p *proven) find(name string) *tls.Certificate {
	if name == firstIdentity && len(p.certs) > 0 && strings.HasPrefix(p.certs[0].name, "spiffe://") {
		return p.certs[0].cert
	}
	for _, h := range p.certs {
		if h.name == name {
			return h.cert
		}
	}
	for _, h := range p.certs {
		if h.hint == name {
			return h.cert
		}
	}
	return nil
}

// certificate is the one in force under a name. One that is not there, or has
// expired, is an error that says why.
func (n *identities) certificate(name string, now time.Time) (*tls.Certificate, error) {
	cert := n.now.Load().find(name)
	switch {
	case cert == nil:
		return nil, fmt.Errorf("there is no identity %q: %s", name, n.cause())
	case now.After(cert.Leaf.NotAfter):
		return nil, fmt.Errorf("identity %q expired at %s and has no successor: %s", name, cert.Leaf.NotAfter.UTC().Format(time.RFC3339), n.cause())
	}
	return cert, nil
}

// roots are the authorities in force under a name.
func (n *identities) roots(name string) (*x509.CertPool, error) {
	p, ok := n.now.Load().pools[name]
	if !ok {
		return nil, fmt.Errorf("there are no authorities %q: %s", name, n.cause())
	}
	return p.roots, nil
}

// cause is why something is not there, as far as it is known.
func (n *identities) cause() string {
	if why := n.away.Load(); why != nil {
		return *why
	}
	if why := n.now.Load().why; why != "" {
		return why
	}
	return "it was not handed over at " + n.path
}

// sum tells authorities of these names from others.
func (n *identities) sum(names []string) string {
	var b strings.Builder
	now := n.now.Load()
	for _, name := range names {
		if p, ok := now.pools[name]; ok {
			fmt.Fprintf(&b, "%x", p.sum)
		}
		b.WriteByte(' ')
	}
	return b.String()
}

// trust is by whom the other side of a connection must be vouched for, where that
// is handed over.
type trust struct {
	source      *identities
	bundles     []string // trust domains
	authorities string   // or a name that a control plane gives
	names       []string // one of which the other side must have
	host        string   // or this host, of a server
	usage       x509.ExtKeyUsage
}

var errNoPeer = errors.New("the other side has shown no certificate")

// pools are the names of the authorities it takes.
func (t *trust) pools() (names []string) {
	if t.authorities != "" {
		return []string{t.authorities}
	}
	for _, domain := range t.bundles {
		names = append(names, "spiffe://"+domain)
	}
	return names
}

// verify checks the certificates of the other side at each handshake, by the
// authorities of the moment.
func (t *trust) verify(state tls.ConnectionState) error {
	chain := state.PeerCertificates
	if len(chain) == 0 {
		return errNoPeer
	}
	err := t.vouch(chain)
	if err != nil {
		t.source.refused.Add(1)
	}
	return err
}

func (t *trust) vouch(chain []*x509.Certificate) error {
	o := x509.VerifyOptions{Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{t.usage}}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	name := t.authorities
	var own string // the SPIFFE id of the other side
	if name == "" {
		var domain string
		var err error
		if own, domain, err = id.SVID(chain[0]); err != nil {
			return err
		}
		if !slices.Contains(t.bundles, domain) {
			return fmt.Errorf("%s is of a trust domain that is not allowed here", own)
		}
		name = "spiffe://" + domain
	}
	var err error
	if o.Roots, err = t.source.roots(name); err != nil {
		return err
	}
	if len(t.names) == 0 && own == "" {
		o.DNSName = t.host
	}
	if _, err := chain[0].Verify(o); err != nil {
		return err
	}
	if len(t.names) == 0 {
		return nil
	}
	if own != "" && slices.ContainsFunc(t.names, func(p string) bool { return isNamed(p, own) }) ||
		own == "" && (&Clients{Names: t.names}).names(chain[0]) {
		return nil
	}
	return fmt.Errorf("%s has no name that is allowed here", selfNamed(own, chain[0]))
}

// selfNamed is what a certificate calls itself, for a message.
func selfNamed(own string, leaf *x509.Certificate) string {
	if own == "" {
		own = leaf.Subject.String()
	}
	return fmt.Sprintf("%.256q", own)
}

// wanted are the names of identities and authorities a world needs.
func (w *world) wanted() (certs, pools []string) {
	for _, s := range w.sites {
		if s.tls == nil {
			continue
		}
		certs = append(certs, s.tls.certs.sources...)
		if s.tls.trust != nil {
			pools = append(pools, s.tls.trust.pools()...)
		}
	}
	for _, u := range w.upstreams {
		if u.tls == nil {
			continue
		}
		if u.tls.shown != nil {
			certs = append(certs, u.tls.shown.sources...)
		}
		if u.tls.trust != nil {
			pools = append(pools, u.tls.trust.pools()...)
		}
	}
	slices.Sort(certs)
	slices.Sort(pools)
	return slices.Compact(certs), slices.Compact(pools)
}

// unready is why handshakes are refused, "" if none are.
func (w *world) unready(now time.Time) (why []string) {
	certs, pools := w.wanted()
	for _, name := range certs {
		if _, err := w.identities.certificate(name, now); err != nil {
			why = append(why, err.Error())
		}
	}
	for _, name := range pools {
		if _, err := w.identities.roots(name); err != nil {
			why = append(why, err.Error())
		}
	}
	return why
}

// news has a note when something else was handed over.
func (n *identities) news() <-chan struct{} {
	if n == nil {
		return nil
	}
	return n.changed
}

// watch tells when something that is configured goes missing, and when all is there
// again.
func (n *identities) watch(w *world, now time.Time) {
	why := w.unready(now)
	n.mu.Lock()
	before := n.short
	n.short = why
	n.mu.Unlock()
	switch {
	case slices.Equal(why, before):
	case len(why) > 0:
		n.log.Error("handshakes are refused for want of an identity", "why", strings.Join(why, "; "))
	default:
		n.log.Info("every identity that is configured is there")
	}
}

// ready says whether every handshake could succeed, as far as that lies here.
func (p *Proxy) ready(now time.Time) (body []byte, status string) {
	w := p.enter()
	defer w.leave()
	why := []string{}
	if p.stopping.Load() {
		why = append(why, "the proxy is stopping")
	}
	if w.identities != nil {
		why = append(why, w.unready(now)...)
	}
	status = "200 OK"
	if len(why) > 0 {
		status = "503 Service Unavailable"
	}
	body, err := json.Marshal(struct {
		Ready bool     `json:"ready"`
		Why   []string `json:"why,omitempty"`
	}{len(why) == 0, why})
	if err != nil { // never: text and a bool
		return []byte(err.Error()), "500 Internal Server Error"
	}
	return append(body, '\n'), status
}

func (n *identities) metrics(b *strings.Builder, head func(name, kind, help string), now time.Time) {
	if n == nil {
		return
	}
	for _, m := range []struct {
		name, help string
		value      uint64
	}{
		{"hauberk_proxy_identity_rotations_total", "Certificates put in force that were handed over.", n.rotations.Load()},
		{"hauberk_proxy_identity_malformed_total", "Sets of identities that were refused.", n.malformed.Load()},
		{"hauberk_proxy_identity_refused_total", "Handshakes that failed for want of an identity, or because the other side's was not believed.", n.refused.Load()},
	} {
		head(m.name, "counter", m.help)
		fmt.Fprintf(b, "%s %d\n", m.name, m.value)
	}
	connected := 0
	if n.away.Load() == nil {
		connected = 1
	}
	head("hauberk_proxy_identity_source_up", "gauge", "Whether identities are handed over.")
	fmt.Fprintf(b, "hauberk_proxy_identity_source_up %d\n", connected)
	head("hauberk_proxy_identity_expires_seconds", "gauge", "Time until a certificate ends; below zero it has.")
	for _, h := range n.now.Load().certs {
		fmt.Fprintf(b, "hauberk_proxy_identity_expires_seconds{identity=%q} %.0f\n", h.name, h.cert.Leaf.NotAfter.Sub(now).Seconds())
	}
}

// certificate notes what is wrong with one.
func (r *reading) certificate(at string, all *Config, c Certificate) {
	if c.Identity != "" {
		if c.Chain+c.Key != "" {
			r.fault(at, "identity goes without chain and key, which are files")
		}
		r.given(at+".identity", all)
		return
	}
	if _, err := c.load(); err != nil {
		r.fault(at, "%v", err)
	}
}

// given notes that nobody hands over what is named.
func (r *reading) given(at string, all *Config) {
	if all.Identities == "" {
		r.fault(at, "names what nobody hands over; name the socket of hauberk-xds in identities at the top")
	}
}

// trust notes what is wrong with who is to be believed.
func (r *reading) trust(at string, all *Config, ca, authorities string, bundles, names []string, must bool) {
	ways := 0
	for _, there := range []bool{ca != "", authorities != "", len(bundles) > 0} {
		if there {
			ways++
		}
	}
	switch {
	case ways > 1:
		r.fault(at, "more than one of ca, authorities and bundles; use one")
	case ways == 0 && must:
		r.fault(at+".ca", "is missing; name a file of authorities, or use authorities or bundles")
	}
	if authorities != "" {
		r.given(at+".authorities", all)
	}
	for i, domain := range bundles {
		r.given(at+".bundles", all)
		if _, path, err := id.ParseSPIFFE("spiffe://" + domain); err != nil || path != "" {
			r.fault(fmt.Sprintf("%s.bundles[%d]", at, i), "%q is no trust domain; write for example example.org", domain)
		}
	}
	for i, name := range names {
		// A pattern that ends within a trust domain would match others.
		rest, ok := strings.CutPrefix(strings.TrimSuffix(name, "*"), "spiffe://")
		if len(bundles) > 0 && (!ok || strings.HasSuffix(name, "*") && !strings.Contains(rest, "/")) {
			r.fault(fmt.Sprintf("%s.names[%d]", at, i), "%q is no SPIFFE id; write spiffe://example.org/web, spiffe://example.org/ns/shop/* or spiffe://example.org/*", name)
		}
	}
}
