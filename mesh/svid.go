package mesh

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/url"
	"sync"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/id"
)

const (
	signTimeout = 20 * time.Second
	retryFirst  = 100 * time.Millisecond
	retryMost   = 15 * time.Second
)

// svid is the identity of one sandbox: its newest certificate and key, and the
// roots that came with them. The key is made here, for each certificate anew.
type svid struct {
	mu     sync.Mutex
	cred   id.Credential
	leaf   *x509.Certificate
	serial string
	err    error         // why the last attempt failed
	first  chan struct{} // closed when there is a certificate
	kick   chan struct{} // try now
}

func newSVID() *svid {
	return &svid{first: make(chan struct{}), kick: make(chan struct{}, 1), err: errors.New("no certificate yet")}
}

// identity is a usable certificate.
type identity struct {
	cred   id.Credential
	serial string
}

// current returns the certificate in use. An expired one is no certificate.
func (v *svid) current() (identity, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch now := time.Now(); {
	case v.leaf == nil:
		return identity{}, fmt.Errorf("no certificate: %w", v.err)
	case now.After(v.leaf.NotAfter) && v.err != nil:
		return identity{}, fmt.Errorf("certificate expired at %s and could not be renewed: %w", v.leaf.NotAfter.UTC().Format(time.RFC3339), v.err)
	case now.After(v.leaf.NotAfter):
		return identity{}, fmt.Errorf("certificate expired at %s", v.leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return identity{v.cred, v.serial}, nil
}

// wait is current, with patience for the first certificate.
func (v *svid) wait(ctx context.Context) (identity, error) {
	select {
	case <-v.first:
	case <-ctx.Done():
	}
	return v.current()
}

// run obtains certificates until ctx ends: the next at half the life of the
// last, spread a little so that sandboxes started together do not ask together.
func (v *svid) run(ctx context.Context, p *Proxy, instance string, name func() string) {
	retry := retryFirst
	for {
		wait, err := v.renew(ctx, p, instance, name())
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			if !errors.Is(err, errNoNode) {
				p.events.add(api.Event{Kind: api.EventNoIdentity, Instance: instance, Reason: err.Error()})
			}
			wait, retry = jitter(retry), min(2*retry, retryMost)
		} else {
			retry = retryFirst
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-v.kick:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// now asks for an attempt at once, unless the certificate is fresh.
func (v *svid) now() {
	if i, err := v.current(); err == nil && i.serial != "" {
		return
	}
	select {
	case v.kick <- struct{}{}:
	default:
	}
}

// renew obtains one certificate and returns when to ask for the next.
func (v *svid) renew(ctx context.Context, p *Proxy, instance, name string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	cred, leaf, err := obtain(ctx, p, instance, name)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.err = err; err != nil {
		return 0, err
	}
	if v.leaf == nil {
		close(v.first)
	}
	v.cred, v.leaf, v.serial = cred, leaf, serialOf(leaf)
	return jitter(time.Until(leaf.NotAfter) / 2), nil
}

// jitter is about d, and never less than retryFirst: a clock that steps, or a
// certificate that expires as it comes, must not make asking for one a loop.
func jitter(d time.Duration) time.Duration {
	d = max(d, retryFirst)
	return d*9/10 + time.Duration(mathrand.Int64N(int64(d/5)+1))
}

// obtain makes a key and has it certified. What comes back is checked as if a
// stranger had sent it.
func obtain(ctx context.Context, p *Proxy, instance, name string) (cred id.Credential, leaf *x509.Certificate, err error) {
	want, err := id.ParseName(name)
	if err != nil {
		return cred, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cred, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{want.URL()}}, key)
	if err != nil {
		return cred, nil, err
	}
	reply, files, err := p.ask(ctx, &api.Message{Kind: api.KindCSR, Instance: instance, CSR: csr})
	closeAll(files)
	if err != nil {
		return cred, nil, fmt.Errorf("ask for a certificate: %w", err)
	}
	if reply.Certificate == nil {
		return cred, nil, errors.New("ask for a certificate: the answer holds none")
	}
	chain, err := id.ParseChain(reply.Certificate.Chain)
	if err != nil {
		return cred, nil, err
	}
	roots, err := id.ParsePool([]byte(reply.Certificate.Roots))
	if err != nil {
		return cred, nil, err
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		got, err := id.Verify(chain, roots, time.Now(), usage)
		if err != nil {
			return cred, nil, err
		}
		if got != want {
			return cred, nil, fmt.Errorf("the certificate is for %s, not %s", got, want)
		}
	}
	if pub, ok := chain[0].PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(&key.PublicKey) {
		return cred, nil, errors.New("the certificate is for another key")
	}
	cred = id.Credential{Roots: roots, Certificate: tls.Certificate{Certificate: reply.Certificate.Chain, PrivateKey: key, Leaf: chain[0]}}
	return cred, chain[0], nil
}

// serialOf is a serial number as epochs spell it.
func serialOf(c *x509.Certificate) string { return c.SerialNumber.Text(16) }
