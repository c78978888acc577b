package check

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/client"
	"hauberk.dev/cmd/hauberk/internal/deploy"
)

// attacks are the ways in which an intruder would go on.
func (b *bank) attacks() []Check {
	inside := func(name string, args ...string) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) { return b.attack(ctx, "", name, args...) }
	}
	return []Check{
		{"drop-and-execute", inside("drop-and-execute")},
		{"memfd", inside("memfd")},
		{"reverse-shell", inside("reverse-shell")},
		{"ld-preload", inside("ld-preload")},
		{"write-protected-file", inside("write-protected", "/etc/passwd")},
		{"unlisted-destination", func(ctx context.Context) (string, error) { return b.attack(ctx, "203.0.113.7", "exfiltrate") }},
		{"unsigned-image", b.unsigned},
		{"stolen-svid", b.stolen},
		{"around-the-proxy", b.around},
		{"unload-guard", inside("unload-guard")},
	}
}

// outcome is the line that the bank's attack program prints.
type outcome struct {
	Succeeded bool   `json:"succeeded"`
	Seen      string `json:"seen"`
}

// attack runs an attack in the assistant's sandbox. It is stopped if the
// intruder did not get what was wanted and if there is a record of the try: an
// incident or, for what is only refused, a denial that says the words. A
// sandbox that is frozen in the act tells nothing any more; then its incident
// alone counts.
func (b *bank) attack(ctx context.Context, words, name string, args ...string) (string, error) {
	all, err := b.running(ctx, assistant)
	if err != nil {
		return "", err
	}
	victim := all[assistant]
	mark, err := b.mark(ctx)
	if err != nil {
		return "", err
	}
	said, ran := b.tell(ctx, victim, append([]string{"/usr/bin/attack", name}, args...))
	var o outcome
	if ran == nil {
		if err := json.Unmarshal(said, &o); err != nil {
			return "", fmt.Errorf("the attack said %.200q: %w", said, err)
		}
	} else {
		words = ""
	}
	if o.Succeeded {
		return o.Seen, errors.New("the attack worked")
	}
	record, err := b.recorded(ctx, victim.Name, mark, words)
	switch {
	case err != nil:
		return o.Seen, errors.Join(ran, err)
	case ran != nil:
		return record, nil
	}
	return record + "; inside: " + o.Seen, nil
}

// mark remembers where the ledger ends and what incidents there are.
func (b *bank) mark(ctx context.Context) (uint64, error) {
	st, err := b.Client.Status(ctx)
	if err != nil {
		return 0, err
	}
	if len(b.before) == 0 {
		list, err := b.Client.Incidents(ctx, b.namespace)
		if err != nil {
			return 0, err
		}
		b.before[""] = true // looked once
		for _, i := range list {
			b.before[i.Name] = true
		}
	}
	return st.Ledger.Size, nil
}

// tell runs a command in an instance until it ends or until the instance has
// been contained, which no command survives.
func (b *bank) tell(ctx context.Context, i admin.Instance, args []string) ([]byte, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	defer func() { <-watched }()
	defer cancel(nil)
	go func() {
		defer close(watched)
		b.untilContained(ctx, i.Name)
		// What it wrote before it froze is still on its way.
		wait(ctx, time.Second)
		cancel(errFrozen)
	}()
	var out, errs bytes.Buffer
	_, err := b.Client.Exec(ctx, admin.Exec{Namespace: b.namespace, Workload: i.Workload, Instance: i.Name, Args: args}, client.Stdio{Out: &out, Err: &errs})
	if err != nil && context.Cause(ctx) != nil {
		err = context.Cause(ctx)
	}
	return out.Bytes(), err
}

var errFrozen = errors.New("the sandbox was frozen in the act")

func (b *bank) untilContained(ctx context.Context, instance string) {
	for ctx.Err() == nil && !b.contained(ctx, instance) {
		wait(ctx, 50*time.Millisecond)
	}
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (b *bank) contained(ctx context.Context, instance string) bool {
	list, err := b.Client.Incidents(ctx, b.namespace)
	if err != nil {
		return false
	}
	for _, i := range list {
		if i.Instance == instance && i.State == "Contained" {
			return true
		}
	}
	return false
}

// recorded waits for an incident of an instance that every enforcement point
// has receipted, or for a denial of it in the ledger after a mark that says the
// words, and tells which. Without words only an incident counts.
func (b *bank) recorded(ctx context.Context, instance string, mark uint64, words string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 5*time.Second, errors.New("there is no record of the attack"))
	defer cancel()
	for {
		list, err := b.Client.Incidents(ctx, b.namespace)
		if err == nil {
			open := false
			for _, i := range list {
				if i.Instance == instance && i.State != "Contained" {
					open = true
				}
				if i.Instance == instance && i.State == "Contained" {
					return fmt.Sprintf("incident %s: rule %q, %s, contained in %d ms", i.Name, i.Rule, i.Detail, i.ContainedMillis), nil
				}
			}
			var text string
			if text, err = b.denial(ctx, instance, mark, words); text != "" && !open {
				return text, nil
			}
		}
		select {
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
		_ = err // asked again until the time is over
	}
}

// denial finds a refusal of an instance in the ledger that says the words.
func (b *bank) denial(ctx context.Context, instance string, mark uint64, words string) (string, error) {
	if words == "" {
		return "", nil
	}
	page, err := b.Client.Ledger(ctx, mark, 1000)
	if err != nil {
		return "", err
	}
	for _, p := range page {
		var e struct{ Kind, Instance, Text string }
		if err := json.Unmarshal(p.Entry, &e); err != nil {
			return "", err
		}
		if e.Instance == instance && (e.Kind == "guard.denial" || e.Kind == "mesh.denial") && strings.Contains(e.Text, words) {
			return fmt.Sprintf("ledger entry %d: %s", p.Index, e.Text), nil
		}
	}
	return "", nil
}

// around talks to the bookkeeping's sandbox without the mesh.
func (b *bank) around(ctx context.Context) (string, error) {
	all, err := b.running(ctx, bookkeep)
	if err != nil {
		return "", err
	}
	return b.attack(ctx, "", "bypass", net.JoinHostPort(all[bookkeep].Address, "12200"))
}

// unsigned offers the gate an image without its evidence, then asks to launch
// it all the same.
func (b *bank) unsigned(ctx context.Context) (string, error) {
	dir, err := os.MkdirTemp("", "hauberk-check-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	img := b.Example.Recipe.Images[0]
	good := b.Deployer.Layout(img.Name)
	bare := filepath.Join(dir, "bare")
	if err := os.CopyFS(bare, without{os.DirFS(good), "evidence"}); err != nil {
		return "", err
	}
	const image = "bank/unsigned:1"
	if r, err := deploy.Submit(ctx, b.Client, b.namespace, img.Application, image, bare); err == nil {
		return "", fmt.Errorf("the gate released %s as %s", r.Image, r.Digest)
	} else if refused := (*admin.Error)(nil); !errors.As(err, &refused) {
		return "", err // the gate did not say no: it did not answer
	} else {
		err := b.launch(ctx, img.Application, image)
		return fmt.Sprintf("the gate: %v; launched all the same: %v", refused, err.seen), err.err
	}
}

type launched struct {
	seen string
	err  error
}

// launch asks for a workload of an image that was never released, and takes
// the request back.
func (b *bank) launch(ctx context.Context, application, image string) launched {
	doc := fmt.Appendf(nil, "apiVersion: hauberk.dev/v1alpha1\nkind: Workload\nmetadata: {name: unsigned, namespace: %s}\nspec: {application: %s, image: %q}\n",
		b.namespace, application, image)
	if _, err := b.Client.Apply(ctx, doc); err != nil {
		return launched{"refused by the API: " + err.Error(), nil}
	}
	defer b.Client.Delete(context.WithoutCancel(ctx), doc)
	for {
		story, err := b.Client.Why(ctx, b.namespace, "unsigned")
		if err == nil && strings.Contains(story.Answer, "does not run") && len(story.Chapter) > 0 {
			list, err := b.Client.Instances(ctx, b.namespace)
			for _, i := range list {
				if i.Workload == "unsigned" {
					err = fmt.Errorf("instance %s was made", i.Name)
				}
			}
			return launched{story.Answer, err}
		}
		select {
		case <-ctx.Done():
			return launched{story.Answer, context.Cause(ctx)}
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// without is a file system without one of its directories.
type without struct {
	fs.FS
	dir string
}

func (w without) ReadDir(name string) ([]fs.DirEntry, error) {
	all, err := fs.ReadDir(w.FS, name)
	var kept []fs.DirEntry
	for _, e := range all {
		if filepath.Join(name, e.Name()) != w.dir {
			kept = append(kept, e)
		}
	}
	return kept, err
}

// stolen calls the bookkeeping with identities that are not the caller's own:
// one made up, one that the CA did issue, but to a person, and from inside a
// sandbox, where the mesh alone says who calls.
func (b *bank) stolen(ctx context.Context) (string, error) {
	name := "spiffe://" + b.TrustDomain + "/ns/" + b.namespace + "/sa/transfer" // who may call
	forged, err := forge(name)
	if err != nil {
		return "", err
	}
	genuine, err := fromKubeconfig(b.Kubeconfig)
	if err != nil {
		return "", err
	}
	mark, err := b.mark(ctx)
	if err != nil {
		return "", err
	}
	all, err := b.running(ctx, bookkeep)
	if err != nil {
		return "", err
	}
	var seen []string
	for _, c := range []struct {
		what string
		cert tls.Certificate
	}{{"a made-up certificate of transfer", forged}, {"a genuine certificate of a person", genuine}} {
		refusal, err := b.enter(ctx, all[bookkeep], c.cert)
		if err != nil {
			return strings.Join(seen, "; "), fmt.Errorf("%s: %w", c.what, err)
		}
		seen = append(seen, c.what+": "+refusal)
	}
	record, err := b.recorded(ctx, all[bookkeep].Name, mark, "certificate")
	if err != nil {
		return strings.Join(seen, "; "), err
	}
	out, err := b.inside(ctx, "/bin/wget", "-q", "-O", "-", "--header", "X-Forwarded-Client-Cert: URI="+name, "http://web:8080/balance/alice")
	if err == nil {
		return strings.Join(seen, "; "), fmt.Errorf("the assistant read a balance under transfer's name: %.100q", out)
	}
	return strings.Join(append(seen, record, "from inside a sandbox, under transfer's name: "+err.Error()), "; "), nil
}

// enter comes to the door of an instance, as other nodes do, with a
// certificate. It fails if it is let in, and if it did not get as far as the
// question who it is: then nothing was shown.
func (b *bank) enter(ctx context.Context, to admin.Instance, cert tls.Certificate) (refusal string, err error) {
	met := ""
	d := tls.Dialer{Config: &tls.Config{
		Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
		ServerName:         strings.ReplaceAll(to.Address, ".", "-") + ".sandbox.hauberk.internal",
		InsecureSkipVerify: true, // a thief does not mind whom they talk to
		VerifyConnection: func(cs tls.ConnectionState) error {
			if uris := cs.PeerCertificates[0].URIs; len(uris) == 1 {
				met = uris[0].String()
			}
			return nil
		},
	}}
	conn, err := d.DialContext(ctx, "tcp", b.Gateway)
	if err == nil {
		defer conn.Close()
		err = greet(conn)
	}
	switch {
	case met != to.Identity:
		return "", fmt.Errorf("came to %q and not to %q: %w", met, to.Identity, err)
	case err == nil:
		return "", errors.New("the mesh let it in")
	}
	return "refused: " + err.Error(), nil
}

// greet opens HTTP/2 and waits for the server's own greeting.
func greet(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	if _, err := io.WriteString(conn, preface); err != nil {
		return err
	}
	_, err := conn.Read(make([]byte, 64))
	return err
}

// forge makes a certificate that nobody has issued.
func forge(identity string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	uri, err := url.Parse(identity)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{uri}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// fromKubeconfig is the client certificate that the CA has issued to a person.
func fromKubeconfig(name string) (tls.Certificate, error) {
	raw, err := os.ReadFile(name)
	if err != nil {
		return tls.Certificate{}, err
	}
	var k struct {
		Users []struct {
			User struct {
				Cert string `yaml:"client-certificate-data"`
				Key  string `yaml:"client-key-data"`
			} `yaml:"user"`
		} `yaml:"users"`
	}
	if err := yaml.Unmarshal(raw, &k); err != nil || len(k.Users) == 0 {
		return tls.Certificate{}, fmt.Errorf("read %s: no user: %v", name, err)
	}
	cert, err := base64.StdEncoding.DecodeString(k.Users[0].User.Cert)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("read %s: %w", name, err)
	}
	key, err := base64.StdEncoding.DecodeString(k.Users[0].User.Key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("read %s: %w", name, err)
	}
	return tls.X509KeyPair(cert, key)
}
