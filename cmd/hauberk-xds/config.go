package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"hauberk.dev/xds"
	"hauberk.dev/xds/jwks"
	"hauberk.dev/xds/proxyfile"
	"hauberk.dev/xds/workload"
)

const maxConfig = 1 << 20

// config is what xds.yaml says. Paths in it are relative to the file.
type config struct {
	Version  int        `yaml:"version"`
	Server   string     `yaml:"server"` // host:port, or unix:///path
	TLS      *serverTLS `yaml:"tls"`
	Node     node       `yaml:"node"`
	OnDemand bool       `yaml:"on_demand"`
	Proxy    proxy      `yaml:"proxy"`
	Status   string     `yaml:"status"` // Unix socket
	// Workload is a SPIFFE Workload API: unix:///path or tcp://address:port.
	Workload string `yaml:"workload"`
	// Keys are files of issuers' public keys that are kept true.
	Keys []issuerKeys `yaml:"keys"`
	// Identities is the Unix socket at which the proxy is handed keys.
	Identities string `yaml:"identities"`
	// Base is a file of what the proxy's configuration says beside listeners,
	// hosts and upstreams.
	Base        string                      `yaml:"base"`
	Secrets     map[string]proxyfile.Secret `yaml:"secrets"`
	Authorities map[string]string           `yaml:"authorities"`

	base []byte
}

// serverTLS proves the control plane, and this program to it.
type serverTLS struct {
	CA          string            `yaml:"ca"`
	Name        string            `yaml:"name"`
	Certificate *proxyfile.Secret `yaml:"certificate"`
}

// issuerKeys is a JSON Web Key Set at a URL, and the file it is kept in.
type issuerKeys struct {
	URL     string        `yaml:"url"`
	CA      string        `yaml:"ca"` // of the server; "" those of the system
	File    string        `yaml:"file"`
	Refresh time.Duration `yaml:"refresh"`
	MaxAge  time.Duration `yaml:"max_age"`
}

func (k *issuerKeys) options() jwks.Options {
	return jwks.Options{URL: k.URL, File: k.File, Refresh: k.Refresh, MaxAge: k.MaxAge}
}

type node struct {
	ID       string            `yaml:"id"`
	Cluster  string            `yaml:"cluster"`
	Region   string            `yaml:"region"`
	Zone     string            `yaml:"zone"`
	Metadata map[string]string `yaml:"metadata"`
}

// proxy is the one that is told.
type proxy struct {
	Admin string `yaml:"admin"` // its Unix socket
	File  string `yaml:"file"`  // that it begins with
}

// load reads a file and says everything that is wrong with it.
func load(path string) (*config, error) {
	raw, err := read(path)
	if err != nil {
		return nil, err
	}
	c := &config{}
	d := yaml.NewDecoder(strings.NewReader(string(raw)))
	d.KnownFields(true)
	if err := d.Decode(c); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read %s: %s", path, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read %s: more than one document", path)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	c.absolute(dir)
	faults := c.faults()
	if err := c.readBase(); err != nil {
		faults = append(faults, fmt.Sprintf("base: %v", err))
	}
	if len(faults) > 0 {
		return nil, fmt.Errorf("%s:\n%s", path, strings.Join(faults, "\n"))
	}
	return c, nil
}

// readBase reads what goes before the plan. What the plan says, it must not.
func (c *config) readBase() (err error) {
	c.base = []byte("version: 1\n")
	if c.Base != "" {
		if c.base, err = read(c.Base); err != nil {
			return err
		}
	}
	var keys map[string]yaml.Node
	if err := yaml.Unmarshal(c.base, &keys); err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	for _, key := range []string{"admin", "identities", "listeners", "hosts", "upstreams"} {
		if _, there := keys[key]; there {
			return fmt.Errorf("%s: is not of this file: admin is proxy.admin, identities is that of xds.yaml, and the rest the control plane says", key)
		}
	}
	c.base = fmt.Appendf(c.base, "\nadmin: %q\n", c.Proxy.Admin)
	if c.Identities != "" {
		c.base = fmt.Appendf(c.base, "identities: %q\n", c.Identities)
	}
	return nil
}

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(b) > maxConfig {
		err = fmt.Errorf("read %s: over %d bytes", path, maxConfig)
	}
	return b, err
}

func (c *config) absolute(dir string) {
	fix := func(p *string) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	for _, p := range []*string{&c.Proxy.Admin, &c.Proxy.File, &c.Base, &c.Status, &c.Identities} {
		fix(p)
	}
	for i := range c.Keys {
		fix(&c.Keys[i].CA)
		fix(&c.Keys[i].File)
	}
	for name, s := range c.Secrets {
		fix(&s.Chain)
		fix(&s.Key)
		c.Secrets[name] = s
	}
	for name, ca := range c.Authorities {
		fix(&ca)
		c.Authorities[name] = ca
	}
	if c.TLS != nil {
		fix(&c.TLS.CA)
		if own := c.TLS.Certificate; own != nil {
			fix(&own.Chain)
			fix(&own.Key)
		}
	}
}

func (c *config) faults() (faults []string) {
	want := func(ok bool, fault string) {
		if !ok {
			faults = append(faults, fault)
		}
	}
	local := strings.HasPrefix(c.Server, "unix:")
	want(c.Version == 1, fmt.Sprintf("version: %d is not known; write version: 1", c.Version))
	if c.Workload != "" {
		_, err := workload.Target(c.Workload)
		want(err == nil, fmt.Sprintf("workload: %q is not known; write unix:///path, or tcp:// with an IP address and a port", c.Workload))
		want(c.Identities != "", "identities: is missing; it is the socket at which the proxy is handed what workload says")
	}
	files := map[string]bool{}
	for i := range c.Keys {
		o := c.Keys[i].options()
		if err := o.Check(); err != nil {
			faults = append(faults, fmt.Sprintf("keys[%d].%v", i, err))
		}
		want(!files[o.File], fmt.Sprintf("keys[%d].file: another has %q", i, o.File))
		files[o.File] = true
	}
	if c.Server == "" && (c.Workload != "" || len(c.Keys) > 0) {
		want(c.TLS == nil && c.Base == "" && c.Proxy == (proxy{}), "server: is missing; tls, base and proxy go with it")
		slices.Sort(faults)
		return faults
	}
	want(c.Server != "", "server: is missing; write host:port, or unix:///path")
	want(local || c.TLS != nil, "tls: is missing; the server must be proved: give its authority in tls.ca, and its name in tls.name")
	want(!local || c.TLS == nil, "tls: goes with a server at host:port")
	want(c.TLS == nil || c.TLS.CA != "" && c.TLS.Name != "", "tls: want ca, the file of the server's authority, and name, that it must prove")
	want(c.Node.ID != "", "node.id: is missing; it says to the server who asks")
	want(c.Proxy.Admin != "", "proxy.admin: is missing; it is the socket of the proxy that is told")
	want(c.Proxy.File != "", "proxy.file: is missing; what was last in force is kept there, and the proxy begins with it")
	for name, s := range c.Secrets {
		want(s.Chain != "" && s.Key != "", fmt.Sprintf("secrets.%s: want chain and key", name))
	}
	slices.Sort(faults)
	return faults
}

// credentials prove the server. On a Unix socket its owner is the proof.
func (c *config) credentials() (credentials.TransportCredentials, error) {
	if c.TLS == nil {
		return insecure.NewCredentials(), nil
	}
	t := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: c.TLS.Name}
	var err error
	if t.RootCAs, err = roots(c.TLS.CA); err != nil {
		return nil, fmt.Errorf("tls.ca: %w", err)
	}
	if own := c.TLS.Certificate; own != nil {
		// Read again for each connection, for it is renewed while this runs.
		load := func() (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(own.Chain, own.Key)
			return &cert, err
		}
		if _, err := load(); err != nil {
			return nil, fmt.Errorf("tls.certificate: %w", err)
		}
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return credentials.NewTLS(t), nil
}

// roots are the authorities of a file.
func roots(path string) (*x509.CertPool, error) {
	pem, err := read(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", path)
	}
	return pool, nil
}

func (c *config) options() xds.Options {
	return xds.Options{
		Server: c.Server, OnDemand: c.OnDemand, Confirm: true,
		Node: xds.Node{ID: c.Node.ID, Cluster: c.Node.Cluster, Region: c.Node.Region, Zone: c.Node.Zone, Metadata: c.Node.Metadata},
	}
}

func (c *config) writer() proxyfile.Writer {
	return proxyfile.Writer{Base: c.base, Secrets: c.Secrets, Authorities: c.Authorities, Given: c.Identities != ""}
}
