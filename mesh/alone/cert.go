package alone

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// certificates are those of a listener, read again when their files change.
type certificates struct {
	files   []Certificate
	sources []string // names of those that are handed over
	from    *identities
	now     atomic.Pointer[certSet]
}

type certSet struct {
	all    []*tls.Certificate
	byName map[string][]*tls.Certificate
	stamps []string
}

var errNoCertificate = errors.New("no certificate")

func newCertificates(all []Certificate, from *identities) (*certificates, error) {
	c := &certificates{from: from}
	for _, one := range all {
		if one.Identity != "" {
			c.sources = append(c.sources, one.Identity)
		} else {
			c.files = append(c.files, one)
		}
	}
	set, err := c.read()
	if err != nil {
		return nil, err
	}
	c.now.Store(set)
	return c, nil
}

func (c Certificate) load() (*tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(c.Chain, c.Key)
	if err != nil {
		return nil, err
	}
	if cert.Leaf != nil && time.Now().After(cert.Leaf.NotAfter) {
		return nil, fmt.Errorf("%s expired on %s", c.Chain, cert.Leaf.NotAfter.UTC().Format(time.DateOnly))
	}
	return &cert, nil
}

func (c *certificates) read() (*certSet, error) {
	set := &certSet{byName: map[string][]*tls.Certificate{}, stamps: c.stamps()}
	for _, f := range c.files {
		cert, err := f.load()
		if err != nil {
			return nil, err
		}
		set.all = append(set.all, cert)
		for _, name := range cert.Leaf.DNSNames {
			name = strings.ToLower(name)
			set.byName[name] = append(set.byName[name], cert)
		}
	}
	return set, nil
}

// stamps tell whether the files are the ones that were read.
func (c *certificates) stamps() (all []string) {
	for _, f := range c.files {
		for _, path := range []string{f.Chain, f.Key} {
			if fi, err := os.Stat(path); err == nil {
				all = append(all, fmt.Sprint(fi.ModTime().UnixNano(), fi.Size()))
			} else {
				all = append(all, err.Error())
			}
		}
	}
	return all
}

// refresh reads the files again if they changed. What cannot be read leaves
// those in force.
func (c *certificates) refresh(log *slog.Logger, kind, name string) {
	stamps := c.stamps()
	have := c.now.Load()
	if strings.Join(stamps, " ") == strings.Join(have.stamps, " ") {
		return
	}
	set, err := c.read()
	if err != nil {
		log.Error("read changed certificates: the old ones stay", kind, name, "err", err)
		kept := *have
		kept.stamps = stamps // complain once
		c.now.Store(&kept)
		return
	}
	c.now.Store(set)
	log.Info("certificates changed", kind, name)
}

// pick chooses by the name the client asks for, then what its algorithms allow.
func (c *certificates) pick(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	set := c.now.Load()
	name := strings.ToLower(strings.TrimSuffix(hello.ServerName, "."))
	candidates := set.byName[name]
	if candidates == nil {
		if i := strings.IndexByte(name, '.'); i > 0 {
			candidates = set.byName["*"+name[i:]]
		}
	}
	if candidates == nil {
		candidates = set.all
	}
	for _, cert := range candidates {
		if hello.SupportsCertificate(cert) == nil {
			return cert, nil
		}
	}
	given, err := c.given(hello.SupportsCertificate)
	switch {
	case given != nil:
		return given, nil
	case len(candidates) > 0:
		return candidates[0], nil
	case err != nil:
		return nil, err
	}
	return nil, errNoCertificate
}

// given is a certificate that is handed over, one that fits if any does.
func (c *certificates) given(fits func(*tls.Certificate) error) (first *tls.Certificate, err error) {
	now := time.Now()
	for _, name := range c.sources {
		cert, why := c.from.certificate(name, now)
		if why != nil {
			err = errors.Join(err, why)
			continue
		}
		if fits(cert) == nil {
			return cert, nil
		}
		if first == nil {
			first = cert
		}
	}
	if first == nil && err != nil {
		c.from.refused.Add(1)
	}
	return first, err
}

// one is the certificate that is shown to servers.
func (c *certificates) one(fits func(*tls.Certificate) error) (*tls.Certificate, error) {
	if all := c.now.Load().all; len(all) > 0 {
		return all[0], nil
	}
	return c.given(fits)
}
