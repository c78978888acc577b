package kube

import (
	"errors"
	"fmt"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
)

// builtin is what the server knows of the kinds that are not custom
// resources: how they are called, encoded and defaulted.
type builtin struct {
	scheme *runtime.Scheme
	codecs serializer.CodecFactory
	params runtime.ParameterCodec
}

// builtinVersions are the served versions, the core first.
var builtinVersions = []schema.GroupVersion{
	corev1.SchemeGroupVersion,
	coordinationv1.SchemeGroupVersion,
	eventsv1.SchemeGroupVersion,
	admissionv1.SchemeGroupVersion,
	authenticationv1.SchemeGroupVersion,
	authorizationv1.SchemeGroupVersion,
}

// builtinTypes are the served types of each version. Every type also stands
// for its own internal version, so nothing is ever converted. Events are the
// exception: both versions are one kind, stored as the core's.
var builtinTypes = map[schema.GroupVersion][]runtime.Object{
	corev1.SchemeGroupVersion: {
		&corev1.Namespace{}, &corev1.NamespaceList{},
		&corev1.ConfigMap{}, &corev1.ConfigMapList{},
		&corev1.Secret{}, &corev1.SecretList{},
		&corev1.ServiceAccount{}, &corev1.ServiceAccountList{},
		&corev1.Event{}, &corev1.EventList{},
	},
	coordinationv1.SchemeGroupVersion: {&coordinationv1.Lease{}, &coordinationv1.LeaseList{}},
	admissionv1.SchemeGroupVersion: {
		&admissionv1.ValidatingWebhookConfiguration{}, &admissionv1.ValidatingWebhookConfigurationList{},
		&admissionv1.MutatingWebhookConfiguration{}, &admissionv1.MutatingWebhookConfigurationList{},
		&admissionv1.ValidatingAdmissionPolicy{}, &admissionv1.ValidatingAdmissionPolicyList{},
		&admissionv1.ValidatingAdmissionPolicyBinding{}, &admissionv1.ValidatingAdmissionPolicyBindingList{},
		&admissionv1.MutatingAdmissionPolicy{}, &admissionv1.MutatingAdmissionPolicyList{},
		&admissionv1.MutatingAdmissionPolicyBinding{}, &admissionv1.MutatingAdmissionPolicyBindingList{},
	},
	authenticationv1.SchemeGroupVersion: {&authenticationv1.SelfSubjectReview{}},
	authorizationv1.SchemeGroupVersion: {
		&authorizationv1.SelfSubjectAccessReview{}, &authorizationv1.SubjectAccessReview{},
		&authorizationv1.SelfSubjectRulesReview{},
	},
}

func newBuiltin() (*builtin, error) {
	s := runtime.NewScheme()
	for _, gv := range builtinVersions {
		internal := schema.GroupVersion{Group: gv.Group, Version: runtime.APIVersionInternal}
		s.AddKnownTypes(gv, builtinTypes[gv]...)
		s.AddKnownTypes(internal, builtinTypes[gv]...)
		metav1.AddToGroupVersion(s, gv)
		if err := s.SetVersionPriority(gv); err != nil {
			return nil, err
		}
	}
	s.AddKnownTypes(eventsv1.SchemeGroupVersion, &eventsv1.Event{}, &eventsv1.EventList{})
	s.AddKnownTypes(schema.GroupVersion{Group: eventsv1.GroupName, Version: runtime.APIVersionInternal}, &corev1.Event{}, &corev1.EventList{})
	s.AddUnversionedTypes(corev1.SchemeGroupVersion, &metav1.Status{}, &metav1.APIVersions{}, &metav1.APIGroupList{}, &metav1.APIGroup{}, &metav1.APIResourceList{})
	if err := errors.Join(addEventConversions(s), addFieldLabels(s)); err != nil {
		return nil, fmt.Errorf("assemble built-in kinds: %w", err)
	}
	addDefaults(s)
	return &builtin{scheme: s, codecs: serializer.NewCodecFactory(s), params: runtime.NewParameterCodec(s)}, nil
}

// codec stores every kind as its served version.
func (b *builtin) codec() runtime.Codec { return b.codecs.LegacyCodec(builtinVersions...) }

func addFieldLabels(s *runtime.Scheme) error {
	allow := func(labels ...string) runtime.FieldLabelConversionFunc {
		return func(label, value string) (string, string, error) {
			for _, l := range append(labels, "metadata.name", "metadata.namespace") {
				if l == label {
					return label, value, nil
				}
			}
			return "", "", fmt.Errorf("select by field %q: known are metadata.name, metadata.namespace %v", label, labels)
		}
	}
	return errors.Join(
		s.AddFieldLabelConversionFunc(corev1.SchemeGroupVersion.WithKind("Secret"), allow("type")),
		s.AddFieldLabelConversionFunc(corev1.SchemeGroupVersion.WithKind("Namespace"), allow("status.phase")),
		s.AddFieldLabelConversionFunc(corev1.SchemeGroupVersion.WithKind("Event"), allow(eventLabels...)),
		s.AddFieldLabelConversionFunc(eventsv1.SchemeGroupVersion.WithKind("Event"), convertEventLabel),
	)
}

// addDefaults fills in what a writer of admission configuration left out, with
// the values Kubernetes uses. They live in its main module, which this server
// does not link; without them a webhook that names no selector would silently
// never be called.
func addDefaults(s *runtime.Scheme) {
	s.AddTypeDefaultingFunc(&admissionv1.ValidatingWebhookConfiguration{}, func(o any) {
		c := o.(*admissionv1.ValidatingWebhookConfiguration)
		for i := range c.Webhooks {
			w := &c.Webhooks[i]
			defaultMatch(&w.FailurePolicy, &w.MatchPolicy, &w.NamespaceSelector, &w.ObjectSelector)
			defaultTo(&w.TimeoutSeconds, 10)
			defaultRules(w.Rules)
			defaultService(&w.ClientConfig)
		}
	})
	s.AddTypeDefaultingFunc(&admissionv1.MutatingWebhookConfiguration{}, func(o any) {
		c := o.(*admissionv1.MutatingWebhookConfiguration)
		for i := range c.Webhooks {
			w := &c.Webhooks[i]
			defaultMatch(&w.FailurePolicy, &w.MatchPolicy, &w.NamespaceSelector, &w.ObjectSelector)
			defaultTo(&w.TimeoutSeconds, 10)
			defaultTo(&w.ReinvocationPolicy, admissionv1.NeverReinvocationPolicy)
			defaultRules(w.Rules)
			defaultService(&w.ClientConfig)
		}
	})
	s.AddTypeDefaultingFunc(&admissionv1.ValidatingAdmissionPolicy{}, func(o any) {
		p := o.(*admissionv1.ValidatingAdmissionPolicy)
		defaultTo(&p.Spec.FailurePolicy, admissionv1.Fail)
		defaultResources(p.Spec.MatchConstraints)
	})
	s.AddTypeDefaultingFunc(&admissionv1.MutatingAdmissionPolicy{}, func(o any) {
		p := o.(*admissionv1.MutatingAdmissionPolicy)
		defaultTo(&p.Spec.FailurePolicy, admissionv1.Fail)
		if p.Spec.ReinvocationPolicy == "" {
			p.Spec.ReinvocationPolicy = admissionv1.NeverReinvocationPolicy
		}
		defaultResources(p.Spec.MatchConstraints)
	})
	s.AddTypeDefaultingFunc(&admissionv1.ValidatingAdmissionPolicyBinding{}, func(o any) {
		b := o.(*admissionv1.ValidatingAdmissionPolicyBinding)
		defaultResources(b.Spec.MatchResources)
		defaultParam(b.Spec.ParamRef)
	})
	s.AddTypeDefaultingFunc(&admissionv1.MutatingAdmissionPolicyBinding{}, func(o any) {
		b := o.(*admissionv1.MutatingAdmissionPolicyBinding)
		defaultResources(b.Spec.MatchResources)
		defaultParam(b.Spec.ParamRef)
	})
	s.AddTypeDefaultingFunc(&corev1.Namespace{}, func(o any) {
		n := o.(*corev1.Namespace)
		if n.Name == "" {
			return
		}
		if n.Labels == nil {
			n.Labels = map[string]string{}
		}
		n.Labels[corev1.LabelMetadataName] = n.Name
	})
	s.AddTypeDefaultingFunc(&corev1.Secret{}, func(o any) {
		if sec := o.(*corev1.Secret); sec.Type == "" {
			sec.Type = corev1.SecretTypeOpaque
		}
	})
}

func defaultTo[T any](field **T, value T) {
	if *field == nil {
		*field = &value
	}
}

func defaultMatch(failure **admissionv1.FailurePolicyType, match **admissionv1.MatchPolicyType, namespaces, objects **metav1.LabelSelector) {
	defaultTo(failure, admissionv1.Fail)
	defaultTo(match, admissionv1.Equivalent)
	defaultTo(namespaces, metav1.LabelSelector{})
	defaultTo(objects, metav1.LabelSelector{})
}

func defaultRules(rules []admissionv1.RuleWithOperations) {
	for i := range rules {
		defaultTo(&rules[i].Scope, admissionv1.AllScopes)
	}
}

func defaultService(c *admissionv1.WebhookClientConfig) {
	if c.Service != nil {
		defaultTo(&c.Service.Port, 443)
	}
}

func defaultResources(m *admissionv1.MatchResources) {
	if m == nil {
		return
	}
	defaultTo(&m.MatchPolicy, admissionv1.Equivalent)
	defaultTo(&m.NamespaceSelector, metav1.LabelSelector{})
	defaultTo(&m.ObjectSelector, metav1.LabelSelector{})
	for _, rules := range [][]admissionv1.NamedRuleWithOperations{m.ResourceRules, m.ExcludeResourceRules} {
		for i := range rules {
			defaultTo(&rules[i].Scope, admissionv1.AllScopes)
		}
	}
}

func defaultParam(p *admissionv1.ParamRef) {
	if p != nil {
		defaultTo(&p.ParameterNotFoundAction, admissionv1.DenyAction)
	}
}
