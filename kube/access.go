package kube

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/group"
	x509request "k8s.io/apiserver/pkg/authentication/request/x509"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
)

// Groups that a client certificate may name as its organization. Membership
// in none of them opens nothing but the description of the API.
const (
	// GroupMasters may do everything.
	GroupMasters = user.SystemPrivilegedGroup
	// GroupViewer reads everything except secrets.
	GroupViewer = "hauberk:viewer"
)

// clientCertificates authenticates by certificates that one of the roots
// signed: common name becomes user, organizations become groups.
func clientCertificates(roots []byte) (authenticator.Request, error) {
	pool, n := x509.NewCertPool(), 0
	for rest := roots; ; n++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("read client roots: certificate %d: %w", n+1, err)
		}
		pool.AddCert(cert)
	}
	if n == 0 {
		return nil, errors.New("read client roots: no certificate in them: nobody could ever log in")
	}
	options := x509request.DefaultVerifyOptions()
	options.Roots = pool
	return group.NewAuthenticatedGroupAdder(x509request.New(options, x509request.UserConversionFunc(person))), nil
}

// person refuses certificates with a SPIFFE name: they prove which workload,
// node or program someone is, not that they may operate, even where one root
// signs both.
func person(chain []*x509.Certificate) (*authenticator.Response, bool, error) {
	for _, uri := range chain[0].URIs {
		if uri.Scheme == "spiffe" {
			return nil, false, fmt.Errorf("authenticate: %q is an identity, not an account", uri)
		}
	}
	return x509request.CommonNameUserConversion(chain)
}

// rights decides who may do what. It is deny by default.
type rights struct{}

// described are paths that describe the API; anyone with an account reads them.
var described = []string{"/api", "/apis", "/openapi", "/version", "/healthz", "/livez", "/readyz"}

// reviews are questions about oneself.
var reviews = []string{"selfsubjectaccessreviews", "selfsubjectreviews", "selfsubjectrulesreviews"}

var readVerbs = []string{"get", "list", "watch"}

// Authorize implements authorizer.Authorizer.
func (rights) Authorize(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	u := a.GetUser()
	if u == nil {
		return authorizer.DecisionDeny, "no user", nil
	}
	switch groups := u.GetGroups(); {
	case slices.Contains(groups, GroupMasters):
		return authorizer.DecisionAllow, "", nil
	case !slices.Contains(groups, user.AllAuthenticated):
		return authorizer.DecisionDeny, "nobody without an account may do anything", nil
	case !a.IsResourceRequest():
		return describe(a)
	case a.GetVerb() == "create" && slices.Contains(reviews, a.GetResource()):
		return authorizer.DecisionAllow, "", nil
	case slices.Contains(groups, GroupViewer):
		return view(a)
	default:
		return authorizer.DecisionDeny, fmt.Sprintf("account %q is in no group that may: its certificate names none of %s, %s", u.GetName(), GroupMasters, GroupViewer), nil
	}
}

func describe(a authorizer.Attributes) (authorizer.Decision, string, error) {
	if verb := strings.ToUpper(a.GetVerb()); verb != http.MethodGet && verb != http.MethodHead {
		return authorizer.DecisionDeny, fmt.Sprintf("only reading of %s is open to every account", a.GetPath()), nil
	}
	for _, p := range described {
		if a.GetPath() == p || strings.HasPrefix(a.GetPath(), p+"/") {
			return authorizer.DecisionAllow, "", nil
		}
	}
	return authorizer.DecisionDeny, fmt.Sprintf("path %s is open to group %s only", a.GetPath(), GroupMasters), nil
}

func view(a authorizer.Attributes) (authorizer.Decision, string, error) {
	switch {
	case !slices.Contains(readVerbs, a.GetVerb()):
		return authorizer.DecisionDeny, fmt.Sprintf("group %s only reads", GroupViewer), nil
	case slices.Contains([]string{"", "*"}, a.GetAPIGroup()) && slices.Contains([]string{"secrets", "*"}, a.GetResource()):
		return authorizer.DecisionDeny, fmt.Sprintf("group %s reads everything but secrets", GroupViewer), nil
	default:
		return authorizer.DecisionAllow, "", nil
	}
}

// ConditionsAwareAuthorize implements authorizer.Authorizer.
func (r rights) ConditionsAwareAuthorize(ctx context.Context, a authorizer.Attributes) authorizer.ConditionsAwareDecision {
	return authorizer.ConditionsAwareDecisionFromParts(r.Authorize(ctx, a))
}

// EvaluateConditions implements authorizer.Authorizer: rights have none.
func (rights) EvaluateConditions(context.Context, authorizer.ConditionsAwareDecision, authorizer.ConditionsData) (authorizer.Decision, string, error) {
	return authorizer.DecisionDeny, "", authorizer.ErrorConditionEvaluationNotSupported
}

// RulesFor implements authorizer.RuleResolver.
func (rights) RulesFor(_ context.Context, u user.Info, _ string) ([]authorizer.ResourceRuleInfo, []authorizer.NonResourceRuleInfo, bool, error) {
	all := []string{"*"}
	if slices.Contains(u.GetGroups(), GroupMasters) {
		return []authorizer.ResourceRuleInfo{&authorizer.DefaultResourceRuleInfo{Verbs: all, APIGroups: all, Resources: all}},
			[]authorizer.NonResourceRuleInfo{&authorizer.DefaultNonResourceRuleInfo{Verbs: all, NonResourceURLs: all}}, false, nil
	}
	rules := []authorizer.ResourceRuleInfo{&authorizer.DefaultResourceRuleInfo{
		Verbs: []string{"create"}, APIGroups: []string{"authentication.k8s.io", "authorization.k8s.io"}, Resources: reviews,
	}}
	// What the viewer may read cannot be said without naming every kind but
	// one, so the list is marked incomplete.
	viewer := slices.Contains(u.GetGroups(), GroupViewer)
	if viewer {
		rules = append(rules, &authorizer.DefaultResourceRuleInfo{Verbs: readVerbs, APIGroups: []string{"hauberk.dev"}, Resources: all})
	}
	var paths []string
	for _, p := range described {
		paths = append(paths, p, p+"/*")
	}
	return rules, []authorizer.NonResourceRuleInfo{&authorizer.DefaultNonResourceRuleInfo{Verbs: []string{"get"}, NonResourceURLs: paths}}, viewer, nil
}
