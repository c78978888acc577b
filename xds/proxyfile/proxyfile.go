// Package proxyfile writes a plan as the file that tells hauberk-mesh -c what to
// do.
//
// What the proxy cannot do, or would do otherwise than the plan says, is refused
// and never left out. It reads no file and knows no key: secrets have names in
// the plan, and files that whoever runs the proxy gave them, or are handed to it by
// hauberk-xds.
package proxyfile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"hauberk.dev/plan"
)

// Secret is a chain and its key, in files the proxy can read.
type Secret struct {
	Chain string `yaml:"chain" json:"chain"`
	Key   string `yaml:"key" json:"key"`
}

// Writer writes plans for one proxy.
type Writer struct {
	// Base is what the file says beside listeners, hosts and upstreams.
	Base []byte
	// Secrets and Authorities are the files of what plans name.
	Secrets     map[string]Secret
	Authorities map[string]string
	// Given says that what is in no file is handed to the proxy under its name.
	Given bool
}

// Index says what the entries of a file are of, by their place in it.
type Index struct {
	Listeners, Upstreams []string
	Hosts                []string // the listener
}

// Write writes the file for a plan.
func (w *Writer) Write(p *plan.Proxy) (text []byte, index Index, err error) {
	d := document{w: w, known: map[string]bool{}}
	for i := range p.Clusters {
		c := &p.Clusters[i]
		u, err := w.upstream(c)
		if err != nil {
			return nil, index, fmt.Errorf("cluster %q: %w", c.Name, err)
		}
		d.upstreams = append(d.upstreams, u)
		d.known[c.Name] = true
	}
	for i := range p.Listeners {
		if err := d.listener(&p.Listeners[i]); err != nil {
			return nil, index, fmt.Errorf("listener %q: %w", p.Listeners[i].Name, err)
		}
	}
	for _, name := range d.missing {
		// As in Envoy, what is routed to a cluster that is not there is answered 503.
		d.upstreams = append(d.upstreams, upstream{Name: name, Endpoints: []endpoint{}})
	}
	for _, l := range d.listeners {
		index.Listeners = append(index.Listeners, l.Name)
	}
	for _, u := range d.upstreams {
		index.Upstreams = append(index.Upstreams, u.Name)
	}
	for _, h := range d.hosts {
		index.Hosts = append(index.Hosts, h.Listeners[0])
	}
	b := bytes.NewBuffer(slices.Clone(w.Base))
	if b.Len() > 0 && !bytes.HasSuffix(b.Bytes(), []byte("\n")) {
		b.WriteByte('\n')
	}
	err = errors.Join(section(b, "listeners", d.listeners), section(b, "hosts", d.hosts), section(b, "upstreams", d.upstreams))
	return b.Bytes(), index, err
}

// section writes a list, each entry on a line: JSON, which is YAML too.
func section[T any](b *bytes.Buffer, name string, all []T) error {
	b.WriteString(name + ":")
	if len(all) == 0 {
		b.WriteString(" []\n")
		return nil
	}
	b.WriteByte('\n')
	for i := range all {
		line, err := json.Marshal(&all[i])
		if err != nil {
			return fmt.Errorf("%s[%d]: %w", name, i, err)
		}
		b.WriteString("- ")
		b.Write(line)
		b.WriteByte('\n')
	}
	return nil
}

// Listener judges a listener by itself: its routes may still be to come.
func (w *Writer) Listener(l *plan.Listener) error {
	return (&document{w: w, known: map[string]bool{}}).listener(l)
}

// Hosts judges routes by themselves.
func (w *Writer) Hosts(all []plan.Host) error {
	_, err := (&document{w: w, known: map[string]bool{}}).table("x", all)
	return err
}

// Cluster judges a cluster by itself.
func (w *Writer) Cluster(c *plan.Cluster) error {
	_, err := w.upstream(c)
	return err
}

// document is a file in the making.
type document struct {
	w         *Writer
	listeners []listener
	hosts     []host
	upstreams []upstream
	known     map[string]bool // clusters
	missing   []string        // clusters that are routed to and not there
}

// to notes that a cluster is routed to.
func (d *document) to(cluster string) string {
	if !d.known[cluster] {
		d.known[cluster] = true
		d.missing = append(d.missing, cluster)
	}
	return cluster
}

type listener struct {
	Name     string      `json:"name"`
	Address  string      `json:"address"`
	Protocol string      `json:"protocol"`
	HTTP2    string      `json:"http2,omitempty"`
	TLS      *serverTLS  `json:"tls,omitempty"`
	Upstream string      `json:"upstream,omitempty"`
	Names    []nameRoute `json:"names,omitempty"`
}

type serverTLS struct {
	Certificates []certificate `json:"certificates"`
	Clients      *clients      `json:"clients,omitempty"`
}

// clients must show a certificate of these authorities.
type clients struct {
	CA          string `json:"ca,omitempty"`
	Authorities string `json:"authorities,omitempty"`
}

// certificate is in files, or is handed over under its name.
type certificate struct {
	Chain    string `json:"chain,omitempty"`
	Key      string `json:"key,omitempty"`
	Identity string `json:"identity,omitempty"`
}

// certificate is what the proxy is told of a secret.
func (w *Writer) certificate(name string) (certificate, error) {
	if s, there := w.Secrets[name]; there {
		return certificate{Chain: s.Chain, Key: s.Key}, nil
	}
	if !w.Given {
		return certificate{}, fmt.Errorf("tls_certificate_sds_secret_configs: %q: no secret of this name was given to the proxy", name)
	}
	return certificate{Identity: name}, nil
}

// authorities is a file of them, or the name under which they are handed over.
func (w *Writer) authorities(name string) (file, given string, err error) {
	if file, there := w.Authorities[name]; there {
		return file, "", nil
	}
	if !w.Given {
		return "", "", fmt.Errorf("validation_context_sds_secret_config: %q: no authorities of this name were given to the proxy", name)
	}
	return "", name, nil
}

type nameRoute struct {
	Names    []string `json:"names"`
	Upstream string   `json:"upstream"`
}

func (d *document) listener(l *plan.Listener) error {
	out := listener{Name: l.Name, Address: l.Address.String()}
	if len(l.Chains) == 0 {
		return errors.New("no chain")
	}
	if l.Chains[0].HTTP != nil {
		return d.http(out, l.Chains)
	}
	if l.Chains[0].TLS == nil && (len(l.Chains) > 1 || len(l.Chains[0].ServerNames) > 0) {
		return d.byName(out, l.Chains)
	}
	if len(l.Chains) > 1 {
		return errors.New("several chains that end TLS and carry bytes: one is held")
	}
	to, err := d.bytes(l.Chains[0].TCP)
	if err != nil {
		return err
	}
	if err := anyName(l.Chains); err != nil {
		return err
	}
	if t := l.Chains[0].TLS; t != nil && len(t.ALPN) > 0 {
		return fmt.Errorf("alpn_protocols: %q: nothing is offered where bytes are carried", t.ALPN)
	}
	out.Protocol, out.Upstream = "tcp", to
	if out.TLS, err = d.w.certificates(l.Chains); err != nil {
		return err
	}
	d.listeners = append(d.listeners, out)
	return nil
}

// bytes is the one cluster that a chain of TCP goes to.
func (d *document) bytes(t *plan.TCP) (string, error) {
	if t == nil {
		return "", errors.New("chains of TCP beside chains of HTTP: one kind is held of a listener")
	}
	if len(t.To) != 1 {
		return "", fmt.Errorf("weighted_clusters: %d: one is held for TCP", len(t.To))
	}
	return d.to(t.To[0].Cluster), nil
}

// byName passes TLS on, by the server name.
func (d *document) byName(out listener, chains []plan.Chain) error {
	out.Protocol = "sni"
	for _, c := range chains {
		to, err := d.bytes(c.TCP)
		if err != nil {
			return err
		}
		names := c.ServerNames
		if len(names) == 0 {
			names = []string{"*"}
		}
		out.Names = append(out.Names, nameRoute{Names: names, Upstream: to})
	}
	d.listeners = append(d.listeners, out)
	return nil
}

// http serves the hosts of a listener. Several chains must differ in their
// certificates alone, which the proxy chooses by the names in them.
func (d *document) http(out listener, chains []plan.Chain) (err error) {
	out.Protocol = "http"
	for i, c := range chains {
		if c.HTTP == nil {
			return errors.New("chains of TCP beside chains of HTTP: one kind is held of a listener")
		}
		two, err := versions(&c)
		switch {
		case err != nil:
			return err
		case i > 0 && two != out.HTTP2:
			return errors.New("codec_type: chains that differ in it are not held")
		case i > 0 && !slices.EqualFunc(c.HTTP.Hosts, chains[0].HTTP.Hosts, sameHost):
			return errors.New("filter_chains: chains with routes of their own: held are chains that differ in certificates alone")
		}
		out.HTTP2 = two
	}
	if err := anyName(chains); err != nil {
		return err
	}
	if out.TLS, err = d.w.certificates(chains); err != nil {
		return err
	}
	hosts, err := d.table(out.Name, chains[0].HTTP.Hosts)
	if err != nil {
		return err
	}
	d.listeners = append(d.listeners, out)
	d.hosts = append(d.hosts, hosts...)
	return nil
}

// versions says whether clients may, or must, speak HTTP/2: as the codec says, and
// of TLS what is offered.
func versions(c *plan.Chain) (two string, err error) {
	two = map[string]string{"http1": "off", "http2": "only"}[c.HTTP.Codec]
	if c.TLS == nil || len(c.TLS.ALPN) == 0 {
		return two, nil
	}
	offered := ""
	switch one := slices.Contains(c.TLS.ALPN, "http/1.1"); {
	case !slices.Contains(c.TLS.ALPN, "h2"):
		offered = "off"
	case !one:
		offered = "only"
	}
	if two != "" && offered != "" && two != offered {
		return "", fmt.Errorf("alpn_protocols: %q: not what codec_type takes", c.TLS.ALPN)
	}
	if two == "" {
		two = offered
	}
	return two, nil
}

func sameHost(a, b plan.Host) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// anyName wants that a client may ask for any name: the proxy does not refuse a
// connection by the name.
func anyName(chains []plan.Chain) error {
	for _, c := range chains {
		if len(c.ServerNames) == 0 {
			return nil
		}
	}
	return fmt.Errorf("filter_chain_match.server_names: %q: a listener that serves some names alone is not held: add a chain for any",
		chains[0].ServerNames[0])
}

func (w *Writer) certificates(chains []plan.Chain) (*serverTLS, error) {
	if chains[0].TLS == nil {
		return nil, nil
	}
	out := &serverTLS{}
	if name := chains[0].TLS.Clients; name != "" {
		ca, given, err := w.authorities(name)
		if err != nil {
			return nil, err
		}
		out.Clients = &clients{CA: ca, Authorities: given}
	}
	for _, c := range chains {
		if c.TLS.Clients != chains[0].TLS.Clients {
			return nil, errors.New("validation_context_sds_secret_config: chains that verify clients differently are not held")
		}
		for _, name := range c.TLS.Certificates {
			s, err := w.certificate(name)
			if err != nil {
				return nil, err
			}
			if !slices.Contains(out.Certificates, s) {
				out.Certificates = append(out.Certificates, s)
			}
		}
	}
	return out, nil
}
