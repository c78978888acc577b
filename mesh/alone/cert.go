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
	files []Certificate
	now   atomic.Pointer[certSet]
}

type certSet struct {
	all    []*tls.Certificate
	byName map[string][]*tls.Certificate
	stamps []string
}

var errNoCertificate = errors.New("no certificate")

func newCertificates(files []Certificate) (*certificates, error) {
	c := &certificates{files: files}
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
func (c *certificates) refresh(log *slog.Logger, listener string) {
	stamps := c.stamps()
	have := c.now.Load()
	if strings.Join(stamps, " ") == strings.Join(have.stamps, " ") {
		return
	}
	set, err := c.read()
	if err != nil {
		log.Error("read changed certificates: the old ones stay", "listener", listener, "err", err)
		kept := *have
		kept.stamps = stamps // complain once
		c.now.Store(&kept)
		return
	}
	c.now.Store(set)
	log.Info("certificates changed", "listener", listener)
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
	if len(candidates) > 0 {
		return candidates[0], nil
	}
	return nil, errNoCertificate
}
