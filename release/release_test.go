package release_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"hauberk.dev/api/spec"
	"hauberk.dev/evidence"
	"hauberk.dev/ledger"
	"hauberk.dev/plan"
	"hauberk.dev/registry"
	"hauberk.dev/release"
)

const (
	builderID  = "https://ci.example/builder"
	repository = "https://git.example/bank"
	revision   = "0123456789abcdef0123456789abcdef01234567"
)

// town is a gate with everything around it under the test's hand.
type town struct {
	t        *testing.T
	apps     map[string]spec.Application
	policies []release.Policy
	epoch    plan.Epoch
	entries  []ledger.Entry
	full     bool // the ledger takes nothing
	people   map[string]*evidence.KeySigner
	store    *registry.Store
	dir      string
	gate     *release.Gate
}

func (w *town) Application(_ context.Context, ns, name string) (spec.Application, error) {
	if app, ok := w.apps[ns+"/"+name]; ok {
		return app, nil
	}
	return spec.Application{}, fmt.Errorf("application %s/%s: %w", ns, name, fs.ErrNotExist)
}

func (w *town) ReleasePolicies(context.Context, string) ([]release.Policy, error) {
	return w.policies, nil
}

func (w *town) Append(_ context.Context, e ledger.Entry) (uint64, error) {
	if w.full {
		return 0, errors.New("no space left on device")
	}
	w.entries = append(w.entries, e)
	return uint64(len(w.entries) - 1), nil
}

func (w *town) kinds() string {
	var out []string
	for _, e := range w.entries {
		out = append(out, e.Kind)
	}
	return strings.Join(out, " ")
}

func newTown(t *testing.T) *town {
	w := &town{t: t, dir: t.TempDir(), people: map[string]*evidence.KeySigner{}}
	roles := []struct {
		name string
		role spec.Role
	}{{"ci", spec.RoleBuilder}, {"ann", spec.RoleDeveloper}, {"bob", spec.RoleReviewer}, {"cleo", spec.RoleReviewer}, {"olga", spec.RoleOwner}}
	app := spec.Application{Repositories: []string{repository}}
	for _, r := range roles {
		app.Accounts = append(app.Accounts, spec.Account{Name: r.name, Roles: []spec.Role{r.role}, Key: string(w.person(r.name).Key().PEM())})
	}
	w.apps = map[string]spec.Application{"bank/bank": app, "bank/other": app}
	w.policies = []release.Policy{{Name: "two-eyes", Spec: spec.ReleasePolicy{
		Applications: []string{"*"}, Builders: []string{builderID}, Reviewers: 1,
		Rules: []spec.ReleaseRule{{Expression: `provenance.source == "` + repository + `" && !(author in reviewers)`, Message: "bank code, seen by two"}},
	}}}
	var err error
	if w.store, err = registry.Open(filepath.Join(w.dir, "registry")); err != nil {
		t.Fatal(err)
	}
	w.gate = w.open()
	return w
}

func (w *town) open() *release.Gate {
	w.t.Helper()
	g, err := release.New(release.Options{Applications: w, Policies: w, Store: w.store, Recorder: w, Signer: w.person("gate"),
		Name: "spiffe://hauberk.test/hauberk/control", Epoch: func() plan.Epoch { return w.epoch }, Scratch: w.dir})
	if err != nil {
		w.t.Fatal(err)
	}
	return g
}

// person is somebody with a key, the same each time.
func (w *town) person(name string) *evidence.KeySigner {
	w.t.Helper()
	if s, ok := w.people[name]; ok {
		return s
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := evidence.NewSigner(key, name)
	if err != nil {
		w.t.Fatal(err)
	}
	w.people[name] = s
	return s
}

// files is a submission as a map, so that a test can spoil it.
type files map[string][]byte

func sha(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }

func (f files) blob(mediaType string, data []byte) v1.Descriptor {
	f["blobs/sha256/"+sha(data)] = data
	return v1.Descriptor{MediaType: mediaType, Digest: digest.Digest("sha256:" + sha(data)), Size: int64(len(data))}
}

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// image makes a layout with one image and returns its digest. change may
// spoil the manifest.
func image(t *testing.T, content string, change func(*v1.Manifest)) (files, string) {
	f := files{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	var config v1.Image
	config.Architecture, config.OS = "amd64", "linux"
	config.RootFS = v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromString(content)}}
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: f.blob(v1.MediaTypeImageConfig, marshal(t, config)),
		Layers: []v1.Descriptor{f.blob(v1.MediaTypeImageLayer, []byte(content))}}
	if change != nil {
		change(&m)
	}
	d := f.blob(v1.MediaTypeImageManifest, marshal(t, m))
	f["index.json"] = marshal(t, v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []v1.Descriptor{d}})
	return f, d.Digest.String()
}

func (w *town) provenance(d, by string) []byte {
	w.t.Helper()
	p := evidence.NewProvenance(builderID, "https://build.example/go", evidence.Source{Repository: repository, Revision: revision, Author: "ann"})
	return sign(w.t, d, p, w.person(by))
}

func sign[P evidence.Predicate](t *testing.T, d string, p P, s evidence.Signer) []byte {
	t.Helper()
	env, err := evidence.SignStatement("bank/web", d, p, s)
	if err != nil {
		t.Fatal(err)
	}
	return env.Raw()
}

func (w *town) review(d, reviewer, author, by string) []byte {
	return sign(w.t, d, evidence.Review{Reviewer: reviewer, Author: author, Revision: revision}, w.person(by))
}

// good is a submission that passes.
func (w *town) good() (files, string) {
	f, d := image(w.t, "layer content", nil)
	w.vouch(f, d)
	return f, d
}

func (w *town) vouch(f files, d string) {
	f["evidence/provenance.json"] = w.provenance(d, "ci")
	f["evidence/review-bob.json"] = w.review(d, "bob", "ann", "bob")
	f["evidence/approval-olga.json"] = sign(w.t, d, evidence.Approval{Owner: "olga", Application: "bank"}, w.person("olga"))
}

func (f files) tar(t *testing.T) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for name, data := range f {
		if err := errors.Join(tw.WriteHeader(&tar.Header{Name: name, Size: int64(len(data)), Mode: 0o644}), second(tw.Write(data))); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func second(_ int, err error) error { return err }

func (f files) dir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range f {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func (w *town) submit(f files) release.Submission {
	return release.Submission{Namespace: "bank", Application: "bank", Image: "bank/web:1", Actor: "dora", Tar: f.tar(w.t)}
}

func TestReleaseAndAdmit(t *testing.T) {
	w := newTown(t)
	f, d := w.good()
	s := w.submit(f)
	s.Tar, s.Dir = nil, f.dir(t)
	got, err := w.gate.Release(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest != d || got.Author != "ann" || fmt.Sprint(got.Reviewers, got.Owners) != "[bob] [olga]" || len(got.Checks) != 12 {
		t.Errorf("decision %+v", got)
	}
	if w.kinds() != "release.intent release.done" {
		t.Errorf("ledger: %s", w.kinds())
	}
	for _, ref := range []string{"bank/web:1", "bank/web@" + d} {
		r, err := w.gate.Admitted(t.Context(), "bank", "bank", ref)
		if err != nil || r.Digest != d || r.Index != got.Index || r.Revision != revision || !r.ReleasedAt.Equal(got.ReleasedAt) {
			t.Errorf("%s: %+v, %v", ref, r, err)
		}
	}
	if err := w.gate.Pull("bank/web", d); err != nil {
		t.Errorf("pull: %v", err)
	}
	for ref, want := range map[string]string{
		"bank/web:2": "NotReleased", "bank/web@sha256:" + sha(nil): "NotReleased", "nowhere": "ImageInvalid", "bank/../web:1": "ImageInvalid",
	} {
		_, err := w.gate.Admitted(t.Context(), "bank", "bank", ref)
		wantRefusal(t, ref, err, want)
	}
	_, err = w.gate.Admitted(t.Context(), "bank", "other", "bank/web:1")
	wantRefusal(t, "other application", err, "ApplicationDiffers")
	_, err = w.gate.Admitted(t.Context(), "shop", "bank", "bank/web:1")
	wantRefusal(t, "other namespace", err, "ApplicationDiffers")

	again, err := w.gate.Release(t.Context(), w.submit(f))
	if err != nil || !again.Already || again.Index != got.Index || len(w.entries) != 2 {
		t.Errorf("again: %+v, %v, %s", again, err, w.kinds())
	}
	w.epoch = plan.Epoch{Number: 4, Digests: []string{d}}
	_, err = w.gate.Admitted(t.Context(), "bank", "bank", "bank/web:1")
	wantRefusal(t, "revoked", err, "Revoked")
	wantRefusal(t, "pull revoked", w.gate.Pull("bank/web", d), "Revoked")
	w.epoch = plan.Epoch{}
	w.people["gate"] = nil
	delete(w.people, "gate")
	_, err = w.open().Admitted(t.Context(), "bank", "bank", "bank/web:1")
	wantRefusal(t, "another gate's key", err, "NotReleased")
}

func wantRefusal(t *testing.T, name string, err error, reason string) {
	t.Helper()
	var r *release.Refusal
	if !errors.As(err, &r) || r.Reason != reason || r.Message == "" || r.Fix == "" {
		t.Errorf("%s: %v, want reason %s", name, err, reason)
	}
}

// TestRefusals spoils one thing at a time.
func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name, check, reason string
		spoil               func(w *town, f files, d string, s *release.Submission)
	}{
		{"no application", "application", "ApplicationUnknown", func(w *town, f files, d string, s *release.Submission) { s.Application = "nobody" }},
		{"bad name", "application", "ApplicationInvalid", func(w *town, f files, d string, s *release.Submission) { s.Namespace = "../bank" }},
		{"shared key", "application", "AccountKeyShared", func(w *town, f files, d string, s *release.Submission) {
			app := w.apps["bank/bank"]
			app.Accounts[1].Key = app.Accounts[2].Key
		}},
		{"bad key", "application", "AccountKeyInvalid", func(w *town, f files, d string, s *release.Submission) {
			w.apps["bank/bank"].Accounts[0].Key = "ssh-rsa AAAA"
		}},
		{"bad image", "repository", "ImageInvalid", func(w *town, f files, d string, s *release.Submission) { s.Image = "Bank/Web:1" }},
		{"digest", "repository", "TagMissing", func(w *town, f files, d string, s *release.Submission) { s.Image = "bank/web@" + d }},
		{"foreign repository", "repository", "RepositoryForeign", func(w *town, f files, d string, s *release.Submission) { s.Image = "bankrobber/web:1" }},
		{"no policy", "policy", "PolicyMissing", func(w *town, f files, d string, s *release.Submission) {
			w.policies[0].Spec.Applications = []string{"else"}
		}},
		{"bad policy", "policy", "PolicyInvalid", func(w *town, f files, d string, s *release.Submission) {
			w.policies[0].Spec.Rules[0].Expression = "autor == 1"
		}},
		{"no index", "content", "ContentInvalid", func(w *town, f files, d string, s *release.Submission) { delete(f, "index.json") }},
		{"changed layer", "content", "ContentInvalid", func(w *town, f files, d string, s *release.Submission) {
			f["blobs/sha256/"+sha([]byte("layer content"))] = []byte("other content")
		}},
		{"layer gone", "content", "ContentInvalid", func(w *town, f files, d string, s *release.Submission) {
			delete(f, "blobs/sha256/"+sha([]byte("layer content")))
		}},
		{"traversal", "content", "ContentInvalid", func(w *town, f files, d string, s *release.Submission) { f["blobs/../../etc/passwd"] = nil }},
		{"stranger", "content", "ContentInvalid", func(w *town, f files, d string, s *release.Submission) { f["evidence/other.json"] = []byte("{}") }},
		{"torn envelope", "content", "ContentInvalid", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/provenance.json"] = f["evidence/provenance.json"][:40]
		}},
		{"no provenance", "provenance", "ProvenanceMissing", func(w *town, f files, d string, s *release.Submission) { delete(f, "evidence/provenance.json") }},
		{"provenance by mallory", "provenance", "SignatureInvalid", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/provenance.json"] = w.provenance(d, "mallory")
		}},
		{"provenance by a reviewer", "provenance", "SignatureInvalid", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/provenance.json"] = w.provenance(d, "bob")
		}},
		{"provenance of another image", "provenance", "SubjectDiffers", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/provenance.json"] = w.provenance("sha256:"+sha(nil), "ci")
		}},
		{"no builder account", "provenance", "NoSuchAccount", func(w *town, f files, d string, s *release.Submission) {
			app := w.apps["bank/bank"]
			app.Accounts = app.Accounts[1:]
			w.apps["bank/bank"] = app
		}},
		{"other builder", "builder", "BuilderNotAllowed", func(w *town, f files, d string, s *release.Submission) {
			w.policies[0].Spec.Builders = []string{"https://elsewhere"}
		}},
		{"second policy", "builder", "BuilderNotAllowed", func(w *town, f files, d string, s *release.Submission) {
			w.policies = append(w.policies, release.Policy{Name: "strict", Spec: spec.ReleasePolicy{Applications: []string{"bank"}, Builders: []string{"https://strict"}}})
		}},
		{"other source", "source", "SourceForeign", func(w *town, f files, d string, s *release.Submission) {
			app := w.apps["bank/bank"]
			app.Repositories = []string{"https://git.example/elsewhere"}
			w.apps["bank/bank"] = app
		}},
		{"no review", "review", "ReviewsMissing", func(w *town, f files, d string, s *release.Submission) { delete(f, "evidence/review-bob.json") }},
		{"one review of two", "review", "ReviewsMissing", func(w *town, f files, d string, s *release.Submission) { w.policies[0].Spec.Reviewers = 2 }},
		{"one reviewer twice", "review", "ReviewsMissing", func(w *town, f files, d string, s *release.Submission) {
			w.policies[0].Spec.Reviewers = 2
			f["evidence/review-bob2.json"] = w.review(d, "bob", "ann", "bob")
		}},
		{"own review", "review", "ReviewerIsAuthor", func(w *town, f files, d string, s *release.Submission) {
			app := w.apps["bank/bank"]
			app.Accounts[1].Roles = append(app.Accounts[1].Roles, spec.RoleReviewer)
			f["evidence/review-bob.json"] = w.review(d, "ann", "ann", "ann")
		}},
		{"own review, other name", "review", "ReviewerDiffers", func(w *town, f files, d string, s *release.Submission) {
			app := w.apps["bank/bank"]
			app.Accounts[1].Roles = append(app.Accounts[1].Roles, spec.RoleReviewer)
			f["evidence/review-bob.json"] = w.review(d, "bob", "ann", "ann")
		}},
		{"author disowned", "review", "AuthorDiffers", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/review-bob.json"] = w.review(d, "bob", "cleo", "bob")
		}},
		{"review of another image", "review", "SubjectDiffers", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/review-bob.json"] = w.review("sha256:"+sha(nil), "bob", "ann", "bob")
		}},
		{"review by the owner", "review", "SignatureInvalid", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/review-bob.json"] = w.review(d, "olga", "ann", "olga")
		}},
		{"review of another revision", "review", "RevisionDiffers", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/review-bob.json"] = sign(w.t, d, evidence.Review{Reviewer: "bob", Author: "ann", Revision: strings.Repeat("9", 40)}, w.person("bob"))
		}},
		{"author left", "review", "AuthorUnknown", func(w *town, f files, d string, s *release.Submission) {
			w.apps["bank/bank"].Accounts[1].Name = "anna"
		}},
		{"a bad review beside a good one", "review", "SignatureInvalid", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/review-x.json"] = w.review(d, "cleo", "ann", "mallory")
		}},
		{"no approval", "approval", "ApprovalMissing", func(w *town, f files, d string, s *release.Submission) { delete(f, "evidence/approval-olga.json") }},
		{"approval by a reviewer", "approval", "SignatureInvalid", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/approval-olga.json"] = sign(w.t, d, evidence.Approval{Owner: "bob", Application: "bank"}, w.person("bob"))
		}},
		{"approval in another name", "approval", "OwnerDiffers", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/approval-olga.json"] = sign(w.t, d, evidence.Approval{Owner: "otto", Application: "bank"}, w.person("olga"))
		}},
		{"approval for another application", "approval", "ApplicationDiffers", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/approval-olga.json"] = sign(w.t, d, evidence.Approval{Owner: "olga", Application: "shop"}, w.person("olga"))
		}},
		{"review as approval", "approval", "SignatureInvalid", func(w *town, f files, d string, s *release.Submission) {
			f["evidence/approval-olga.json"] = w.review(d, "olga", "ann", "olga")
		}},
		{"rule", "rules", "RuleBroken", func(w *town, f files, d string, s *release.Submission) {
			w.policies[0].Spec.Rules[0].Expression = `size(reviewers) > 1`
		}},
		{"revoked", "revocation", "Revoked", func(w *town, f files, d string, s *release.Submission) { w.epoch.Digests = []string{d} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newTown(t)
			f, d := w.good()
			s := release.Submission{Namespace: "bank", Application: "bank", Image: "bank/web:1", Actor: "dora"}
			c.spoil(w, f, d, &s)
			s.Tar = f.tar(t)
			_, err := w.gate.Release(t.Context(), s)
			wantRefusal(t, c.name, err, c.reason)
			var r *release.Refusal
			if errors.As(err, &r) && (r.Check != c.check || r.Index != 0) {
				t.Errorf("check %s at entry %d, want %s at 0", r.Check, r.Index, c.check)
			}
			if w.kinds() != "release.refused" {
				t.Errorf("ledger: %s", w.kinds())
			}
			w.nothingStored()
		})
	}
}

// nothingStored checks that neither registry nor scratch kept anything.
func (w *town) nothingStored() {
	w.t.Helper()
	filepath.WalkDir(w.dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			w.t.Errorf("left behind: %s", p)
		}
		return nil
	})
	if left, _ := filepath.Glob(filepath.Join(w.dir, "submission-*")); len(left) > 0 {
		w.t.Errorf("left behind: %v", left)
	}
}

func TestManifestsRefused(t *testing.T) {
	for name, change := range map[string]func(*v1.Manifest){
		"zstd layer":       func(m *v1.Manifest) { m.Layers[0].MediaType = v1.MediaTypeImageLayerZstd },
		"foreign layer":    func(m *v1.Manifest) { m.Layers[0].URLs = []string{"https://elsewhere"} },
		"inline layer":     func(m *v1.Manifest) { m.Layers[0].Data = []byte("x") },
		"sha512":           func(m *v1.Manifest) { m.Layers[0].Digest = digest.SHA512.FromString("x") },
		"traversal digest": func(m *v1.Manifest) { m.Layers[0].Digest = "sha256:../../index.json" },
		"size":             func(m *v1.Manifest) { m.Layers[0].Size++ },
		"no layers":        func(m *v1.Manifest) { m.Layers = nil },
		"too many layers": func(m *v1.Manifest) {
			for range 200 {
				m.Layers = append(m.Layers, m.Layers[0])
			}
		},
		"helm chart":    func(m *v1.Manifest) { m.Config.MediaType = "application/vnd.cncf.helm.config.v1+json" },
		"artifact":      func(m *v1.Manifest) { m.Subject = &m.Config },
		"schema 1":      func(m *v1.Manifest) { m.SchemaVersion = 1 },
		"diff ids":      func(m *v1.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) },
		"index for one": func(m *v1.Manifest) { m.MediaType = v1.MediaTypeImageIndex },
	} {
		t.Run(name, func(t *testing.T) {
			w := newTown(t)
			f, d := image(t, "layer", change)
			w.vouch(f, d)
			_, err := w.gate.Release(t.Context(), w.submit(f))
			wantRefusal(t, name, err, "ContentInvalid")
			w.nothingStored()
		})
	}
}

func TestTarRefused(t *testing.T) {
	w := newTown(t)
	for name, h := range map[string]tar.Header{
		"symlink":  {Name: "index.json", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
		"hardlink": {Name: "index.json", Typeflag: tar.TypeLink, Linkname: "oci-layout"},
		"device":   {Name: "index.json", Typeflag: tar.TypeChar},
		"absolute": {Name: "/index.json", Typeflag: tar.TypeReg},
		"twice":    {Name: "./oci-layout", Typeflag: tar.TypeReg},
		"huge":     {Name: "blobs/sha256/" + sha(nil), Typeflag: tar.TypeReg, Size: 5 << 30},
	} {
		var b bytes.Buffer
		tw := tar.NewWriter(&b)
		if err := errors.Join(tw.WriteHeader(&tar.Header{Name: "oci-layout", Typeflag: tar.TypeReg}), tw.WriteHeader(&h), tw.Flush()); err != nil && name != "huge" {
			t.Fatal(name, err)
		}
		_, err := w.gate.Release(t.Context(), release.Submission{Namespace: "bank", Application: "bank", Image: "bank/web:1", Tar: &b})
		wantRefusal(t, name, err, "ContentInvalid")
	}
	f, _ := w.good()
	dir := f.dir(t)
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "evidence/review-x.json")); err != nil {
		t.Fatal(err)
	}
	_, err := w.gate.Release(t.Context(), release.Submission{Namespace: "bank", Application: "bank", Image: "bank/web:1", Dir: dir})
	wantRefusal(t, "symlink in a directory", err, "ContentInvalid")
	_, err = w.gate.Release(t.Context(), release.Submission{Namespace: "bank", Application: "bank", Image: "bank/web:1"})
	wantRefusal(t, "nothing submitted", err, "ContentInvalid")
	w.nothingStored()
}

func TestTagsNeverMove(t *testing.T) {
	w := newTown(t)
	f, _ := w.good()
	if _, err := w.gate.Release(t.Context(), w.submit(f)); err != nil {
		t.Fatal(err)
	}
	other, d := image(t, "newer content", nil)
	w.vouch(other, d)
	_, err := w.gate.Release(t.Context(), w.submit(other))
	wantRefusal(t, "same tag", err, "TagTaken")
	s := w.submit(other)
	s.Image = "bank/web:2"
	if _, err := w.gate.Release(t.Context(), s); err != nil {
		t.Errorf("next tag: %v", err)
	}
	tag := filepath.Join(w.dir, "registry/repositories/bank/web/_tags/1")
	if err := os.WriteFile(tag, []byte(d), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = w.gate.Admitted(t.Context(), "bank", "bank", "bank/web:1")
	wantRefusal(t, "tag moved on the disk", err, "NotReleased")
	third, d := image(t, "another application's", nil)
	w.vouch(third, d)
	third["evidence/approval-olga.json"] = sign(t, d, evidence.Approval{Owner: "olga", Application: "other"}, w.person("olga"))
	s = w.submit(third)
	s.Application, s.Image = "other", "bank/web:3"
	_, err = w.gate.Release(t.Context(), s)
	wantRefusal(t, "another application's repository", err, "RepositoryTaken")
}

func TestNoRecordNoRelease(t *testing.T) {
	w := newTown(t)
	f, _ := w.good()
	w.full = true
	if _, err := w.gate.Release(t.Context(), w.submit(f)); err == nil || !strings.Contains(err.Error(), "record intent") {
		t.Errorf("error is %v", err)
	}
	w.nothingStored()
	w.full = false
	if _, err := w.gate.Release(t.Context(), w.submit(f)); err != nil {
		t.Error(err)
	}
}

// halting fails the n-th write, as a full disk or a kill does.
type halting struct {
	*registry.Store
	left int
}

var errHalt = errors.New("no space left on device")

func (h *halting) step() error {
	if h.left--; h.left < 0 {
		return errHalt
	}
	return nil
}

func (h *halting) PutBlob(ctx context.Context, repository, digest string, size int64, r io.Reader) error {
	return errors.Join(h.step(), h.Store.PutBlob(ctx, repository, digest, size, r))
}

func (h *halting) PutManifest(ctx context.Context, repository, mediaType string, raw []byte) (string, error) {
	if err := h.step(); err != nil {
		return "", err
	}
	return h.Store.PutManifest(ctx, repository, mediaType, raw)
}

func (h *halting) PutTag(ctx context.Context, repository, tag, digest string) error {
	if err := h.step(); err != nil {
		return err
	}
	return h.Store.PutTag(ctx, repository, tag, digest)
}

// TestStopsHalfWay fails each write in turn: what is there afterwards must not
// be admitted under its tag, and releasing again must succeed.
func TestStopsHalfWay(t *testing.T) {
	for n := 0; ; n++ {
		w := newTown(t)
		g, err := release.New(release.Options{Applications: w, Policies: w, Store: &halting{w.store, n}, Recorder: w, Signer: w.person("gate"),
			Name: "gate", Epoch: func() plan.Epoch { return w.epoch }, Scratch: w.dir})
		if err != nil {
			t.Fatal(err)
		}
		f, _ := w.good()
		_, err = g.Release(t.Context(), w.submit(f))
		if err == nil {
			if n < 9 {
				t.Errorf("only %d writes", n)
			}
			return
		}
		if !errors.Is(err, errHalt) || w.kinds() != "release.intent release.failed" {
			t.Errorf("write %d: %v, %s", n, err, w.kinds())
		}
		_, err = w.gate.Admitted(t.Context(), "bank", "bank", "bank/web:1")
		wantRefusal(t, fmt.Sprintf("after write %d", n), err, "NotReleased")
		if d, err := w.gate.Release(t.Context(), w.submit(f)); err != nil || d.Already {
			t.Errorf("again after write %d: %+v, %v", n, d, err)
		}
		if _, err = w.gate.Admitted(t.Context(), "bank", "bank", "bank/web:1"); err != nil {
			t.Errorf("again after write %d: %v", n, err)
		}
	}
}

func TestNewRefusesGaps(t *testing.T) {
	if _, err := release.New(release.Options{}); err == nil {
		t.Error("a gate without anything")
	}
}

func TestCancelled(t *testing.T) {
	w := newTown(t)
	f, _ := w.good()
	ctx, cancel := context.WithTimeout(t.Context(), -time.Second)
	defer cancel()
	if _, err := w.gate.Release(ctx, w.submit(f)); !errors.Is(err, context.DeadlineExceeded) || len(w.entries) != 0 {
		t.Errorf("%v, %s", err, w.kinds())
	}
}
