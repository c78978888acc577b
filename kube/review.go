package kube

import (
	"context"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
)

// Reviews are questions that store nothing: who am I, what may I do.

type question struct{}

func (question) NamespaceScoped() bool { return false }
func (question) Destroy()              {}

type selfReview struct{ question }

func (selfReview) New() runtime.Object     { return &authenticationv1.SelfSubjectReview{} }
func (selfReview) GetSingularName() string { return "selfsubjectreview" }

func (selfReview) Create(ctx context.Context, obj runtime.Object, _ rest.ValidateObjectFunc, _ *metav1.CreateOptions) (runtime.Object, error) {
	u, err := asker(ctx)
	if err != nil {
		return nil, err
	}
	extra := map[string]authenticationv1.ExtraValue{}
	for k, v := range u.GetExtra() {
		extra[k] = v
	}
	r := obj.(*authenticationv1.SelfSubjectReview)
	r.Status.UserInfo = authenticationv1.UserInfo{Username: u.GetName(), UID: u.GetUID(), Groups: u.GetGroups(), Extra: extra}
	return r, nil
}

type selfAccessReview struct{ rights }

func (selfAccessReview) NamespaceScoped() bool   { return false }
func (selfAccessReview) Destroy()                {}
func (selfAccessReview) New() runtime.Object     { return &authorizationv1.SelfSubjectAccessReview{} }
func (selfAccessReview) GetSingularName() string { return "selfsubjectaccessreview" }

func (s selfAccessReview) Create(ctx context.Context, obj runtime.Object, _ rest.ValidateObjectFunc, _ *metav1.CreateOptions) (runtime.Object, error) {
	u, err := asker(ctx)
	if err != nil {
		return nil, err
	}
	r := obj.(*authorizationv1.SelfSubjectAccessReview)
	r.Status, err = review(ctx, s.rights, u, r.Spec.ResourceAttributes, r.Spec.NonResourceAttributes)
	return r, err
}

type accessReview struct{ rights }

func (accessReview) NamespaceScoped() bool   { return false }
func (accessReview) Destroy()                {}
func (accessReview) New() runtime.Object     { return &authorizationv1.SubjectAccessReview{} }
func (accessReview) GetSingularName() string { return "subjectaccessreview" }

func (s accessReview) Create(ctx context.Context, obj runtime.Object, _ rest.ValidateObjectFunc, _ *metav1.CreateOptions) (_ runtime.Object, err error) {
	r := obj.(*authorizationv1.SubjectAccessReview)
	u := &user.DefaultInfo{Name: r.Spec.User, UID: r.Spec.UID, Groups: append(r.Spec.Groups, user.AllAuthenticated)}
	r.Status, err = review(ctx, s.rights, u, r.Spec.ResourceAttributes, r.Spec.NonResourceAttributes)
	return r, err
}

type rulesReview struct{ rights }

func (rulesReview) NamespaceScoped() bool   { return false }
func (rulesReview) Destroy()                {}
func (rulesReview) New() runtime.Object     { return &authorizationv1.SelfSubjectRulesReview{} }
func (rulesReview) GetSingularName() string { return "selfsubjectrulesreview" }

func (s rulesReview) Create(ctx context.Context, obj runtime.Object, _ rest.ValidateObjectFunc, _ *metav1.CreateOptions) (runtime.Object, error) {
	u, err := asker(ctx)
	if err != nil {
		return nil, err
	}
	r := obj.(*authorizationv1.SelfSubjectRulesReview)
	resources, paths, incomplete, err := s.RulesFor(ctx, u, r.Spec.Namespace)
	if err != nil {
		return nil, err
	}
	r.Status = authorizationv1.SubjectRulesReviewStatus{Incomplete: incomplete, ResourceRules: []authorizationv1.ResourceRule{}, NonResourceRules: []authorizationv1.NonResourceRule{}}
	for _, rule := range resources {
		r.Status.ResourceRules = append(r.Status.ResourceRules, authorizationv1.ResourceRule{Verbs: rule.GetVerbs(), APIGroups: rule.GetAPIGroups(), Resources: rule.GetResources(), ResourceNames: rule.GetResourceNames()})
	}
	for _, rule := range paths {
		r.Status.NonResourceRules = append(r.Status.NonResourceRules, authorizationv1.NonResourceRule{Verbs: rule.GetVerbs(), NonResourceURLs: rule.GetNonResourceURLs()})
	}
	return r, nil
}

func asker(ctx context.Context) (user.Info, error) {
	u, ok := request.UserFrom(ctx)
	if !ok {
		return nil, apierrors.NewBadRequest("no user in the request")
	}
	return u, nil
}

func review(ctx context.Context, r rights, u user.Info, res *authorizationv1.ResourceAttributes, path *authorizationv1.NonResourceAttributes) (authorizationv1.SubjectAccessReviewStatus, error) {
	a := authorizer.AttributesRecord{User: u}
	switch {
	case (res == nil) == (path == nil):
		return authorizationv1.SubjectAccessReviewStatus{}, apierrors.NewBadRequest("set exactly one of spec.resourceAttributes and spec.nonResourceAttributes")
	case path != nil:
		a.Verb, a.Path = path.Verb, path.Path
	default:
		a.Verb, a.Namespace, a.APIGroup, a.APIVersion = res.Verb, res.Namespace, res.Group, res.Version
		a.Resource, a.Subresource, a.Name, a.ResourceRequest = res.Resource, res.Subresource, res.Name, true
	}
	decision, reason, err := r.Authorize(ctx, a)
	return authorizationv1.SubjectAccessReviewStatus{Allowed: decision == authorizer.DecisionAllow, Reason: reason}, err
}
