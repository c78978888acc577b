package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// proxy is one of those measured.
type proxy struct {
	name    string
	words   []string          // the command
	asked   []string          // for its version; nil is ours
	ports   map[string]string // address by what is spoken
	process *exec.Cmd
	said    bytes.Buffer
}

const meshConfig = `version: 1
admin: %[1]s/mesh.sock
listeners:
- {name: plain, address: "%[3]s"}
- {name: secure, address: "%[4]s", tls: {certificates: [{chain: %[1]s/chain.pem, key: %[1]s/key.pem}]}}
- {name: bytes, address: "%[5]s", protocol: tcp, upstream: origin}
hosts:
- names: ["*"]
  routes:
  - {prefix: /, upstream: origin}
upstreams:
- name: origin
  endpoints: [{address: "%[2]s"}]
`

// One worker, keep-alive to the origin, no log: the least that it can do.
const nginxConfig = `daemon off;
worker_processes 1;
pid %[1]s/nginx.pid;
error_log stderr crit;
events { worker_connections 8000; }
http {
	access_log off;
	client_body_temp_path %[1]s/t1; proxy_temp_path %[1]s/t2; fastcgi_temp_path %[1]s/t3; uwsgi_temp_path %[1]s/t4; scgi_temp_path %[1]s/t5;
	keepalive_requests 100000000;
	keepalive_timeout 3600s;
	ssl_protocols TLSv1.3;
	upstream origin { server %[2]s; keepalive 256; keepalive_requests 100000000; }
	server {
		listen %[3]s;
		listen %[4]s ssl;
		ssl_certificate %[1]s/chain.pem; ssl_certificate_key %[1]s/key.pem;
		location / { proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header X-Forwarded-For $remote_addr; }
	}
}
`

const haproxyConfig = `global
	nbthread 1
	maxconn 8000
	ssl-default-bind-options ssl-min-ver TLSv1.3
defaults
	timeout connect 5s
	timeout client 1h
	timeout server 1h
	timeout http-keep-alive 1h
frontend plain
	mode http
	bind %[3]s
	bind %[4]s ssl crt %[1]s/both.pem
	option forwardfor
	default_backend origin
backend origin
	mode http
	http-reuse always
	server origin %[2]s
listen bytes
	mode tcp
	bind %[5]s
	server origin %[2]s
`

// proxies writes what they are told. Whoever is not installed is a fault: a
// table without a rival says nothing.
func (b *bench) proxies(origin string) ([]*proxy, error) {
	if err := certify(b.dir); err != nil {
		return nil, err
	}
	all := []*proxy{
		{name: "hauberk-mesh", words: []string{b.mesh, "-c", b.path("mesh.yaml")}},
		{name: "nginx", words: []string{"nginx", "-p", b.dir, "-c", b.path("nginx.conf")}, asked: []string{"nginx", "-v"}},
		{name: "HAProxy", words: []string{"haproxy", "-db", "-f", b.path("haproxy.cfg")}, asked: []string{"haproxy", "-v"}},
	}
	for i, config := range []struct{ file, words string }{{"mesh.yaml", meshConfig}, {"nginx.conf", nginxConfig}, {"haproxy.cfg", haproxyConfig}} {
		p := all[i]
		if _, err := exec.LookPath(p.words[0]); err != nil {
			return nil, fmt.Errorf("%s: %w: run make build and scripts/setup bench first", p.name, err)
		}
		ports, err := freePorts(3)
		if err != nil {
			return nil, err
		}
		p.ports = map[string]string{"http": ports[0], "https": ports[1], "tcp": ports[2]}
		args := []any{b.dir, origin, ports[0], ports[1], ports[2]}
		if p.name == "nginx" {
			delete(p.ports, "tcp") // a package of its own
			args = args[:4]
		}
		if err := os.WriteFile(b.path(config.file), fmt.Appendf(nil, config.words, args...), 0o600); err != nil {
			return nil, err
		}
	}
	return all, nil
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

// begin starts it on its processor and waits until it answers.
func (p *proxy) begin(ctx context.Context) error {
	p.process = exec.Command("taskset", append([]string{"-c", ofProxy}, p.words...)...)
	p.process.Env = append(os.Environ(), "GOMAXPROCS=1")
	p.process.Stdout, p.process.Stderr = &p.said, &p.said
	p.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() == 0 && p.name == "hauberk-mesh" {
		p.process.Args = append(p.process.Args, "-allow-root")
	}
	if err := p.process.Start(); err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		c, err := dial(ctx, p.ports["http"], false, 1)
		if err == nil {
			err = errors.Join(c.call(), c.Close())
		}
		if err == nil {
			return nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return fmt.Errorf("start %s: %w: %s", p.name, err, p.said.Bytes())
		}
	}
}

func (p *proxy) end() {
	if p.process != nil && p.process.Process != nil {
		_ = p.process.Process.Signal(syscall.SIGTERM)
		late := time.AfterFunc(patience, func() { _ = p.process.Process.Kill() })
		_ = p.process.Wait()
		late.Stop()
	}
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

// idleConnections is how many are held, that asked once.
const idleConnections = 5000

// held is what a proxy holds.
type held struct {
	Name       string  `json:"name"`
	KiB        int     `json:"kib"`
	Connection float64 `json:"kibAConnection"` // each, of so many idle
}

// idle measures what connections cost that ask nothing.
func idle(ctx context.Context, all []*proxy) (out []held, err error) {
	for _, p := range all {
		before, err := p.memory()
		if err != nil {
			return out, err
		}
		var open []*client
		for range idleConnections {
			c, err := dial(ctx, p.ports["http"], false, 1)
			if err == nil {
				open = append(open, c)
				err = c.call()
			}
			if err != nil {
				break
			}
		}
		after, err := p.memory()
		for _, c := range open {
			c.Close()
		}
		if err != nil || len(open) < idleConnections {
			return out, fmt.Errorf("hold %d connections to %s: %w, after %d", idleConnections, p.name, err, len(open))
		}
		out = append(out, held{p.name, before, float64(after-before) / idleConnections})
	}
	return out, nil
}

// freePorts finds loopback ports that nobody listens on.
func freePorts(n int) (found []string, err error) {
	for range n {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer ln.Close() // held until all are found, so that they differ
		found = append(found, ln.Addr().String())
	}
	return found, nil
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
