package release

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"hauberk.dev/evidence"
)

// Types of the artifact that carries a verdict and its evidence, attached to
// the image as a referrer.
const (
	VerdictType  = "application/vnd.hauberk.release.v1"
	envelopeType = "application/vnd.dsse.envelope.v1+json"
)

// write stores the image, then the verdict, then the tag.
func (g *Gate) write(ctx context.Context, c *checking, rel Release) error {
	l := c.layout
	for _, d := range append(slices.Clone(l.manifest.Layers), l.manifest.Config) {
		if err := g.putFile(ctx, rel.Repository, l, d); err != nil {
			return err
		}
	}
	got, err := g.opt.Store.PutManifest(ctx, rel.Repository, v1.MediaTypeImageManifest, l.raw)
	if err != nil {
		return err
	}
	if got != rel.Digest {
		return fmt.Errorf("the store has %s, stored was %s", got, rel.Digest)
	}
	if err := g.attach(ctx, c, rel); err != nil {
		return fmt.Errorf("attach verdict: %w", err)
	}
	return g.opt.Store.PutTag(ctx, rel.Repository, rel.Tag, rel.Digest)
}

func (g *Gate) putFile(ctx context.Context, repository string, l *layout, d v1.Descriptor) error {
	f, err := l.root.Open(filepath.FromSlash(blobName(d.Digest.String())))
	if err != nil {
		return err
	}
	defer f.Close()
	return g.opt.Store.PutBlob(ctx, repository, d.Digest.String(), d.Size, f)
}

// attach signs the verdict and stores it with the evidence it rests on.
func (g *Gate) attach(ctx context.Context, c *checking, rel Release) error {
	env, err := evidence.SignStatement(rel.Repository, rel.Digest, g.summary(c, rel), g.opt.Signer)
	if err != nil {
		return err
	}
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: VerdictType,
		Config:  v1.DescriptorEmptyJSON,
		Subject: &v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.Digest(rel.Digest), Size: int64(len(c.layout.raw))},
	}
	m.Config.Data = nil
	if _, err := g.putBytes(ctx, rel.Repository, []byte("{}")); err != nil {
		return err
	}
	docs := append([]document{{name: "release.json", raw: env.Raw()}}, c.layout.evidence...)
	for _, doc := range docs {
		dg, err := g.putBytes(ctx, rel.Repository, doc.raw)
		if err != nil {
			return err
		}
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: envelopeType, Digest: digest.Digest(dg), Size: int64(len(doc.raw)),
			Annotations: map[string]string{v1.AnnotationTitle: doc.name}})
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = g.opt.Store.PutManifest(ctx, rel.Repository, v1.MediaTypeImageManifest, raw)
	return err
}

func (g *Gate) putBytes(ctx context.Context, repository string, raw []byte) (string, error) {
	sum := sha256.Sum256(raw)
	dg := "sha256:" + hex.EncodeToString(sum[:])
	return dg, g.opt.Store.PutBlob(ctx, repository, dg, int64(len(raw)), bytes.NewReader(raw))
}

// summary is the verdict as a SLSA verification summary. The levels claim no
// more than was checked: a signed provenance, from a builder that the policy
// trusts but that this gate cannot see into.
func (g *Gate) summary(c *checking, rel Release) evidence.Summary {
	var inputs []evidence.Resource
	for _, d := range c.layout.evidence {
		inputs = append(inputs, evidence.Resource{URI: "evidence/" + d.name, Digest: map[string]string{"sha256": d.digest()[len("sha256:"):]}})
	}
	return evidence.Summary{
		Verifier: evidence.Verifier{ID: g.opt.Name}, TimeVerified: rel.ReleasedAt, ResourceURI: "oci:" + rel.Repository + ":" + rel.Tag + "@" + rel.Digest,
		Policy:            evidence.Resource{URI: "hauberk:" + rel.Namespace + "/" + rel.Application, Digest: map[string]string{"sha256": c.policyDigest}},
		InputAttestations: inputs, VerificationResult: "PASSED", SLSAVersion: "1.2",
		VerifiedLevels: []string{"SLSA_BUILD_LEVEL_1", "HAUBERK_REVIEWED", "HAUBERK_OWNER_APPROVED"},
		Release: evidence.SummaryRelease{
			Namespace: rel.Namespace, Application: rel.Application, Repository: rel.Repository, Tag: rel.Tag,
			Builder: rel.Builder, Source: rel.Source, Revision: rel.Revision, Author: rel.Author,
			Reviewers: rel.Reviewers, Owners: rel.Owners, LedgerIndex: rel.Index,
		},
	}
}

// Admitted says whether an image (repository:tag or repository@digest) may be
// launched for an application: it is in the store, this gate's verdict on it
// verifies and is for that application, and it is not revoked. The error is a
// *Refusal, unless the machine failed.
func (g *Gate) Admitted(ctx context.Context, namespace, application, image string) (Release, error) {
	const check = "admission"
	repository, tag, dg, err := parseImage(image)
	if err != nil {
		return Release{}, refuse(check, "ImageInvalid", "name it like bank/web:1", "%v", err)
	}
	if tag != "" {
		dg, err = g.opt.Store.Tag(ctx, repository, tag)
		if errors.Is(err, fs.ErrNotExist) {
			return Release{}, refuse(check, "NotReleased", "release it with hauberk release", "image %s was never released: %v", image, err)
		}
		if err != nil {
			return Release{}, fmt.Errorf("look up %s: %w", image, err)
		}
	}
	if e := g.opt.Epoch(); slices.Contains(e.Digests, dg) {
		return Release{}, refuse(check, "Revoked", "release and deploy a corrected image", "image %s (%s) is revoked since epoch %d or before", image, dg, e.Number)
	}
	verdicts, err := g.verdicts(ctx, repository, dg)
	if err != nil {
		return Release{}, err
	}
	var others []string
	for _, v := range verdicts {
		if tag != "" && v.Tag != tag {
			continue // a tag that was moved behind the gate's back names nothing
		}
		if v.Namespace == namespace && v.Application == application {
			return v, nil
		}
		others = append(others, v.Namespace+"/"+v.Application)
	}
	if len(others) > 0 {
		return Release{}, refuse(check, "ApplicationDiffers", "release it for this application", "image %s was released for application %v, not %s/%s", image, others, namespace, application)
	}
	return Release{}, refuse(check, "NotReleased", "release it with hauberk release", "image %s (%s) has no verdict of this gate", image, dg)
}

// verdicts returns what this gate said about a digest. A referrer that does
// not verify counts as nothing said.
func (g *Gate) verdicts(ctx context.Context, repository, dg string) ([]Release, error) {
	list, err := g.opt.Store.Referrers(ctx, repository, dg, VerdictType)
	if err != nil {
		return nil, fmt.Errorf("read verdicts on %s: %w", dg, err)
	}
	var out []Release
	for _, d := range list {
		_, raw, err := g.opt.Store.Manifest(ctx, repository, d.Digest.String())
		if err != nil {
			return nil, fmt.Errorf("read verdict %s: %w", d.Digest, err)
		}
		var m v1.Manifest
		if json.Unmarshal(raw, &m) != nil || len(m.Layers) == 0 {
			continue
		}
		raw, err = g.readBlob(ctx, repository, m.Layers[0].Digest.String())
		if err != nil {
			return nil, fmt.Errorf("read verdict %s: %w", d.Digest, err)
		}
		if rel, ok := g.readVerdict(raw, repository, dg); ok {
			out = append(out, rel)
		}
	}
	return out, nil
}

func (g *Gate) readVerdict(raw []byte, repository, dg string) (Release, bool) {
	env, err := evidence.ParseEnvelope(raw)
	if err != nil {
		return Release{}, false
	}
	s, _, err := evidence.VerifyStatement[evidence.Summary](env, dg, g.keys...)
	if err != nil || s.VerificationResult != "PASSED" || s.Release.Repository != repository {
		return Release{}, false
	}
	r := s.Release
	return Release{
		Namespace: r.Namespace, Application: r.Application, Repository: r.Repository, Tag: r.Tag, Digest: dg,
		Builder: r.Builder, Source: r.Source, Revision: r.Revision, Author: r.Author,
		Reviewers: r.Reviewers, Owners: r.Owners, Index: r.LedgerIndex, ReleasedAt: s.TimeVerified,
	}, true
}

func (g *Gate) readBlob(ctx context.Context, repository, dg string) ([]byte, error) {
	r, _, err := g.opt.Store.Blob(ctx, repository, dg)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, evidence.MaxEnvelope+1))
}

// Pull says whether the registry may serve a manifest: one that is released
// and not revoked, or a verdict.
func (g *Gate) Pull(repository, dg string) error {
	ctx := context.Background()
	if e := g.opt.Epoch(); slices.Contains(e.Digests, dg) {
		return refuse("pull", "Revoked", "pull a corrected image", "digest %s is revoked since epoch %d or before", dg, e.Number)
	}
	verdicts, err := g.verdicts(ctx, repository, dg)
	if err != nil {
		return err
	}
	if len(verdicts) > 0 {
		return nil
	}
	_, raw, err := g.opt.Store.Manifest(ctx, repository, dg)
	if err != nil {
		return err
	}
	var m v1.Manifest
	if json.Unmarshal(raw, &m) == nil && m.ArtifactType == VerdictType && m.Subject != nil {
		return nil
	}
	return refuse("pull", "NotReleased", "finish its release with hauberk release", "manifest %s of %s has no verdict of this gate", dg, repository)
}
