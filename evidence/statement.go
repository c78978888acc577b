package evidence

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"hauberk.dev/internal/strictjson"
)

// Payload, statement and predicate types.
const (
	StatementType  = "application/vnd.in-toto+json" // DSSE payload type
	statementV1    = "https://in-toto.io/Statement/v1"
	ProvenanceType = "https://slsa.dev/provenance/v1"
	SummaryType    = "https://slsa.dev/verification_summary/v1"
	ReviewType     = "https://hauberk.dev/review/v1"
	ApprovalType   = "https://hauberk.dev/approval/v1"
)

const (
	maxStatement = 512 << 10
	maxList      = 256 // subjects, materials, attestations
	maxText      = 2048
)

// Subject is the artifact a statement is about.
type Subject struct {
	Name   string            `json:"name,omitempty"`
	Digest map[string]string `json:"digest"`
}

// Statement is an in-toto Statement v1.
type Statement struct {
	Type          string          `json:"_type"`
	Subject       []Subject       `json:"subject"`
	PredicateType string          `json:"predicateType"`
	Predicate     json.RawMessage `json:"predicate"`
}

// Resource is an in-toto ResourceDescriptor.
type Resource struct {
	Name             string                     `json:"name,omitempty"`
	URI              string                     `json:"uri,omitempty"`
	Digest           map[string]string          `json:"digest,omitempty"`
	Content          []byte                     `json:"content,omitempty"`
	DownloadLocation string                     `json:"downloadLocation,omitempty"`
	MediaType        string                     `json:"mediaType,omitempty"`
	Annotations      map[string]json.RawMessage `json:"annotations,omitempty"`
}

// Provenance is the SLSA provenance v1 predicate: how an image was built.
type Provenance struct {
	BuildDefinition BuildDefinition `json:"buildDefinition"`
	RunDetails      RunDetails      `json:"runDetails"`
}

// BuildDefinition is what was asked of the builder.
type BuildDefinition struct {
	BuildType            string          `json:"buildType"`
	ExternalParameters   json.RawMessage `json:"externalParameters"`
	InternalParameters   json.RawMessage `json:"internalParameters,omitempty"`
	ResolvedDependencies []Resource      `json:"resolvedDependencies,omitempty"`
}

// RunDetails is who built, and when.
type RunDetails struct {
	Builder    Builder        `json:"builder"`
	Metadata   *BuildMetadata `json:"metadata,omitempty"`
	Byproducts []Resource     `json:"byproducts,omitempty"`
}

// Builder names the build platform.
type Builder struct {
	ID                  string            `json:"id"`
	BuilderDependencies []Resource        `json:"builderDependencies,omitempty"`
	Version             map[string]string `json:"version,omitempty"`
}

// BuildMetadata is about one run.
type BuildMetadata struct {
	InvocationID string     `json:"invocationId,omitempty"`
	StartedOn    *time.Time `json:"startedOn,omitempty"`
	FinishedOn   *time.Time `json:"finishedOn,omitempty"`
}

// Source is where an image was built from.
type Source struct {
	Repository string // URI without "git+" and without a reference
	Revision   string // full commit
	// Author of the revision, if the builder says (annotation "author").
	Author string
}

// NewProvenance makes a provenance of a build from one Git revision.
func NewProvenance(builder, buildType string, src Source) Provenance {
	dep := Resource{Name: "source", URI: "git+" + src.Repository, Digest: map[string]string{"gitCommit": src.Revision}}
	if src.Author != "" {
		author, _ := json.Marshal(src.Author) // strings always marshal
		dep.Annotations = map[string]json.RawMessage{"author": author}
	}
	return Provenance{
		BuildDefinition: BuildDefinition{BuildType: buildType, ExternalParameters: json.RawMessage("{}"), ResolvedDependencies: []Resource{dep}},
		RunDetails:      RunDetails{Builder: Builder{ID: builder}},
	}
}

// Source finds the source among the resolved dependencies: the one named
// "source", else the only one that is a Git revision. Anything less clear is
// an error.
func (p Provenance) Source() (Source, error) {
	var found []Resource
	for _, d := range p.BuildDefinition.ResolvedDependencies {
		if d.Name == "source" {
			found = []Resource{d}
			break
		}
		if strings.HasPrefix(d.URI, "git+") {
			found = append(found, d)
		}
	}
	if len(found) != 1 {
		return Source{}, fmt.Errorf("provenance: %d resolved dependencies could be the source; name one of them \"source\"", len(found))
	}
	d := found[0]
	uri, _, _ := strings.Cut(strings.TrimPrefix(d.URI, "git+"), "#")
	if at := strings.LastIndex(uri, "@"); at > strings.LastIndex(uri, "/") {
		uri = uri[:at] // the reference, such as @refs/heads/main, is no identity
	} else if i := strings.Index(uri, "@refs/"); i > 0 {
		uri = uri[:i]
	}
	rev := d.Digest["gitCommit"]
	if rev == "" {
		rev = d.Digest["sha1"]
	}
	if uri == "" || !isHex(rev, 40, 64) {
		return Source{}, fmt.Errorf("provenance: source %q has revision %q, want a URI and a full gitCommit digest", d.URI, rev)
	}
	src := Source{Repository: uri, Revision: rev}
	if raw, ok := d.Annotations["author"]; ok {
		if err := json.Unmarshal(raw, &src.Author); err != nil || len(src.Author) > 128 {
			return Source{}, errors.New("provenance: annotation author of the source is not a short string")
		}
	}
	return src, nil
}

func (p Provenance) check() error {
	deps := len(p.BuildDefinition.ResolvedDependencies) + len(p.RunDetails.Byproducts) + len(p.RunDetails.Builder.BuilderDependencies)
	return errors.Join(
		text("buildDefinition.buildType", p.BuildDefinition.BuildType, maxText),
		text("runDetails.builder.id", p.RunDetails.Builder.ID, maxText),
		atMost("dependencies and byproducts", deps, maxList))
}

// Review says a person read a revision and the image built from it.
type Review struct {
	Reviewer   string    `json:"reviewer"` // account name
	Author     string    `json:"author"`   // account name
	Revision   string    `json:"revision"`
	ReviewedOn time.Time `json:"reviewedOn,omitzero"`
}

func (r Review) check() error {
	if !isHex(r.Revision, 40, 64) {
		return fmt.Errorf("field revision: %.80q is not a full commit", r.Revision)
	}
	return errors.Join(text("reviewer", r.Reviewer, 128), text("author", r.Author, 128))
}

// Approval says an owner wants a digest released as a named image.
type Approval struct {
	Owner       string    `json:"owner"` // account name
	Application string    `json:"application"`
	ApprovedOn  time.Time `json:"approvedOn,omitzero"`
}

func (a Approval) check() error {
	return errors.Join(text("owner", a.Owner, 128), text("application", a.Application, 63))
}

// Summary is the SLSA verification summary (VSA) that a release carries: the
// gate's word that every check passed.
type Summary struct {
	Verifier           Verifier          `json:"verifier"`
	TimeVerified       time.Time         `json:"timeVerified"`
	ResourceURI        string            `json:"resourceUri"`
	Policy             Resource          `json:"policy"`
	InputAttestations  []Resource        `json:"inputAttestations,omitempty"`
	VerificationResult string            `json:"verificationResult"` // PASSED
	VerifiedLevels     []string          `json:"verifiedLevels"`
	DependencyLevels   map[string]uint64 `json:"dependencyLevels,omitempty"`
	SLSAVersion        string            `json:"slsaVersion,omitempty"`
	// Release is our extension field, named as SLSA asks extensions to be.
	Release SummaryRelease `json:"hauberk_release"`
}

// Verifier is who made a summary.
type Verifier struct {
	ID      string            `json:"id"`
	Version map[string]string `json:"version,omitempty"`
}

// SummaryRelease is what the gate decided on, in Hauberk's words.
type SummaryRelease struct {
	Namespace   string   `json:"namespace"`
	Application string   `json:"application"`
	Repository  string   `json:"repository"`
	Tag         string   `json:"tag,omitempty"`
	Builder     string   `json:"builder"`
	Source      string   `json:"source"`
	Revision    string   `json:"revision"`
	Author      string   `json:"author"`
	Reviewers   []string `json:"reviewers"`
	Owners      []string `json:"owners"`
	// LedgerIndex of the intent, written before the summary was signed.
	LedgerIndex uint64 `json:"ledgerIndex"`
}

func (s Summary) check() error {
	return errors.Join(
		text("verifier.id", s.Verifier.ID, maxText), text("resourceUri", s.ResourceURI, maxText),
		text("verificationResult", s.VerificationResult, 16),
		text("hauberk_release.namespace", s.Release.Namespace, 63), text("hauberk_release.application", s.Release.Application, 63),
		text("hauberk_release.repository", s.Release.Repository, 255),
		atMost("inputAttestations", len(s.InputAttestations), maxList), atMost("verifiedLevels", len(s.VerifiedLevels), maxList),
		atMost("reviewers and owners", len(s.Release.Reviewers)+len(s.Release.Owners), maxList))
}

// Predicate is what a statement can say.
type Predicate interface {
	Provenance | Review | Approval | Summary
}

// checkPredicate keeps anything malformed from being signed and from being
// read. Every Predicate checks itself.
func checkPredicate(p any) error { return p.(interface{ check() error }).check() }

func predicateType[P Predicate]() string {
	var p P
	switch any(p).(type) {
	case Provenance:
		return ProvenanceType
	case Review:
		return ReviewType
	case Approval:
		return ApprovalType
	}
	return SummaryType
}

// SignStatement makes an envelope of an in-toto statement about the image
// digest ("sha256:…"), which is called name.
func SignStatement[P Predicate](name, digest string, p P, s Signer) (Envelope, error) {
	if !digestPattern.MatchString(digest) {
		return Envelope{}, fmt.Errorf("sign statement: digest %.80q is not of the form %s", digest, digestPattern)
	}
	if err := checkPredicate(p); err != nil {
		return Envelope{}, fmt.Errorf("sign %s: %w", predicateType[P](), err)
	}
	raw, err := json.Marshal(p)
	if err != nil {
		return Envelope{}, fmt.Errorf("sign %s: %w", predicateType[P](), err)
	}
	payload, err := json.Marshal(Statement{
		Type: statementV1, PredicateType: predicateType[P](), Predicate: raw,
		Subject: []Subject{{Name: name, Digest: map[string]string{"sha256": strings.TrimPrefix(digest, "sha256:")}}},
	})
	if err != nil {
		return Envelope{}, fmt.Errorf("sign %s: %w", predicateType[P](), err)
	}
	return Sign(StatementType, payload, s)
}

// VerifyStatement returns what a statement about digest says, once one of the
// keys is found to have signed it.
func VerifyStatement[P Predicate](env Envelope, digest string, keys ...Key) (P, []KeyID, error) {
	var p P
	want := predicateType[P]()
	if env.PayloadType != StatementType {
		return p, nil, fmt.Errorf("verify %s: payload type is %q, want %q", want, env.PayloadType, StatementType)
	}
	payload, by, err := Verify(env, keys...)
	if err != nil {
		return p, nil, fmt.Errorf("%s: %w", want, err)
	}
	st, err := ParseStatement(payload)
	if err != nil {
		return p, nil, fmt.Errorf("verify %s: %w", want, err)
	}
	if st.PredicateType != want {
		return p, nil, fmt.Errorf("verify %s: predicate type is %q", want, st.PredicateType)
	}
	if !st.About(digest) {
		return p, nil, fmt.Errorf("verify %s: %w", want, &SubjectError{Digest: digest, Subjects: st.Subject})
	}
	if err := strictjson.Decode(st.Predicate, maxStatement, &p); err != nil {
		return p, nil, fmt.Errorf("parse %s: predicate %w", want, err)
	}
	if err := checkPredicate(p); err != nil {
		return p, nil, fmt.Errorf("parse %s: %w", want, err)
	}
	return p, by, nil
}

// SubjectError says that a good statement is about something else.
type SubjectError struct {
	Digest   string
	Subjects []Subject
}

func (e *SubjectError) Error() string {
	var about []string
	for _, s := range e.Subjects {
		about = append(about, fmt.Sprintf("%q sha256:%s", s.Name, s.Digest["sha256"]))
	}
	return fmt.Sprintf("the statement is about %s, not about %s; make one for this image", strings.Join(about, ", "), e.Digest)
}

// ParseStatement reads an in-toto statement strictly. It proves nothing about
// who made it.
func ParseStatement(payload []byte) (Statement, error) {
	var st Statement
	if err := strictjson.Decode(payload, maxStatement, &st); err != nil {
		return Statement{}, fmt.Errorf("parse statement: %w", err)
	}
	switch {
	case st.Type != statementV1:
		return Statement{}, fmt.Errorf("parse statement: type is %q, want %q", st.Type, statementV1)
	case len(st.Subject) == 0 || len(st.Subject) > maxList:
		return Statement{}, fmt.Errorf("parse statement: it has %d subjects, want 1 to %d", len(st.Subject), maxList)
	case len(st.Predicate) == 0 || string(st.Predicate) == "null":
		return Statement{}, errors.New("parse statement: it has no predicate")
	}
	if u, err := url.Parse(st.PredicateType); err != nil || u.Scheme == "" || len(st.PredicateType) > maxText {
		return Statement{}, fmt.Errorf("parse statement: predicate type %.80q is not a URI", st.PredicateType)
	}
	for _, s := range st.Subject {
		if len(s.Digest) == 0 || len(s.Digest) > 16 || len(s.Name) > maxText {
			return Statement{}, fmt.Errorf("parse statement: subject %.80q has %d digests, want 1 to 16", s.Name, len(s.Digest))
		}
	}
	return st, nil
}

// About says whether one of the subjects is the digest ("sha256:…").
func (st Statement) About(digest string) bool {
	hex, ok := strings.CutPrefix(digest, "sha256:")
	for _, s := range st.Subject {
		if ok && len(hex) == 64 && s.Digest["sha256"] == hex {
			return true
		}
	}
	return false
}

func text(field, s string, limit int) error {
	if s == "" || len(s) > limit {
		return fmt.Errorf("field %s: %d bytes, want 1 to %d", field, len(s), limit)
	}
	return nil
}

func atMost(field string, n, limit int) error {
	if n > limit {
		return fmt.Errorf("field %s: %d items, at most %d are allowed", field, n, limit)
	}
	return nil
}

func isHex(s string, lengths ...int) bool {
	for _, n := range lengths {
		if len(s) == n {
			return strings.Trim(s, "0123456789abcdef") == ""
		}
	}
	return false
}
