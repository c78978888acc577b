package control

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/evidence"
	"hauberk.dev/id"
)

const (
	domain     = "hauberk.test"
	repository = "https://git.example/bank"
	revision   = "0123456789abcdef0123456789abcdef01234567"
	builder    = "https://ci.example/builder"
)

// town is a control plane that runs, and the people around it.
type town struct {
	*testing.T
	conf   Config
	c      *Control
	stop   func()
	people map[string]*evidence.KeySigner
	ahead  atomic.Int64 // how far the control plane's clock is
}

// newTown starts a control plane until the test ends.
func newTown(t *testing.T) *town {
	t.Helper()
	// Paths of sockets are short, those of t.TempDir are not.
	dir, err := os.MkdirTemp("", "control")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	tn := &town{T: t, people: map[string]*evidence.KeySigner{}, conf: Config{
		State: filepath.Join(dir, "state"), Run: filepath.Join(dir, "run"), TrustDomain: domain,
		API: "127.0.0.1:0", Door: freeAddress(t), Log: io.Discard,
	}}
	tn.conf.Now = func() time.Time { return time.Now().Add(time.Duration(tn.ahead.Load())) }
	t.Cleanup(func() { tn.stop() })
	tn.start()
	return tn
}

func freeAddress(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// start opens and runs the control plane, again after stop.
func (tn *town) start() {
	tn.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c, err := Open(ctx, tn.conf)
	if err != nil {
		tn.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	tn.c = c
	tn.stop = func() {
		cancel()
		tn.stop = func() {}
		if err := <-ended; err != nil {
			tn.Errorf("control plane: %v", err)
		}
	}
	select {
	case <-c.filled:
	case err := <-ended:
		tn.stop = func() {}
		tn.Fatalf("control plane: %v", err)
	case <-time.After(20 * time.Second):
		tn.Fatal("the control plane is not up after 20 s")
	}
}

// ask calls the desk; an answer that is no success is the error.
func (tn *town) ask(method, path string, q url.Values, body []byte, out any) error {
	return askDesk(tn.conf.Run, method, path, q, body, out)
}

func askDesk(run, method, path string, q url.Values, body []byte, out any) error {
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("unix", filepath.Join(run, AdminSocket))
		}}}
	req, err := http.NewRequest(method, "http://hauberkd"+path+"?"+q.Encode(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		e := &admin.Error{}
		if err := json.Unmarshal(raw, e); err != nil || e.Message == "" || e.Reason == "" {
			return fmt.Errorf("status %d: %q is not a refusal: %v", resp.StatusCode, raw, err)
		}
		return e
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(raw, out)
}

func (tn *town) apply(yaml string) {
	tn.Helper()
	if err := tn.ask("POST", admin.PathApply, nil, []byte(yaml), nil); err != nil {
		tn.Fatal(err)
	}
}

func (tn *town) person(name string) *evidence.KeySigner {
	tn.Helper()
	if s, ok := tn.people[name]; ok {
		return s
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tn.Fatal(err)
	}
	if tn.people[name], err = evidence.NewSigner(key, name); err != nil {
		tn.Fatal(err)
	}
	return tn.people[name]
}

// found applies the bank: an application, its policies and a workload web
// whose image nobody has released yet.
func (tn *town) found() {
	tn.Helper()
	account := func(name, role string) string {
		key, err := json.Marshal(string(tn.person(name).Key().PEM()))
		if err != nil {
			tn.Fatal(err)
		}
		return fmt.Sprintf("    - {name: %s, roles: [%s], key: %s}\n", name, role, key)
	}
	tn.apply(`
apiVersion: v1
kind: Namespace
metadata: {name: bank}
---
apiVersion: hauberk.dev/v1alpha1
kind: Application
metadata: {name: bank, namespace: bank}
spec:
  repositories: [` + repository + `]
  accounts:
` + account("ci", "builder") + account("ann", "developer") + account("bob", "reviewer") + account("olga", "owner") + `
---
apiVersion: hauberk.dev/v1alpha1
kind: ReleasePolicy
metadata: {name: reviewed, namespace: bank}
spec:
  applications: ["*"]
  builders: [` + builder + `]
  reviewers: 1
---
` + guardPolicy443(443) + `
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: web, namespace: bank}
spec:
  application: bank
  image: bank/web:1
  guardPolicies: [web]
`)
}

func guardPolicy443(port int) string {
	return fmt.Sprintf(`apiVersion: hauberk.dev/v1alpha1
kind: GuardPolicy
metadata: {name: web, namespace: bank}
spec:
  net: {egress: [{cidr: 192.0.2.0/24, ports: [%d]}]}
`, port)
}

// release puts an image with all its evidence before the gate.
func (tn *town) release() (digest string) {
	tn.Helper()
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	blob := func(mediaType string, data []byte) map[string]any {
		sum := sha256.Sum256(data)
		files["blobs/sha256/"+hex.EncodeToString(sum[:])] = data
		return map[string]any{"mediaType": mediaType, "digest": "sha256:" + hex.EncodeToString(sum[:]), "size": len(data)}
	}
	layer := blob("application/vnd.oci.image.layer.v1.tar", []byte("layer"))
	config := blob("application/vnd.oci.image.config.v1+json", tn.json(map[string]any{"architecture": "amd64", "os": "linux",
		"rootfs": map[string]any{"type": "layers", "diff_ids": []any{layer["digest"]}}}))
	manifest := blob("application/vnd.oci.image.manifest.v1+json", tn.json(map[string]any{"schemaVersion": 2,
		"mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []any{layer}}))
	files["index.json"] = tn.json(map[string]any{"schemaVersion": 2, "manifests": []any{manifest}})
	digest = manifest["digest"].(string)
	files["evidence/provenance.json"] = sealed(tn, digest, evidence.NewProvenance(builder, "https://build.example/go",
		evidence.Source{Repository: repository, Revision: revision, Author: "ann"}), "ci")
	files["evidence/review-bob.json"] = sealed(tn, digest, evidence.Review{Reviewer: "bob", Author: "ann", Revision: revision}, "bob")
	files["evidence/approval-olga.json"] = sealed(tn, digest, evidence.Approval{Owner: "olga", Application: "bank"}, "olga")
	var out admin.Released
	q := url.Values{"namespace": {"bank"}, "application": {"bank"}, "image": {"bank/web:1"}}
	if err := tn.ask("POST", admin.PathRelease, q, tn.tar(files), &out); err != nil {
		tn.Fatal(err)
	}
	if out.Digest != digest {
		tn.Fatalf("released %s, want %s", out.Digest, digest)
	}
	return digest
}

func sealed[P evidence.Predicate](tn *town, digest string, p P, by string) []byte {
	tn.Helper()
	env, err := evidence.SignStatement("bank/web", digest, p, tn.person(by))
	if err != nil {
		tn.Fatal(err)
	}
	return env.Raw()
}

func (tn *town) json(v any) []byte {
	raw, err := json.Marshal(v)
	if err != nil {
		tn.Fatal(err)
	}
	return raw
}

func (tn *town) tar(files map[string][]byte) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, data := range files {
		err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(data)), Mode: 0o644})
		if _, werr := w.Write(data); err != nil || werr != nil {
			tn.Fatal(err, werr)
		}
	}
	if err := w.Close(); err != nil {
		tn.Fatal(err)
	}
	return b.Bytes()
}

// until waits for a condition to hold.
func (tn *town) until(what string, holds func() bool) {
	tn.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if holds() {
			return
		}
	}
	tn.Fatalf("never came: %s", what)
}

// entries are the texts of the ledger's entries of a kind.
func (tn *town) entries(kind string) (texts []string) {
	tn.Helper()
	var page []admin.LedgerEntry
	if err := tn.ask("GET", admin.PathLedger, url.Values{"limit": {"1000"}}, nil, &page); err != nil {
		tn.Fatal(err)
	}
	for _, e := range page {
		var entry struct{ Kind, Text string }
		if err := json.Unmarshal(e.Entry, &entry); err != nil {
			tn.Fatal(err)
		}
		if entry.Kind == kind {
			texts = append(texts, entry.Text)
		}
	}
	return texts
}

// fakeNode speaks the real protocol over real TLS, and boots nothing.
type fakeNode struct {
	*town
	name   string
	key    *ecdsa.PrivateKey
	client *http.Client
	orders chan wire.Desired
}

func (tn *town) join(name string) *fakeNode {
	tn.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tn.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		tn.Fatal(err)
	}
	var j admin.Joined
	if err := tn.ask("POST", admin.PathJoin, nil, tn.json(admin.Join{Node: name, Request: csr}), &j); err != nil {
		tn.Fatal(err)
	}
	roots, err := id.ParsePool([]byte(j.Roots))
	if err != nil {
		tn.Fatal(err)
	}
	control, err := id.Control(domain)
	if err != nil {
		tn.Fatal(err)
	}
	source := func() (id.Credential, error) {
		return id.Credential{Certificate: tls.Certificate{Certificate: j.Chain, PrivateKey: key}, Roots: roots}, nil
	}
	n := &fakeNode{town: tn, name: name, key: key, client: &http.Client{Transport: &http.Transport{TLSClientConfig: id.ClientTLS(source, id.Only(control))}}}
	tn.Cleanup(n.client.CloseIdleConnections)
	return n
}

func (n *fakeNode) call(path string, in, out any) error {
	resp, err := n.client.Post("https://"+n.conf.Door+path, "application/json", bytes.NewReader(n.json(in)))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		e := &wire.Error{}
		if err := json.Unmarshal(raw, e); err != nil || e.Message == "" {
			return fmt.Errorf("status %d: %q", resp.StatusCode, raw)
		}
		return e
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(raw, out)
}

func (n *fakeNode) mustCall(path string, in, out any) {
	n.Helper()
	if err := n.call(path, in, out); err != nil {
		n.Fatal(err)
	}
}

func (n *fakeNode) measurement() wire.Measurement {
	h := strings.Repeat("ab", 32)
	return wire.Measurement{Kernel: h, Initrd: h, CommandLine: h, Agent: h, Guard: h}
}

// hello introduces the node and follows its orders until the test ends.
func (n *fakeNode) hello() {
	n.Helper()
	n.mustCall(wire.PathHello, wire.Hello{Version: wire.Version, Node: n.name, Door: "127.0.0.1:1", Gateway: "127.0.0.1:15008",
		Accelerator: "tcg", Measurement: n.measurement()}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+n.conf.Door+wire.PathWatch, nil)
	if err != nil {
		n.Fatal(err)
	}
	resp, err := n.client.Do(req)
	if err != nil {
		n.Fatal(err)
	}
	n.orders = make(chan wire.Desired, 1000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer resp.Body.Close()
		for r := bufio.NewReader(resp.Body); ; {
			line, err := r.ReadBytes('\n')
			if err != nil {
				return
			}
			var d wire.Desired
			if len(bytes.TrimSpace(line)) > 0 && json.Unmarshal(line, &d) == nil {
				n.orders <- d
			}
		}
	}()
	n.Cleanup(func() { cancel(); <-done })
}

// ordered waits for orders that are as wanted.
func (n *fakeNode) ordered(what string, as func(wire.Desired) bool) wire.Desired {
	n.Helper()
	var last wire.Desired
	for late := time.After(60 * time.Second); ; {
		select {
		case last = <-n.orders:
			if as(last) {
				return last
			}
		case <-late:
			n.Fatalf("%s was never ordered; last %+v", what, last)
		}
	}
}

func (n *fakeNode) say(all ...wire.InstanceStatus) {
	n.Helper()
	n.mustCall(wire.PathStatus, wire.Status{Node: n.name, At: time.Now(), Instances: all}, nil)
}

func (n *fakeNode) running(i wire.Instance) wire.InstanceStatus {
	return wire.InstanceStatus{ID: i.ID, Phase: wire.PhaseRunning, StartedAt: time.Now(), ReadyMillis: 7,
		Guard: wire.GuardHeartbeat{At: time.Now(), Generation: i.Guard.Generation, Programs: 3}}
}

// askIdentity asks for a certificate as the mesh of the node would.
func (n *fakeNode) askIdentity(i wire.Instance, g wire.GuardHeartbeat) error {
	n.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		n.Fatal(err)
	}
	name, err := url.Parse(i.Identity)
	if err != nil {
		n.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{name}}, key)
	if err != nil {
		n.Fatal(err)
	}
	var out wire.Certificate
	err = n.call(wire.PathCSR, wire.CSR{Instance: i.ID, Ticket: i.Ticket, Request: csr, Guard: g, Measurement: n.measurement()}, &out)
	if err == nil && (len(out.Chain) == 0 || out.Serial == "") {
		n.Errorf("an empty certificate was issued: %+v", out)
	}
	return err
}

func (n *fakeNode) receipt(r wire.Receipt) error {
	n.Helper()
	s, err := evidence.NewSigner(n.key, "node "+n.name)
	if err != nil {
		n.Fatal(err)
	}
	r.Node, r.At = n.name, time.Now()
	if r, err = evidence.SignReceipt(r, s); err != nil {
		n.Fatal(err)
	}
	return n.call(wire.PathReceipt, r, nil)
}

// refused checks the reason of a refusal.
func (tn *town) refused(what string, err error, reason string) {
	tn.Helper()
	var node *wire.Error
	var desk *admin.Error
	switch {
	case errors.As(err, &node) && node.Reason == reason:
	case errors.As(err, &desk) && desk.Reason == reason && desk.Fix != "":
	default:
		tn.Errorf("%s: %v, want a refusal for %s", what, err, reason)
	}
}
