// Package release is the gate: the only way an image gets into the registry,
// and the only word on whether it may be launched.
//
// Release checks a submission in a fixed order (who owns it, who built it from
// what, who reviewed it, who approved it, what the policy says), records what
// it is about to do, stores the image, and attaches its signed verdict to it.
// Admitted reads that verdict back. The gate trusts keys it finds in the
// Application, not names in documents; it builds nothing and runs nothing.
package release

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"hauberk.dev/api/spec"
	"hauberk.dev/evidence"
	"hauberk.dev/ledger"
	"hauberk.dev/plan"
)

// Applications finds applications. One that does not exist is an error that
// is fs.ErrNotExist.
type Applications interface {
	Application(ctx context.Context, namespace, name string) (spec.Application, error)
}

// Policies lists the release policies of a namespace.
type Policies interface {
	ReleasePolicies(ctx context.Context, namespace string) ([]Policy, error)
}

// Policy is a ReleasePolicy with its name.
type Policy struct {
	Name string             `json:"name"`
	Spec spec.ReleasePolicy `json:"spec"`
}

// Store keeps released content. What is not there is an error that is
// fs.ErrNotExist; content is checked against its digest by the store.
type Store interface {
	Writer
	Tag(ctx context.Context, repository, tag string) (digest string, err error)
	Tags(ctx context.Context, repository string) ([]string, error)
	Manifest(ctx context.Context, repository, digest string) (mediaType string, raw []byte, err error)
	Blob(ctx context.Context, repository, digest string) (io.ReadCloser, int64, error)
	Referrers(ctx context.Context, repository, digest, artifactType string) ([]v1.Descriptor, error)
}

// Writer is the half of a Store that only the gate has.
type Writer interface {
	PutBlob(ctx context.Context, repository, digest string, size int64, r io.Reader) error
	PutManifest(ctx context.Context, repository, mediaType string, raw []byte) (digest string, err error)
	PutTag(ctx context.Context, repository, tag, digest string) error
}

// Recorder writes to the ledger. An entry is durable when Append returns.
type Recorder interface {
	Append(context.Context, ledger.Entry) (uint64, error)
}

// Options of a Gate. All but Clock, OldKeys and Scratch must be set.
type Options struct {
	Applications Applications
	Policies     Policies
	Store        Store
	Recorder     Recorder
	// Signer signs verdicts; its key and OldKeys are believed when they are
	// read back.
	Signer  *evidence.KeySigner
	OldKeys []evidence.Key
	// Name is this gate's id in its verdicts, a URI.
	Name string
	// Epoch is what is no longer trusted.
	Epoch func() plan.Epoch
	// Scratch is where submissions are unpacked; the system's if empty.
	Scratch string
	Clock   func() time.Time
}

// Gate decides on releases. Its methods may be called at the same time.
type Gate struct {
	opt  Options
	keys []evidence.Key

	// mu makes deciding that a tag is free and taking it one step.
	mu sync.Mutex
}

// New refuses options that would leave a check out.
func New(o Options) (*Gate, error) {
	if o.Applications == nil || o.Policies == nil || o.Store == nil || o.Recorder == nil || o.Signer == nil || o.Epoch == nil || o.Name == "" {
		return nil, errors.New("new gate: applications, policies, store, recorder, signer, epoch and name must all be set")
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	return &Gate{opt: o, keys: append([]evidence.Key{o.Signer.Key()}, o.OldKeys...)}, nil
}

// Submission is an image that somebody wants released: an OCI image layout
// with one image, and under evidence/ its statements as DSSE envelopes
// (provenance.json, review-<any>.json, approval-<any>.json).
type Submission struct {
	Namespace   string
	Application string
	Image       string // repository:tag
	Actor       string // who submits, for the ledger
	// Exactly one of Dir and Tar.
	Dir string
	Tar io.Reader
}

// Check is one thing that was verified.
type Check struct {
	Name   string `json:"name"`
	Detail string `json:"detail"`
}

// Decision on a submission that passed.
type Decision struct {
	Release
	// Checks that passed, in order.
	Checks []Check `json:"checks"`
	// Already is true if the same release was made before; nothing was
	// written.
	Already bool `json:"already,omitempty"`
}

// Release is an image that passed the gate.
type Release struct {
	Namespace   string    `json:"namespace"`
	Application string    `json:"application"`
	Repository  string    `json:"repository"`
	Tag         string    `json:"tag"`
	Digest      string    `json:"digest"`
	Builder     string    `json:"builder"`
	Source      string    `json:"source"`
	Revision    string    `json:"revision"`
	Author      string    `json:"author"`
	Reviewers   []string  `json:"reviewers"`
	Owners      []string  `json:"owners"`
	Index       uint64    `json:"index"` // of the ledger entry of the intent
	ReleasedAt  time.Time `json:"releasedAt"`
}

// Image is the release as people write it.
func (r Release) Image() string { return r.Repository + ":" + r.Tag }

// Refusal says what is wrong with a submission or a reference, and what to do.
type Refusal struct {
	Check   string // name of the check that failed
	Reason  string // one CamelCase word, stable
	Message string
	Fix     string
	// Index of the ledger entry that recorded the refusal, or -1.
	Index int64
}

func (r *Refusal) Error() string {
	return fmt.Sprintf("%s: %s: %s; %s", r.Check, r.Reason, r.Message, r.Fix)
}

func refuse(check, reason, fix, format string, args ...any) *Refusal {
	return &Refusal{Check: check, Reason: reason, Fix: fix, Message: fmt.Sprintf(format, args...), Index: -1}
}

// Release checks a submission and, if all is well, makes it a release. A
// *Refusal says which check failed and is recorded; any other error is a
// failure of this machine. In both cases nothing was released.
func (g *Gate) Release(ctx context.Context, s Submission) (Decision, error) {
	c := &checking{gate: g, sub: s}
	defer c.close()
	err := c.run(ctx)
	if err == nil {
		d, err := g.store(ctx, c)
		if err == nil {
			return d, nil
		}
		return Decision{}, g.refused(ctx, c, err)
	}
	return Decision{}, g.refused(ctx, c, err)
}

// refused records a refusal; other errors pass.
func (g *Gate) refused(ctx context.Context, c *checking, err error) error {
	var r *Refusal
	if !errors.As(err, &r) {
		return fmt.Errorf("release %s: %w", c.sub.Image, err)
	}
	body, jerr := json.Marshal(map[string]any{"check": r.Check, "reason": r.Reason, "fix": r.Fix, "passed": c.passed})
	if jerr != nil {
		return jerr
	}
	at, lerr := g.opt.Recorder.Append(context.WithoutCancel(ctx), ledger.Entry{
		Time: g.opt.Clock(), Kind: "release.refused", Actor: clip(c.sub.Actor), Subject: clip(c.sub.Image), Digest: c.digest,
		Namespace: clip(c.sub.Namespace), Application: clip(c.sub.Application),
		Text: clip(fmt.Sprintf("release of %.300s refused by check %s: %s; %s", c.sub.Image, r.Check, r.Message, r.Fix)), Body: body,
	})
	if lerr == nil {
		r.Index = int64(at)
	}
	return errors.Join(r, lerr)
}

// clip keeps what a stranger sent from filling a ledger entry.
func clip(s string) string {
	if len(s) > 4096 {
		return s[:4096] + "…"
	}
	return s
}

// store makes a checked submission a release: intent, content, verdict, tag,
// outcome. The tag is last, so what a crash leaves behind has no name, and
// content without a verdict is not admitted.
func (g *Gate) store(ctx context.Context, c *checking) (Decision, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := c.checkTag(ctx); err != nil {
		return Decision{}, err
	}
	if old, err := g.Admitted(ctx, c.sub.Namespace, c.sub.Application, c.sub.Image); err == nil && old.Digest == c.digest {
		return Decision{Release: old, Checks: c.passed, Already: true}, nil
	}
	rel := c.release(g.opt.Clock().UTC().Truncate(time.Second))
	intent, err := g.intent(c, rel)
	if err != nil {
		return Decision{}, err
	}
	if rel.Index, err = g.opt.Recorder.Append(ctx, intent); err != nil {
		return Decision{}, fmt.Errorf("record intent: %w", err)
	}
	err = g.write(ctx, c, rel)
	out := intent
	out.Time, out.Kind, out.Body = g.opt.Clock(), "release.done", nil
	out.Text = fmt.Sprintf("released %s as %s, decided in entry %d", rel.Image(), rel.Digest, rel.Index)
	if err != nil {
		out.Kind, out.Text = "release.failed", clip(fmt.Sprintf("release of %s decided in entry %d failed: %v", rel.Image(), rel.Index, err))
	}
	_, lerr := g.opt.Recorder.Append(context.WithoutCancel(ctx), out)
	if err := errors.Join(err, lerr); err != nil {
		return Decision{}, err
	}
	return Decision{Release: rel, Checks: c.passed}, nil
}

func (g *Gate) intent(c *checking, rel Release) (ledger.Entry, error) {
	body, err := json.Marshal(map[string]any{"release": rel, "checks": c.passed, "policy": c.policyDigest, "evidence": c.layout.evidenceDigests()})
	if err != nil {
		return ledger.Entry{}, err
	}
	return ledger.Entry{
		Time: g.opt.Clock(), Kind: "release.intent", Actor: clip(c.sub.Actor), Subject: rel.Image(), Digest: rel.Digest,
		Namespace: rel.Namespace, Application: rel.Application, Body: body,
		Text: fmt.Sprintf("release of %s (%s) passed %d checks: built by %s from %s at %.12s, written by %s, reviewed by %v, approved by %v",
			rel.Image(), rel.Digest, len(c.passed), rel.Builder, rel.Source, rel.Revision, rel.Author, rel.Reviewers, rel.Owners),
	}, nil
}
