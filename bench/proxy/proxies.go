package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"debug/buildinfo"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/bench/loopback"
)

// proxy is one of those measured.
type proxy struct {
	name    string
	words   []string          // the command
	asked   []string          // for its version; nil is ours
	told    map[string]string // its configuration, by file
	cores   int               // it may use
	held    *loopback.Held
	ports   map[string]string // address by what is spoken
	process *exec.Cmd
	ended   chan struct{} // it and all that it started
	said    bytes.Buffer  // may be read after that
}

// starts is how often a proxy is started elsewhere when somebody listens where it
// would.
const starts = 3

// What is in place of words in the configurations: {dir}, {http} and the like for
// where a proxy listens, {to-http} and the like for where the origins do.
const meshConfig = `version: 1
admin: {dir}/mesh.sock
limits: {connections: 40000, idle_timeout: 1h}
listeners:
- {name: plain, address: "{http}"}
- {name: secure, address: "{https}", tls: {certificates: [{chain: {dir}/chain.pem, key: {dir}/key.pem}]}}
- {name: mutual, address: "{mtls}", tls: {clients: {ca: {dir}/chain.pem}, certificates: [{chain: {dir}/chain.pem, key: {dir}/key.pem}]}}
- {name: two, address: "{h2}"}
- {name: calls, address: "{grpc}"}
- {name: bytes, address: "{tcp}", protocol: tcp, upstream: origin}
- {name: bolt, address: "{bolt}", protocol: bolt, calls: [{upstream: bolt}]}
- {name: dubbo, address: "{dubbo}", protocol: dubbo, calls: [{upstream: dubbo}]}
hosts:
- names: ["*"]
  listeners: [plain, secure, mutual, two]
  routes:
  - {prefix: /, upstream: origin}
- names: ["*"]
  listeners: [calls]
  routes:
  - {prefix: /, upstream: calls}
upstreams:
- name: origin
  endpoints: [{address: "{to-http}"}]
- name: calls
  protocol: grpc
  endpoints: [{address: "{to-grpc}"}]
- name: bolt
  protocol: bolt
  endpoints: [{address: "{to-bolt}"}]
- name: dubbo
  protocol: dubbo
  endpoints: [{address: "{to-dubbo}"}]
`

// A worker for each processor, keep-alive to the origin, no log: the least that it can do.
const nginxConfig = `daemon off;
worker_processes {cores};
worker_rlimit_nofile 60000;
pid {dir}/nginx.pid;
error_log stderr crit;
events { worker_connections 30000; }
http {
	access_log off;
	client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
	keepalive_requests 100000000;
	keepalive_timeout 3600s;
	ssl_protocols TLSv1.3;
	upstream origin { server {to-http}; keepalive 256; keepalive_requests 100000000; }
	upstream calls { server {to-grpc}; keepalive 256; keepalive_requests 100000000; }
	ssl_certificate {dir}/chain.pem; ssl_certificate_key {dir}/key.pem;
	proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header X-Forwarded-For $remote_addr;
	server {
		listen {http};
		listen {https} ssl;
		location / { proxy_pass http://origin; }
	}
	server {
		listen {mtls} ssl;
		ssl_client_certificate {dir}/chain.pem; ssl_verify_client on;
		location / { proxy_pass http://origin; }
	}
	server { listen {h2} http2; location / { proxy_pass http://origin; } }
	server { listen {grpc} http2; location / { grpc_pass grpc://calls; } }
}
`

const haproxyConfig = `global
	nbthread {cores}
	maxconn 30000
	no strict-limits
	ssl-default-bind-options ssl-min-ver TLSv1.3
defaults
	timeout connect 5s
	timeout client 1h
	timeout server 1h
	timeout http-keep-alive 1h
frontend plain
	mode http
	bind {http}
	bind {https} ssl crt {dir}/both.pem
	bind {mtls} ssl crt {dir}/both.pem ca-file {dir}/chain.pem verify required
	bind {h2} proto h2
	option forwardfor
	default_backend origin
backend origin
	mode http
	http-reuse always
	server origin {to-http}
frontend calls
	mode http
	bind {grpc} proto h2
	default_backend calls
backend calls
	mode http
	http-reuse always
	server calls {to-grpc} proto h2
listen bytes
	mode tcp
	bind {tcp}
	server origin {to-http}
`

const traefikConfig = `global: {checkNewVersion: false, sendAnonymousUsage: false}
log: {level: ERROR}
entryPoints:
  plain: {address: "{http}"}
  secure: {address: "{https}"}
  mutual: {address: "{mtls}"}
  two: {address: "{h2}"}
  calls: {address: "{grpc}"}
  bytes: {address: "{tcp}"}
providers: {file: {filename: "{dir}/routes.yaml", watch: false}}
`

// traefikRoutes stands in a file of its own, as Traefik wants it.
const traefikRoutes = `http:
  routers:
    plain: {entryPoints: [plain, two], rule: "PathPrefix(` + "`/`" + `)", service: origin}
    secure: {entryPoints: [secure], rule: "PathPrefix(` + "`/`" + `)", service: origin, tls: {}}
    mutual: {entryPoints: [mutual], rule: "PathPrefix(` + "`/`" + `)", service: origin, tls: {options: mutual}}
    calls: {entryPoints: [calls], rule: "PathPrefix(` + "`/`" + `)", service: calls}
  services:
    origin: {loadBalancer: {servers: [{url: "http://{to-http}"}]}}
    calls: {loadBalancer: {servers: [{url: "h2c://{to-grpc}"}]}}
tcp:
  routers: {bytes: {entryPoints: [bytes], rule: "HostSNI(` + "`*`" + `)", service: origin}}
  services: {origin: {loadBalancer: {servers: [{address: "{to-http}"}]}}}
tls:
  stores: {default: {defaultCertificate: {certFile: "{dir}/chain.pem", keyFile: "{dir}/key.pem"}}}
  options:
    default: {minVersion: VersionTLS13}
    mutual: {minVersion: VersionTLS13, clientAuth: {caFiles: ["{dir}/chain.pem"], clientAuthType: RequireAndVerifyClientCert}}
`

// speaks is what each proxy is asked in.
var speaks = map[string][]string{
	"hauberk-mesh": {"http", "https", "mtls", "tcp", "h2", "grpc", "bolt", "dubbo"},
	"nginx":        {"http", "https", "mtls", "h2", "grpc"}, // tcp is a package of its own
	"HAProxy":      {"http", "https", "mtls", "tcp", "h2", "grpc"},
	"Traefik":      {"http", "https", "mtls", "tcp", "h2", "grpc"},
}

// proxies writes what they are told. Whoever of Debian is not installed is a fault:
// a table without a rival says nothing. Traefik takes long to build and may be
// absent; then the table says so.
func (b *bench) proxies(origins map[string]*origin) (all []*proxy, absent []string, err error) {
	if err := certify(b.dir); err != nil {
		return nil, nil, err
	}
	if b.shown, err = tls.LoadX509KeyPair(b.path("chain.pem"), b.path("key.pem")); err != nil {
		return nil, nil, err
	}
	all = []*proxy{
		{name: "hauberk-mesh", words: []string{b.mesh, "-c", b.path("mesh.yaml")}, told: map[string]string{"mesh.yaml": meshConfig}},
		{name: "nginx", words: []string{"nginx", "-p", b.dir, "-c", b.path("nginx.conf")}, asked: []string{"nginx", "-v"}, told: map[string]string{"nginx.conf": nginxConfig}},
		{name: "HAProxy", words: []string{"haproxy", "-db", "-f", b.path("haproxy.cfg")}, asked: []string{"haproxy", "-v"}, told: map[string]string{"haproxy.cfg": haproxyConfig}},
	}
	if version, err := traefikVersion(b.traefik); err != nil {
		absent = append(absent, fmt.Sprintf("Traefik: not measured: %v; scripts/traefik builds it", err))
	} else {
		all = append(all, &proxy{name: "Traefik", words: []string{b.traefik, "--configfile=" + b.path("traefik.yaml")}, asked: []string{"echo", "Traefik: " + version},
			told: map[string]string{"traefik.yaml": traefikConfig, "routes.yaml": traefikRoutes}})
	}
	for _, p := range all {
		if err := b.tell(p, origins); err != nil {
			return all, nil, fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return all, absent, nil
}

// tell writes the configuration of one, with ports to listen on that are its own
// until it is closed.
func (b *bench) tell(p *proxy, origins map[string]*origin) error {
	if _, err := exec.LookPath(p.words[0]); err != nil {
		return fmt.Errorf("%w: run make build and scripts/setup bench first", err)
	}
	if err := p.release(); err != nil {
		return err
	}
	held, err := loopback.Hold(len(speaks[p.name]))
	if err != nil {
		return err
	}
	p.held = held
	p.ports, p.cores = map[string]string{}, b.cores
	words := []string{"{dir}", b.dir, "{cores}", strconv.Itoa(b.cores)}
	for i, spoken := range speaks[p.name] {
		p.ports[spoken] = held.Addresses[i]
		words = append(words, "{"+spoken+"}", held.Addresses[i])
	}
	for spoken, o := range origins {
		words = append(words, "{to-"+spoken+"}", o.address())
	}
	for file, config := range p.told {
		if err := os.WriteFile(b.path(file), []byte(strings.NewReplacer(words...).Replace(config)), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// traefikVersion is that of the module a program was built of.
func traefikVersion(path string) (string, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return "", err
	}
	for _, d := range append(info.Deps, &info.Main) { // it is built in a module of ours, or as itself
		if strings.HasPrefix(d.Path, "github.com/traefik/traefik/v") {
			return d.Version, nil
		}
	}
	return "", fmt.Errorf("%s is another program", path)
}

func (p *proxy) version() string {
	if p.asked == nil {
		return p.name + ": of this tree"
	}
	out, err := exec.Command(p.asked[0], p.asked[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%s: %v", p.name, err)
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}

// begin starts one, elsewhere if somebody came before it.
func (b *bench) begin(ctx context.Context, p *proxy, origins map[string]*origin) error {
	for try := 1; ; try++ {
		err := p.begin(ctx)
		if err == nil {
			return nil
		}
		p.end()
		said := p.said.String()
		if try == starts || ctx.Err() != nil || !loopback.Taken(said) {
			return fmt.Errorf("start %s: %w: %s", p.name, err, strings.TrimSpace(said))
		}
		fmt.Fprintf(os.Stderr, "bench: %s is started elsewhere: %s\n", p.name, strings.TrimSpace(said))
		if err := b.tell(p, origins); err != nil {
			return err
		}
	}
}

// begin starts it on its processors and waits until it answers.
func (p *proxy) begin(ctx context.Context) error {
	c := exec.Command("taskset", append([]string{"-c", processors(0, p.cores)}, p.words...)...)
	c.Env = append(os.Environ(), "GOMAXPROCS="+strconv.Itoa(p.cores))
	p.said.Reset()
	c.Stdout, c.Stderr = &p.said, &p.said
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if os.Geteuid() == 0 && p.name == "hauberk-mesh" {
		c.Args = append(c.Args, "-allow-root")
	}
	if err := c.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	p.process, p.ended = c, ended
	go func() {
		defer close(ended)
		_ = c.Wait() // returns when nobody holds its output any more; how it ended is no figure
	}()
	for end := time.Now().Add(patience); ; {
		asked, err := dial(ctx, p.ports["http"], false, 1)
		if err == nil {
			err = errors.Join(asked.call(), asked.Close())
		}
		if err == nil {
			return nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return err
		}
		select {
		case <-ended:
			return errors.New("it has ended")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// end returns when it and all that it started are gone.
func (p *proxy) end() {
	if p.process == nil {
		return
	}
	_ = p.process.Process.Signal(syscall.SIGTERM) // at worst it has ended
	select {
	case <-p.ended:
	case <-time.After(patience):
		_ = syscall.Kill(-p.process.Process.Pid, syscall.SIGKILL)
		<-p.ended
	}
	p.process = nil
}

// release lets go of its ports.
func (p *proxy) release() error {
	if p.held == nil {
		return nil
	}
	return p.held.Close()
}

func (p *proxy) close() {
	p.end()
	_ = p.release() // this process ends soon
}

// spent is the processor time of the proxy and its children so far, by the
// scheduler's own count.
func (p *proxy) spent() (sum time.Duration, err error) {
	err = p.each(func(pid string) error {
		tasks, err := filepath.Glob("/proc/" + pid + "/task/*/schedstat")
		for _, t := range tasks {
			raw, err := os.ReadFile(t)
			if err != nil {
				continue // it ended
			}
			ns, err := strconv.ParseInt(strings.Fields(string(raw))[0], 10, 64)
			if err != nil {
				return err
			}
			sum += time.Duration(ns)
		}
		return err
	})
	return sum, err
}

// memory is what it holds that is its own, in KiB.
func (p *proxy) memory() (sum int, err error) {
	err = p.each(func(pid string) error {
		raw, err := os.ReadFile("/proc/" + pid + "/smaps_rollup")
		for line := range strings.Lines(string(raw)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "Pss:" {
				kib, err := strconv.Atoi(f[1])
				sum += kib
				return err
			}
		}
		return err
	})
	return sum, err
}

func (p *proxy) each(do func(pid string) error) error {
	if p == nil {
		return nil
	}
	pid := strconv.Itoa(p.process.Process.Pid)
	raw, err := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
	if err != nil {
		return err
	}
	for _, one := range append(strings.Fields(string(raw)), pid) {
		if err := do(one); err != nil {
			return err
		}
	}
	return nil
}

// held is what a proxy holds.
type held struct {
	Name       string  `json:"name"`
	KiB        int     `json:"kib"`
	Connection float64 `json:"kibAConnection"` // each
	Idle       int     `json:"idle"`           // of so many, that asked once
}

// idle measures what connections cost that ask nothing.
func (p *proxy) idle(ctx context.Context, n int) (h held, err error) {
	before, err := p.memory()
	if err != nil {
		return h, fmt.Errorf("weigh %s: %w", p.name, err)
	}
	var open []*client
	for range n {
		c, err := dial(ctx, p.ports["http"], false, 1)
		if err == nil {
			defer c.Close()
			open = append(open, c)
			err = c.call()
		}
		if err != nil {
			return h, fmt.Errorf("hold %d connections to %s: %w, after %d", n, p.name, err, len(open))
		}
	}
	after, err := p.memory()
	if err != nil {
		return h, fmt.Errorf("weigh %s: %w", p.name, err)
	}
	return held{p.name, before, float64(after-before) / float64(n), n}, nil
}

// certify writes a key and a certificate that nobody checks.
func certify(dir string) error {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &k.PublicKey, k)
	if err != nil {
		return err
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return err
	}
	chain, key := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
	for name, words := range map[string][]byte{"chain.pem": chain, "key.pem": key, "both.pem": append(bytes.Clone(chain), key...)} {
		if err := os.WriteFile(filepath.Join(dir, name), words, 0o600); err != nil {
			return err
		}
	}
	return nil
}
