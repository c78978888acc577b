package evidence

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	intoto "github.com/in-toto/attestation/go/v1"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"google.golang.org/protobuf/encoding/protojson"

	"hauberk.dev/api/node"
)

func newSigner(t testing.TB, subject string) *KeySigner {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSigner(key, subject)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestPublishedVector is the example of the DSSE specification, with its key
// and its signature, which it prints as raw r and s.
func TestPublishedVector(t *testing.T) {
	const want = "DSSEv1 29 http://example.com/HelloWorld 11 hello world"
	if got := string(PAE("http://example.com/HelloWorld", []byte("hello world"))); got != want {
		t.Errorf("PAE is %q, want %q", got, want)
	}
	number := func(s string) *big.Int { n, _ := new(big.Int).SetString(s, 10); return n }
	point := append([]byte{4}, number("46950820868899156662930047687818585632848591499744589407958293238635476079160").FillBytes(make([]byte, 32))...)
	point = append(point, number("5640078356564379163099075877009565129882514886557779369047442380624545832820").FillBytes(make([]byte, 32))...)
	public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewKey(public, "the specification")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := base64.StdEncoding.DecodeString("A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA==")
	if err != nil {
		t.Fatal(err)
	}
	sig, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:32]), new(big.Int).SetBytes(raw[32:])})
	if err != nil {
		t.Fatal(err)
	}
	env, err := ParseEnvelope([]byte(`{"payload":"aGVsbG8gd29ybGQ=","payloadType":"http://example.com/HelloWorld","signatures":[{"keyid":"66301bbf","sig":"` + base64.StdEncoding.EncodeToString(sig) + `"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	env.Signatures[0].KeyID = "" // the specification names its key in its own way
	if p, _, err := Verify(env, key); err != nil || string(p) != "hello world" {
		t.Errorf("%q, %v", p, err)
	}
}

// TestOthersAgree lets the reference library judge our envelopes, and us its.
func TestOthersAgree(t *testing.T) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := NewSigner(private, "me")
	if err != nil {
		t.Fatal(err)
	}
	env, err := Sign("text/plain", []byte("hello"), ours)
	if err != nil {
		t.Fatal(err)
	}
	theirs := &reference{ours}
	v, err := dsse.NewEnvelopeVerifier(theirs)
	if err != nil {
		t.Fatal(err)
	}
	var parsed dsse.Envelope
	if err := json.Unmarshal(env.Raw(), &parsed); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), &parsed); err != nil {
		t.Errorf("they refuse ours: %v", err)
	}
	es, err := dsse.NewEnvelopeSigner(theirs)
	if err != nil {
		t.Fatal(err)
	}
	made, err := es.SignPayload(t.Context(), "text/plain", []byte("hi"))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(made)
	if err != nil {
		t.Fatal(err)
	}
	if env, err = ParseEnvelope(raw); err != nil {
		t.Fatal(err)
	}
	if p, by, err := Verify(env, ours.Key()); err != nil || string(p) != "hi" || len(by) != 1 {
		t.Errorf("we refuse theirs: %v", err)
	}
	st, err := SignStatement("bank/web", digest("a"), provenance(), ours)
	if err != nil {
		t.Fatal(err)
	}
	var theirStatement intoto.Statement
	if err := protojson.Unmarshal(st.Payload, &theirStatement); err != nil {
		t.Fatal(err)
	}
	if err := theirStatement.Validate(); err != nil || theirStatement.PredicateType != ProvenanceType {
		t.Errorf("in-toto: %v", err)
	}
}

func TestVerify(t *testing.T) {
	alice, bob := newSigner(t, "alice"), newSigner(t, "bob")
	env, err := Sign("text/plain", []byte("pay 10"), alice)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := Verify(env); !errors.Is(err, ErrNoKeys) {
		t.Errorf("no keys: %v", err)
	}
	if _, _, err := Verify(env, Key{}); err == nil {
		t.Error("the zero key trusts")
	}
	_, _, err = Verify(env, bob.Key())
	for _, want := range []string{string(alice.KeyID()[:12]), "bob", "register"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("foreign key: %v, want %q", err, want)
		}
	}
	changed := env
	changed.Payload = []byte("pay 99")
	if _, _, err = Verify(changed, alice.Key(), bob.Key()); err == nil || !strings.Contains(err.Error(), "alice does not match") {
		t.Errorf("changed: %v", err)
	}
	changed = env
	changed.PayloadType = "text/html"
	if _, _, err = Verify(changed, alice.Key()); err == nil {
		t.Error("another payload type verifies")
	}
	changed = env
	changed.Signatures = []Signature{{KeyID: alice.KeyID(), Sig: []byte("x")}, {Sig: env.Signatures[0].Sig}}
	if _, by, err := Verify(changed, bob.Key(), alice.Key()); err != nil || len(by) != 1 || by[0] != alice.KeyID() {
		t.Errorf("unnamed signature: %v, %v", by, err)
	}
	changed.Signatures = []Signature{{KeyID: bob.KeyID(), Sig: env.Signatures[0].Sig}}
	if _, _, err := Verify(changed, alice.Key(), bob.Key()); err == nil {
		t.Error("a signature under a wrong name verifies")
	}
}

func TestParseEnvelopeRefuses(t *testing.T) {
	sig := `"signatures":[{"keyid":"k","sig":"AA=="}]`
	for name, raw := range map[string]string{
		"unknown field":   `{"payload":"","payloadType":"t","extra":1,` + sig + `}`,
		"field twice":     `{"payload":"","payload":"AA==","payloadType":"t",` + sig + `}`,
		"no signature":    `{"payload":"","payloadType":"t","signatures":[]}`,
		"17 signatures":   `{"payload":"","payloadType":"t","signatures":[` + strings.Repeat(`{"keyid":"","sig":"AA=="},`, 16) + `{"keyid":"","sig":"AA=="}]}`,
		"no type":         `{"payload":"",` + sig + `}`,
		"bad base64":      `{"payload":"A","payloadType":"t",` + sig + `}`,
		"loose base64":    `{"payload":"AB==","payloadType":"t",` + sig + `}`,
		"broken base64":   `{"payload":"AA\n==","payloadType":"t",` + sig + `}`,
		"empty signature": `{"payload":"","payloadType":"t","signatures":[{"keyid":"k","sig":""}]}`,
		"large":           `{"payload":"` + strings.Repeat("A", MaxEnvelope) + `","payloadType":"t",` + sig + `}`,
		"array":           `[]`,
	} {
		if env, err := ParseEnvelope([]byte(raw)); err == nil {
			t.Errorf("%s: %+v", name, env)
		}
	}
	if env, err := ParseEnvelope([]byte(`{"payload":"-_8=","payloadType":"t",` + sig + `}`)); err != nil || !bytes.Equal(env.Payload, []byte{0xfb, 0xff}) {
		t.Errorf("URL alphabet: %+v, %v", env, err)
	}
}

func TestKeys(t *testing.T) {
	k := newSigner(t, "x").Key()
	if back, err := ParseKey(k.PEM(), "x"); err != nil || back.ID != k.ID {
		t.Errorf("%v, %v", back, err)
	}
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewSigner(weak, "x"); err == nil {
		t.Error("RSA accepted")
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewSigner(p384, "x"); err == nil {
		t.Error("P-384 accepted")
	}
	if _, err := NewSigner(nil, "x"); err == nil {
		t.Error("no key accepted")
	}
	for name, raw := range map[string][]byte{"empty": nil, "text": []byte("ssh-rsa"), "two": append(k.PEM(), k.PEM()...), "large": bytes.Repeat([]byte("\n"), 5000),
		"torn": append([]byte("-----BEGIN PUBLIC KEY-----\nAAAA\n"), "-----END PUBLIC KEY-----\n"...)} {
		if _, err := ParseKey(raw, "account bob"); err == nil || !strings.Contains(err.Error(), "account bob") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func digest(c string) string { return "sha256:" + strings.Repeat(c, 64) }

var testSource = Source{Repository: "https://git.example/bank", Revision: strings.Repeat("0f", 20), Author: "ann"}

func provenance() Provenance { return NewProvenance("https://ci", "https://go", testSource) }

func TestStatements(t *testing.T) {
	s := newSigner(t, "ci")
	env, err := SignStatement("bank/web", digest("a"), provenance(), s)
	if err != nil {
		t.Fatal(err)
	}
	p, by, err := VerifyStatement[Provenance](env, digest("a"), s.Key())
	if err != nil || by[0] != s.KeyID() || p.RunDetails.Builder.ID != "https://ci" {
		t.Fatalf("%+v, %v", p, err)
	}
	if src, err := p.Source(); err != nil || src != testSource {
		t.Errorf("%+v, %v", src, err)
	}
	var subject *SubjectError
	if _, _, err := VerifyStatement[Provenance](env, digest("b"), s.Key()); !errors.As(err, &subject) {
		t.Errorf("another digest: %v", err)
	}
	if _, _, err := VerifyStatement[Provenance](env, "", s.Key()); err == nil {
		t.Error("the empty digest is its subject")
	}
	if _, _, err := VerifyStatement[Review](env, digest("a"), s.Key()); err == nil || !strings.Contains(err.Error(), ProvenanceType) {
		t.Errorf("provenance as review: %v", err)
	}
	if _, _, err := VerifyStatement[Provenance](env, digest("a")); !errors.Is(err, ErrNoKeys) {
		t.Errorf("no keys: %v", err)
	}
	for name, err := range map[string]error{
		"review without author":   second(SignStatement("x", digest("a"), Review{Reviewer: "bob", Revision: testSource.Revision}, s)),
		"review of a short hash":  second(SignStatement("x", digest("a"), Review{Reviewer: "bob", Author: "a", Revision: "0f0f"}, s)),
		"approval without owner":  second(SignStatement("x", digest("a"), Approval{Application: "bank"}, s)),
		"empty summary":           second(SignStatement("x", digest("a"), Summary{}, s)),
		"digest of another sort":  second(SignStatement("x", "sha512:aa", Approval{Owner: "o", Application: "bank"}, s)),
		"provenance of no one":    second(SignStatement("x", digest("a"), Provenance{}, s)),
		"ticket that says little": second(SignTicket(Ticket{ID: "t"}, s)),
	} {
		if err == nil {
			t.Errorf("%s: signed", name)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestStatementRefused(t *testing.T) {
	s := newSigner(t, "ci")
	for name, payload := range map[string]string{
		"v0.1":           `{"_type":"https://in-toto.io/Statement/v0.1","subject":[{"digest":{"sha256":"a"}}],"predicateType":"https://x","predicate":{}}`,
		"no subject":     `{"_type":"https://in-toto.io/Statement/v1","subject":[],"predicateType":"https://x","predicate":{}}`,
		"no digest":      `{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"x"}],"predicateType":"https://x","predicate":{}}`,
		"no predicate":   `{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"a"}}],"predicateType":"https://x"}`,
		"null predicate": `{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"a"}}],"predicateType":"https://x","predicate":null}`,
		"no URI":         `{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"a"}}],"predicateType":"x","predicate":{}}`,
		"unknown field":  `{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"a"}}],"predicateType":"https://x","predicate":{},"more":1}`,
	} {
		if st, err := ParseStatement([]byte(payload)); err == nil {
			t.Errorf("%s: %+v", name, st)
		}
	}
	hex := digest("a")[7:]
	predicate := `{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"x","digest":{"sha256":"` + hex + `"}}],"predicateType":"` + ApprovalType + `","predicate":%}`
	for name, p := range map[string]string{
		"unknown field": `{"owner":"o","application":"a","role":"king"}`, "field by case": `{"owner":"o","Owner":"p","application":"a"}`, "array": `[]`, "empty": `{}`,
	} {
		env, err := Sign(StatementType, []byte(strings.Replace(predicate, "%", p, 1)), s)
		if err != nil {
			t.Fatal(err)
		}
		if a, _, err := VerifyStatement[Approval](env, digest("a"), s.Key()); err == nil {
			t.Errorf("%s: %+v", name, a)
		}
	}
}

func TestSource(t *testing.T) {
	git := func(name, uri string) Resource {
		return Resource{Name: name, URI: uri, Digest: map[string]string{"gitCommit": testSource.Revision}}
	}
	for _, c := range []struct {
		name string
		deps []Resource
		want string
	}{
		{"one git", []Resource{{URI: "pkg:golang/x"}, git("", "git+https://git.example/bank")}, "https://git.example/bank"},
		{"reference", []Resource{git("", "git+https://git.example/bank@refs/heads/main")}, "https://git.example/bank"},
		{"tag", []Resource{git("", "git+https://git.example/bank@v1")}, "https://git.example/bank"},
		{"user in the URI", []Resource{git("", "git+ssh://git@git.example/bank")}, "ssh://git@git.example/bank"},
		{"named", []Resource{git("", "git+https://submodule"), git("source", "git+https://git.example/bank")}, "https://git.example/bank"},
		{"two gits", []Resource{git("", "git+https://a"), git("", "git+https://b")}, ""},
		{"none", nil, ""},
		{"no commit", []Resource{{Name: "source", URI: "git+https://a"}}, ""},
		{"short commit", []Resource{{Name: "source", URI: "git+https://a", Digest: map[string]string{"gitCommit": "0f0f"}}}, ""},
	} {
		p := provenance()
		p.BuildDefinition.ResolvedDependencies = c.deps
		src, err := p.Source()
		if src.Repository != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %+v, %v", c.name, src, err)
		}
	}
}

func ticket(now time.Time) Ticket {
	h := func(c string) string { return strings.Repeat(c, 64) }
	return Ticket{
		ID: "t-1", Instance: "web-1", Namespace: "bank", Workload: "web", Application: "bank", Repository: "bank/web",
		Digest: digest("a"), SandboxClass: "vm", Node: "n1", GuardGeneration: 3, LedgerIndex: 7,
		Measurement: node.Measurement{Kernel: h("1"), Initrd: h("2"), CommandLine: h("3"), Agent: h("4"), Guard: h("5")},
		NotBefore:   now.Add(-time.Minute), NotAfter: now.Add(time.Hour),
	}
}

func TestTicket(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	s := newSigner(t, "control plane")
	keys := []Key{s.Key()}
	raw, err := SignTicket(ticket(now), s)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := VerifyTicket(raw, now, keys); err != nil || got != ticket(now) {
		t.Errorf("%+v, %v", got, err)
	}
	for name, at := range map[string]time.Time{"expired": now.Add(time.Hour), "clock": now.Add(-time.Hour)} {
		_, err := VerifyTicket(raw, at, keys)
		var expired *ExpiredError
		if !errors.As(err, &expired) || !strings.Contains(err.Error(), "web-1") || !strings.Contains(err.Error(), string(s.KeyID()[:12])) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := VerifyTicket(raw, now, nil); !errors.Is(err, ErrNoKeys) {
		t.Errorf("no keys: %v", err)
	}
	var foreign *SignatureError
	if _, err := VerifyTicket(raw, now, []Key{newSigner(t, "other").Key()}); !errors.As(err, &foreign) {
		t.Errorf("foreign: %v", err)
	}
	env, err := Sign(StatementType, []byte("{}"), s)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyTicket(env.Raw(), now, keys); err == nil || !strings.Contains(err.Error(), "payload type") {
		t.Errorf("a statement as ticket: %v", err)
	}
	for name, change := range map[string]func(*Ticket){
		"instance":                func(k *Ticket) { k.Instance = "../x" },
		"namespace":               func(k *Ticket) { k.Namespace = "Bank" },
		"digest":                  func(k *Ticket) { k.Digest = "sha256:" },
		"node":                    func(k *Ticket) { k.Node = "" },
		"measurement.kernel":      func(k *Ticket) { k.Measurement.Kernel = "" },
		"measurement.commandLine": func(k *Ticket) { k.Measurement.CommandLine = "console=ttyS0" },
		"notAfter":                func(k *Ticket) { k.NotAfter = k.NotBefore },
		"lifetime":                func(k *Ticket) { k.NotAfter = k.NotBefore.Add(25 * time.Hour) },
	} {
		k := ticket(now)
		change(&k)
		if _, err := SignTicket(k, s); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReceipt(t *testing.T) {
	s := newSigner(t, "node n1")
	good := node.Receipt{Epoch: 4, Instance: "web-1", Point: "mesh", Node: "n1", Act: "cut 3 connections", At: time.Unix(1_800_000_000, 5)}
	signed, err := SignReceipt(good, s)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(signed)
	if err != nil {
		t.Fatal(err)
	}
	var back node.Receipt // over the wire
	if err := json.Unmarshal(raw, &back); err != nil {
		t.Fatal(err)
	}
	if err := VerifyReceipt(back, s.Key()); err != nil {
		t.Error(err)
	}
	if err := VerifyReceipt(back); !errors.Is(err, ErrNoKeys) {
		t.Errorf("no keys: %v", err)
	}
	if err := VerifyReceipt(back, newSigner(t, "node n2").Key()); err == nil || !strings.Contains(err.Error(), "n1") {
		t.Errorf("another node's key: %v", err)
	}
	for name, change := range map[string]func(*node.Receipt){
		"epoch":     func(r *node.Receipt) { r.Epoch++ },
		"instance":  func(r *node.Receipt) { r.Instance = "web-2" },
		"point":     func(r *node.Receipt) { r.Point = "sandbox" },
		"node":      func(r *node.Receipt) { r.Node = "n2" },
		"act":       func(r *node.Receipt) { r.Act = "nothing" },
		"at":        func(r *node.Receipt) { r.At = r.At.Add(1) },
		"signature": func(r *node.Receipt) { r.Signature = base64.StdEncoding.EncodeToString([]byte("x")) },
		"none":      func(r *node.Receipt) { r.Signature = "" },
		"shifted":   func(r *node.Receipt) { r.Instance, r.Point = "web-1mesh", "" },
	} {
		r := back
		change(&r)
		if err := VerifyReceipt(r, s.Key()); err == nil {
			t.Errorf("%s: verifies", name)
		}
	}
	if _, err := SignReceipt(node.Receipt{}, s); err == nil {
		t.Error("an empty receipt was signed")
	}
}

func FuzzEnvelope(f *testing.F) {
	s := newSigner(f, "x")
	env, err := Sign("t", []byte("payload"), s)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(env.Raw()))
	f.Add([]byte(`{"payload":"-_8=","payloadType":"t","signatures":[{"keyid":"","sig":"AA"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := ParseEnvelope(raw)
		if err != nil {
			return
		}
		back, err := ParseEnvelope(got.Raw())
		if err != nil || !bytes.Equal(back.Payload, got.Payload) || back.PayloadType != got.PayloadType {
			t.Fatalf("prints back as %s: %v", got.Raw(), err)
		}
		if p, _, err := Verify(got, s.Key()); err == nil && string(p) != "payload" {
			t.Fatalf("forged %q", p)
		}
	})
}

func FuzzTicket(f *testing.F) {
	raw, err := json.Marshal(ticket(time.Unix(1_800_000_000, 0)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"id":"t","measurement":{}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if got, err := parseTicket(raw); err == nil && got.Validate() != nil {
			t.Fatal("an invalid ticket was read")
		}
	})
}

func FuzzStatement(f *testing.F) {
	s := newSigner(f, "x")
	for _, env := range []Envelope{
		must(SignStatement("x", digest("a"), provenance(), s)),
		must(SignStatement("x", digest("a"), Approval{Owner: "o", Application: "a"}, s)),
		must(SignStatement("x", digest("a"), Review{Reviewer: "o", Author: "a", Revision: testSource.Revision}, s)),
	} {
		f.Add(env.Payload)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		st, err := ParseStatement(payload)
		if err != nil {
			return
		}
		env, err := Sign(StatementType, payload, s)
		if err != nil {
			return
		}
		if p, _, err := VerifyStatement[Provenance](env, digest("a"), s.Key()); err == nil {
			p.Source()
			if !st.About(digest("a")) {
				t.Fatal("verified for another digest")
			}
		}
		VerifyStatement[Review](env, digest("a"), s.Key())
		VerifyStatement[Summary](env, digest("a"), s.Key())
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
