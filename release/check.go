package release

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"time"

	"hauberk.dev/api/spec"
	"hauberk.dev/evidence"
	"hauberk.dev/policy/rule"
)

// checking is one submission on its way through the checks. Each check fills
// in what later ones need.
type checking struct {
	gate   *Gate
	sub    Submission
	passed []Check

	repository, tag string
	app             spec.Application
	accounts        map[evidence.KeyID]spec.Account
	keys            map[spec.Role][]evidence.Key
	policies        []Policy
	policyDigest    string
	rules           []*rule.Set
	layout          *layout
	digest          string
	provenance      evidence.Provenance
	source          evidence.Source
	author          string
	reviewers       []string
	owners          []string
}

func (c *checking) close() { c.layout.close() }

// run does the checks in the order in which they depend on each other. The
// first that fails ends it.
func (c *checking) run(ctx context.Context) error {
	for _, step := range []struct {
		name  string
		check func(context.Context) (string, error)
	}{
		{"application", c.checkApplication},
		{"repository", c.checkRepository},
		{"policy", c.checkPolicy},
		{"content", c.checkContent},
		{"provenance", c.checkProvenance},
		{"builder", c.checkBuilder},
		{"source", c.checkSource},
		{"review", c.checkReviews},
		{"approval", c.checkApproval},
		{"rules", c.checkRules},
		{"revocation", c.checkRevoked},
	} {
		if err := ctx.Err(); err != nil {
			return err
		}
		detail, err := step.check(ctx)
		if err != nil {
			return err
		}
		c.passed = append(c.passed, Check{step.name, detail})
	}
	return nil
}

func (c *checking) checkApplication(ctx context.Context) (string, error) {
	const fix = "apply an Application that names its owners, or correct --application"
	if !labelPattern.MatchString(c.sub.Namespace) || !labelPattern.MatchString(c.sub.Application) {
		return "", refuse("application", "ApplicationInvalid", fix, "namespace %.80q or application %.80q is not a DNS label", c.sub.Namespace, c.sub.Application)
	}
	app, err := c.gate.opt.Applications.Application(ctx, c.sub.Namespace, c.sub.Application)
	if errors.Is(err, fs.ErrNotExist) {
		return "", refuse("application", "ApplicationUnknown", fix, "application %q does not exist in namespace %q", c.sub.Application, c.sub.Namespace)
	}
	if err != nil {
		return "", fmt.Errorf("find application %s/%s: %w", c.sub.Namespace, c.sub.Application, err)
	}
	c.app = app
	c.accounts = map[evidence.KeyID]spec.Account{}
	c.keys = map[spec.Role][]evidence.Key{}
	for _, a := range app.Accounts {
		if a.Key == "" {
			continue
		}
		key, err := evidence.ParseKey([]byte(a.Key), "account "+a.Name)
		if err != nil {
			return "", refuse("application", "AccountKeyInvalid", "put the account's public key into the Application", "%v", err)
		}
		if other, taken := c.accounts[key.ID]; taken {
			return "", refuse("application", "AccountKeyShared", "give each account a key of its own", "accounts %q and %q have the same key, so nobody can tell which of them signed", other.Name, a.Name)
		}
		c.accounts[key.ID] = a
		for _, r := range a.Roles {
			c.keys[r] = append(c.keys[r], key)
		}
	}
	return fmt.Sprintf("%s/%s, %d accounts", c.sub.Namespace, c.sub.Application, len(app.Accounts)), nil
}

var (
	labelPattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	imagePattern = regexp.MustCompile(`^([a-z0-9]+(?:[._/-][a-z0-9]+)*)(?::([A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@(sha256:[a-f0-9]{64}))$`)
)

// parseImage takes repository:tag or repository@digest apart.
func parseImage(s string) (repository, tag, digest string, err error) {
	m := imagePattern.FindStringSubmatch(s)
	if len(s) > 255 || m == nil {
		return "", "", "", fmt.Errorf("image %.300q is neither repository:tag nor repository@sha256:…", s)
	}
	return m[1], m[2], m[3], nil
}

func (c *checking) checkRepository(ctx context.Context) (string, error) {
	repository, tag, _, err := parseImage(c.sub.Image)
	if err != nil {
		return "", refuse("repository", "ImageInvalid", "name it like "+c.sub.Namespace+"/web:1", "%v", err)
	}
	if tag == "" {
		return "", refuse("repository", "TagMissing", "name the release by a tag; its digest follows from the content", "image %q has no tag", c.sub.Image)
	}
	if !strings.HasPrefix(repository, c.sub.Namespace+"/") {
		return "", refuse("repository", "RepositoryForeign", "release to "+c.sub.Namespace+"/<name>", "repository %q does not belong to namespace %q", repository, c.sub.Namespace)
	}
	c.repository, c.tag = repository, tag
	tags, err := c.gate.opt.Store.Tags(ctx, repository)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("list %s: %w", repository, err)
	}
	for _, t := range tags {
		owner, err := c.gate.Admitted(ctx, c.sub.Namespace, c.sub.Application, repository+":"+t)
		var r *Refusal
		if errors.As(err, &r) && r.Reason == "ApplicationDiffers" {
			return "", refuse("repository", "RepositoryTaken", "use a repository of your own", "repository %q holds releases of another application: %s", repository, r.Message)
		}
		if err == nil && owner.Application == c.sub.Application {
			break
		}
	}
	return repository, nil
}

func (c *checking) checkPolicy(ctx context.Context) (string, error) {
	all, err := c.gate.opt.Policies.ReleasePolicies(ctx, c.sub.Namespace)
	if err != nil {
		return "", fmt.Errorf("find release policies of %s: %w", c.sub.Namespace, err)
	}
	var names []string
	for _, p := range all {
		if !slices.Contains(p.Spec.Applications, c.sub.Application) && !slices.Contains(p.Spec.Applications, "*") {
			continue
		}
		set, err := rule.Compile(p.Name, p.Spec.Rules)
		if err != nil {
			return "", refuse("policy", "PolicyInvalid", "correct the ReleasePolicy", "%v", err)
		}
		c.policies, c.rules, names = append(c.policies, p), append(c.rules, set), append(names, p.Name)
	}
	if len(names) == 0 {
		return "", refuse("policy", "PolicyMissing", "apply a ReleasePolicy that lists it, or \"*\"", "no ReleasePolicy in namespace %q covers application %q, and without one nothing is released", c.sub.Namespace, c.sub.Application)
	}
	if c.policyDigest, err = digestJSON(map[string]any{"application": c.app, "policies": c.policies}); err != nil {
		return "", err
	}
	return strings.Join(names, ", "), nil
}

func (c *checking) checkContent(context.Context) (string, error) {
	l, err := openLayout(c.sub, c.gate.opt.Scratch)
	var disk *diskError
	if errors.As(err, &disk) {
		return "", fmt.Errorf("unpack submission: %w", err)
	}
	if err != nil {
		return "", refuse("content", "ContentInvalid", "submit an OCI image layout with one image and its evidence", "%v", err)
	}
	c.layout, c.digest = l, l.digest
	return fmt.Sprintf("%s, %d layers", l.digest, len(l.manifest.Layers)), nil
}

// statement verifies one document of evidence under the keys of a role.
func statement[P evidence.Provenance | evidence.Review | evidence.Approval](c *checking, check string, role spec.Role, d document) (P, []spec.Account, error) {
	var none P
	keys := c.keys[role]
	if len(keys) == 0 {
		return none, nil, refuse(check, "NoSuchAccount", "add one with its key to the Application", "application %q has no account with role %q and a key", c.sub.Application, role)
	}
	p, by, err := evidence.VerifyStatement[P](d.env, c.digest, keys...)
	var subject *evidence.SubjectError
	switch {
	case errors.As(err, &subject):
		return none, nil, refuse(check, "SubjectDiffers", "sign evidence for the digest that is submitted", "evidence/%s: %v", d.name, err)
	case err != nil:
		return none, nil, refuse(check, "SignatureInvalid", fmt.Sprintf("it must be signed with the key of an account with role %q", role), "evidence/%s: %v", d.name, err)
	}
	var accounts []spec.Account
	for _, k := range by {
		accounts = append(accounts, c.accounts[k])
	}
	return p, accounts, nil
}

func named(accounts []spec.Account, name string) bool {
	return slices.ContainsFunc(accounts, func(a spec.Account) bool { return a.Name == name })
}

func (c *checking) checkProvenance(context.Context) (string, error) {
	docs := c.layout.documents("provenance.json")
	if len(docs) == 0 {
		return "", refuse("provenance", "ProvenanceMissing", "build with a builder that signs SLSA provenance into evidence/provenance.json", "the image has no provenance")
	}
	p, by, err := statement[evidence.Provenance](c, "provenance", spec.RoleBuilder, docs[0])
	if err != nil {
		return "", err
	}
	c.provenance = p
	return fmt.Sprintf("signed by %s for this digest", by[0].Name), nil
}

func (c *checking) checkBuilder(context.Context) (string, error) {
	builder := c.provenance.RunDetails.Builder.ID
	for _, p := range c.policies {
		if !slices.Contains(p.Spec.Builders, builder) {
			return "", refuse("builder", "BuilderNotAllowed", "build on an allowed builder, or add it to the policy", "release policy %q allows builders %q, not %.300q", p.Name, p.Spec.Builders, builder)
		}
	}
	return builder, nil
}

func (c *checking) checkSource(context.Context) (string, error) {
	src, err := c.provenance.Source()
	if err != nil {
		return "", refuse("source", "SourceUnclear", "let the builder name the source among the resolved dependencies", "%v", err)
	}
	if !slices.Contains(c.app.Repositories, src.Repository) {
		return "", refuse("source", "SourceForeign", "build from a repository of the application, or add it to the Application", "it was built from %.300q, and application %q is built from %q", src.Repository, c.sub.Application, c.app.Repositories)
	}
	c.source = src
	return fmt.Sprintf("%s at %.12s", src.Repository, src.Revision), nil
}

func (c *checking) checkReviews(context.Context) (string, error) {
	need := 1
	for _, p := range c.policies {
		need = max(need, int(p.Spec.Reviewers))
	}
	c.author = c.source.Author
	for _, d := range c.layout.documents("review-") {
		r, by, err := statement[evidence.Review](c, "review", spec.RoleReviewer, d)
		if err != nil {
			return "", err
		}
		if err := c.checkReview(d, r, by); err != nil {
			return "", err
		}
		if !slices.Contains(c.reviewers, r.Reviewer) {
			c.reviewers = append(c.reviewers, r.Reviewer)
		}
	}
	if len(c.reviewers) < need {
		return "", refuse("review", "ReviewsMissing", "let another reviewer sign a review of the digest", "%d reviewers signed %q, the policy asks for %d", len(c.reviewers), c.reviewers, need)
	}
	return fmt.Sprintf("by %s, written by %s", strings.Join(c.reviewers, ", "), c.author), nil
}

// checkReview looks at one good signature: does its owner speak for himself,
// about what was built, and not about his own work.
func (c *checking) checkReview(d document, r evidence.Review, by []spec.Account) error {
	if c.author == "" {
		c.author = r.Author
	}
	switch {
	case !named(by, r.Reviewer):
		return refuse("review", "ReviewerDiffers", "each reviewer signs in their own name", "evidence/%s speaks for %q but %q signed it", d.name, r.Reviewer, by[0].Name)
	case r.Author != c.author:
		return refuse("review", "AuthorDiffers", "name the author of the revision as the builder and the other reviews do", "evidence/%s says %q wrote it, other evidence says %q", d.name, r.Author, c.author)
	case !named(c.app.Accounts, r.Author):
		return refuse("review", "AuthorUnknown", "add the author to the Application's accounts", "author %q is no account of application %q", r.Author, c.sub.Application)
	case r.Reviewer == r.Author:
		return refuse("review", "ReviewerIsAuthor", "let somebody else review it", "%q reviewed their own work", r.Author)
	case r.Revision != c.source.Revision:
		return refuse("review", "RevisionDiffers", "review the revision that was built", "evidence/%s reviews revision %.64s, built was %.64s", d.name, r.Revision, c.source.Revision)
	}
	return nil
}

func (c *checking) checkApproval(context.Context) (string, error) {
	for _, d := range c.layout.documents("approval-") {
		a, by, err := statement[evidence.Approval](c, "approval", spec.RoleOwner, d)
		if err != nil {
			return "", err
		}
		if !named(by, a.Owner) {
			return "", refuse("approval", "OwnerDiffers", "each owner signs in their own name", "evidence/%s speaks for %q but %q signed it", d.name, a.Owner, by[0].Name)
		}
		if a.Application != c.sub.Application {
			return "", refuse("approval", "ApplicationDiffers", "approve it for this application", "evidence/%s approves it for application %q, not %q", d.name, a.Application, c.sub.Application)
		}
		if !slices.Contains(c.owners, a.Owner) {
			c.owners = append(c.owners, a.Owner)
		}
	}
	if len(c.owners) == 0 {
		return "", refuse("approval", "ApprovalMissing", "let an owner sign an approval of the digest into evidence/approval-<name>.json", "no owner of application %q has approved it", c.sub.Application)
	}
	return "by " + strings.Join(c.owners, ", "), nil
}

func (c *checking) checkRules(ctx context.Context) (string, error) {
	n := 0
	for _, set := range c.rules {
		if err := set.Check(ctx, rule.Facts{
			Application: c.sub.Application,
			Image:       rule.Image{Repository: c.repository, Digest: c.digest},
			Provenance: rule.Provenance{Builder: c.provenance.RunDetails.Builder.ID, Source: c.source.Repository,
				Revision: c.source.Revision, BuildType: c.provenance.BuildDefinition.BuildType},
			Author: c.author, Reviewers: c.reviewers, Owners: c.owners,
		}); err != nil {
			if ctx.Err() != nil {
				return "", ctx.Err()
			}
			return "", refuse("rules", "RuleBroken", "change the release so that the rule is true, or ask the owners of the policy", "%v", err)
		}
		n += set.Len()
	}
	return fmt.Sprintf("%d rules true", n), nil
}

func (c *checking) checkRevoked(context.Context) (string, error) {
	if e := c.gate.opt.Epoch(); slices.Contains(e.Digests, c.digest) {
		return "", refuse("revocation", "Revoked", "release a corrected image", "digest %s is revoked since epoch %d or before", c.digest, e.Number)
	}
	return "digest is not revoked", nil
}

// checkTag refuses to move a tag.
func (c *checking) checkTag(ctx context.Context) error {
	old, err := c.gate.opt.Store.Tag(ctx, c.repository, c.tag)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("look up tag: %w", err)
	case old != c.digest:
		return refuse("tag", "TagTaken", "release it under a new tag; a tag never moves", "%s:%s is %s, submitted is %s", c.repository, c.tag, old, c.digest)
	}
	c.passed = append(c.passed, Check{"tag", c.tag + " is free or names this digest"})
	return nil
}

func (c *checking) release(at time.Time) Release {
	return Release{
		Namespace: c.sub.Namespace, Application: c.sub.Application, Repository: c.repository, Tag: c.tag, Digest: c.digest,
		Builder: c.provenance.RunDetails.Builder.ID, Source: c.source.Repository, Revision: c.source.Revision,
		Author: c.author, Reviewers: c.reviewers, Owners: c.owners, ReleasedAt: at,
	}
}
