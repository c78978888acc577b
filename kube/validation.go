package kube

import (
	"fmt"
	"slices"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metavalidation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/util/webhook"
)

// dataLimit is how much one ConfigMap or Secret holds.
const dataLimit = 1 << 20

func checkData[A, B any](path *field.Path, text map[string]A, binary map[string]B, size int) (errs field.ErrorList) {
	for key := range text {
		for _, msg := range validation.IsConfigMapKey(key) {
			errs = append(errs, field.Invalid(path.Key(key), key, msg))
		}
	}
	for key := range binary {
		for _, msg := range validation.IsConfigMapKey(key) {
			errs = append(errs, field.Invalid(path.Key(key), key, msg))
		}
		if _, both := text[key]; both {
			errs = append(errs, field.Duplicate(path.Key(key), key))
		}
	}
	if size > dataLimit {
		errs = append(errs, field.TooLong(path, "", dataLimit))
	}
	return errs
}

func checkConfigMap(obj, old runtime.Object) field.ErrorList {
	c, size := obj.(*corev1.ConfigMap), 0
	for _, v := range c.Data {
		size += len(v)
	}
	for _, v := range c.BinaryData {
		size += len(v)
	}
	errs := checkData(field.NewPath("data"), c.Data, c.BinaryData, size)
	if was, ok := old.(*corev1.ConfigMap); ok && was.Immutable != nil && *was.Immutable {
		errs = append(errs, unchanged(field.NewPath("immutable"), c.Immutable, was.Immutable)...)
		errs = append(errs, unchanged(field.NewPath("data"), c.Data, was.Data)...)
		errs = append(errs, unchanged(field.NewPath("binaryData"), c.BinaryData, was.BinaryData)...)
	}
	return errs
}

// prepareSecret folds the text that people write into the data that is kept.
func prepareSecret(obj, _ runtime.Object) {
	s := obj.(*corev1.Secret)
	if len(s.StringData) > 0 && s.Data == nil {
		s.Data = map[string][]byte{}
	}
	for k, v := range s.StringData {
		s.Data[k] = []byte(v)
	}
	s.StringData = nil
}

func checkSecret(obj, old runtime.Object) field.ErrorList {
	s, size := obj.(*corev1.Secret), 0
	for _, v := range s.Data {
		size += len(v)
	}
	errs := checkData[[]byte, string](field.NewPath("data"), s.Data, nil, size)
	was, ok := old.(*corev1.Secret)
	if !ok {
		return errs
	}
	errs = append(errs, unchanged(field.NewPath("type"), s.Type, was.Type)...)
	if was.Immutable != nil && *was.Immutable {
		errs = append(errs, unchanged(field.NewPath("immutable"), s.Immutable, was.Immutable)...)
		errs = append(errs, unchanged(field.NewPath("data"), s.Data, was.Data)...)
	}
	return errs
}

func secretAttributes(obj runtime.Object) (labels.Set, fields.Set, error) {
	l, f, err := storage.DefaultNamespaceScopedAttr(obj)
	if s, ok := obj.(*corev1.Secret); ok && err == nil {
		f["type"] = string(s.Type)
	}
	return l, f, err
}

func unchanged(path *field.Path, now, was any) field.ErrorList {
	if equality.Semantic.DeepEqual(now, was) {
		return nil
	}
	return field.ErrorList{field.Forbidden(path, "cannot be changed: delete the object and create it anew")}
}

func checkLease(obj, _ runtime.Object) (errs field.ErrorList) {
	spec, path := obj.(*coordinationv1.Lease).Spec, field.NewPath("spec")
	if s := spec.LeaseDurationSeconds; s != nil && *s <= 0 {
		errs = append(errs, field.Invalid(path.Child("leaseDurationSeconds"), *s, "must be greater than 0"))
	}
	if n := spec.LeaseTransitions; n != nil && *n < 0 {
		errs = append(errs, field.Invalid(path.Child("leaseTransitions"), *n, "must not be negative"))
	}
	return errs
}

// hook is what validating and mutating webhooks have in common.
type hook struct {
	name        string
	client      admissionv1.WebhookClientConfig
	rules       []admissionv1.RuleWithOperations
	failure     *admissionv1.FailurePolicyType
	match       *admissionv1.MatchPolicyType
	namespaces  *metav1.LabelSelector
	objects     *metav1.LabelSelector
	sideEffects *admissionv1.SideEffectClass
	seconds     *int32
	versions    []string
}

func checkValidatingWebhooks(obj, _ runtime.Object) (errs field.ErrorList) {
	var hooks []hook
	for _, w := range obj.(*admissionv1.ValidatingWebhookConfiguration).Webhooks {
		hooks = append(hooks, hook{w.Name, w.ClientConfig, w.Rules, w.FailurePolicy, w.MatchPolicy, w.NamespaceSelector, w.ObjectSelector, w.SideEffects, w.TimeoutSeconds, w.AdmissionReviewVersions})
	}
	return checkHooks(hooks)
}

func checkMutatingWebhooks(obj, _ runtime.Object) (errs field.ErrorList) {
	var hooks []hook
	for i, w := range obj.(*admissionv1.MutatingWebhookConfiguration).Webhooks {
		hooks = append(hooks, hook{w.Name, w.ClientConfig, w.Rules, w.FailurePolicy, w.MatchPolicy, w.NamespaceSelector, w.ObjectSelector, w.SideEffects, w.TimeoutSeconds, w.AdmissionReviewVersions})
		errs = append(errs, oneOf(field.NewPath("webhooks").Index(i).Child("reinvocationPolicy"), w.ReinvocationPolicy, admissionv1.NeverReinvocationPolicy, admissionv1.IfNeededReinvocationPolicy)...)
	}
	return append(checkHooks(hooks), errs...)
}

func checkHooks(hooks []hook) (errs field.ErrorList) {
	seen := map[string]bool{}
	for i, h := range hooks {
		path := field.NewPath("webhooks").Index(i)
		errs = append(errs, validation.IsFullyQualifiedName(path.Child("name"), h.name)...)
		if seen[h.name] {
			errs = append(errs, field.Duplicate(path.Child("name"), h.name))
		}
		seen[h.name] = true
		errs = append(errs, h.check(path)...)
	}
	return errs
}

func (h hook) check(path *field.Path) (errs field.ErrorList) {
	switch client := path.Child("clientConfig"); {
	case h.client.Service != nil:
		errs = append(errs, field.Forbidden(client.Child("service"), "this server has no services: give a url"))
	case h.client.URL == nil:
		errs = append(errs, field.Required(client.Child("url"), "where to ask"))
	default:
		errs = append(errs, webhook.ValidateWebhookURL(client.Child("url"), *h.client.URL, true)...)
	}
	if len(h.client.CABundle) > 0 {
		errs = append(errs, webhook.ValidateCABundle(path.Child("clientConfig", "caBundle"), h.client.CABundle)...)
	}
	if !slices.Contains(h.versions, "v1") {
		errs = append(errs, field.Invalid(path.Child("admissionReviewVersions"), h.versions, "must include v1"))
	}
	if s := h.seconds; s != nil && (*s < 1 || *s > 30) {
		errs = append(errs, field.Invalid(path.Child("timeoutSeconds"), *s, "must be between 1 and 30"))
	}
	errs = append(errs, oneOf(path.Child("sideEffects"), h.sideEffects, admissionv1.SideEffectClassNone, admissionv1.SideEffectClassNoneOnDryRun)...)
	errs = append(errs, oneOf(path.Child("failurePolicy"), h.failure, admissionv1.Fail, admissionv1.Ignore)...)
	errs = append(errs, oneOf(path.Child("matchPolicy"), h.match, admissionv1.Exact, admissionv1.Equivalent)...)
	errs = append(errs, checkSelectors(path, h.namespaces, h.objects)...)
	for i, r := range h.rules {
		errs = append(errs, checkRule(path.Child("rules").Index(i), r)...)
	}
	return errs
}

func checkSelectors(path *field.Path, namespaces, objects *metav1.LabelSelector) field.ErrorList {
	strict := metavalidation.LabelSelectorValidationOptions{}
	return append(metavalidation.ValidateLabelSelector(namespaces, strict, path.Child("namespaceSelector")),
		metavalidation.ValidateLabelSelector(objects, strict, path.Child("objectSelector"))...)
}

func checkRule(path *field.Path, r admissionv1.RuleWithOperations) (errs field.ErrorList) {
	for _, list := range []struct {
		name  string
		count int
	}{{"operations", len(r.Operations)}, {"apiGroups", len(r.APIGroups)}, {"apiVersions", len(r.APIVersions)}, {"resources", len(r.Resources)}} {
		if list.count == 0 {
			errs = append(errs, field.Required(path.Child(list.name), "an empty list matches nothing"))
		}
	}
	for i, o := range r.Operations {
		errs = append(errs, oneOf(path.Child("operations").Index(i), &o, admissionv1.OperationAll, admissionv1.Create, admissionv1.Update, admissionv1.Delete, admissionv1.Connect)...)
	}
	return append(errs, oneOf(path.Child("scope"), r.Scope, admissionv1.AllScopes, admissionv1.ClusterScope, admissionv1.NamespacedScope)...)
}

func checkMatch(path *field.Path, m *admissionv1.MatchResources, required bool) (errs field.ErrorList) {
	if m == nil {
		if required {
			errs = append(errs, field.Required(path, "what the policy is about"))
		}
		return errs
	}
	if required && len(m.ResourceRules) == 0 {
		errs = append(errs, field.Required(path.Child("resourceRules"), "a policy without rules is about nothing"))
	}
	for i, r := range m.ResourceRules {
		errs = append(errs, checkRule(path.Child("resourceRules").Index(i), r.RuleWithOperations)...)
	}
	for i, r := range m.ExcludeResourceRules {
		errs = append(errs, checkRule(path.Child("excludeResourceRules").Index(i), r.RuleWithOperations)...)
	}
	errs = append(errs, oneOf(path.Child("matchPolicy"), m.MatchPolicy, admissionv1.Exact, admissionv1.Equivalent)...)
	return append(errs, checkSelectors(path, m.NamespaceSelector, m.ObjectSelector)...)
}

func checkValidatingPolicy(obj, _ runtime.Object) field.ErrorList {
	spec, path := obj.(*admissionv1.ValidatingAdmissionPolicy).Spec, field.NewPath("spec")
	errs := checkMatch(path.Child("matchConstraints"), spec.MatchConstraints, true)
	errs = append(errs, oneOf(path.Child("failurePolicy"), spec.FailurePolicy, admissionv1.Fail, admissionv1.Ignore)...)
	if len(spec.Validations)+len(spec.AuditAnnotations) == 0 {
		errs = append(errs, field.Required(path.Child("validations"), "a policy without validations refuses nothing"))
	}
	for i, v := range spec.Validations {
		if v.Expression == "" {
			errs = append(errs, field.Required(path.Child("validations").Index(i).Child("expression"), "what must be true"))
		}
	}
	return errs
}

func checkMutatingPolicy(obj, _ runtime.Object) field.ErrorList {
	spec, path := obj.(*admissionv1.MutatingAdmissionPolicy).Spec, field.NewPath("spec")
	errs := checkMatch(path.Child("matchConstraints"), spec.MatchConstraints, true)
	errs = append(errs, oneOf(path.Child("failurePolicy"), spec.FailurePolicy, admissionv1.Fail, admissionv1.Ignore)...)
	errs = append(errs, oneOf(path.Child("reinvocationPolicy"), &spec.ReinvocationPolicy, admissionv1.NeverReinvocationPolicy, admissionv1.IfNeededReinvocationPolicy)...)
	if len(spec.Mutations) == 0 {
		errs = append(errs, field.Required(path.Child("mutations"), "a policy without mutations changes nothing"))
	}
	for i, m := range spec.Mutations {
		at := path.Child("mutations").Index(i)
		errs = append(errs, oneOf(at.Child("patchType"), &m.PatchType, admissionv1.PatchTypeApplyConfiguration, admissionv1.PatchTypeJSONPatch)...)
		if (m.PatchType == admissionv1.PatchTypeApplyConfiguration) != (m.ApplyConfiguration != nil) || (m.PatchType == admissionv1.PatchTypeJSONPatch) != (m.JSONPatch != nil) {
			errs = append(errs, field.Invalid(at, m.PatchType, "set the patch of this type and no other"))
		}
	}
	return errs
}

func checkBinding(policy string, match *admissionv1.MatchResources, param *admissionv1.ParamRef) field.ErrorList {
	path := field.NewPath("spec")
	errs := checkMatch(path.Child("matchResources"), match, false)
	if policy == "" {
		errs = append(errs, field.Required(path.Child("policyName"), "which policy is bound"))
	}
	if param != nil {
		if (param.Name == "") == (param.Selector == nil) {
			errs = append(errs, field.Invalid(path.Child("paramRef"), param.Name, "set exactly one of name and selector"))
		}
		errs = append(errs, oneOf(path.Child("paramRef", "parameterNotFoundAction"), param.ParameterNotFoundAction, admissionv1.AllowAction, admissionv1.DenyAction)...)
	}
	return errs
}

func checkValidatingBinding(obj, _ runtime.Object) field.ErrorList {
	spec, path := obj.(*admissionv1.ValidatingAdmissionPolicyBinding).Spec, field.NewPath("spec", "validationActions")
	errs := checkBinding(spec.PolicyName, spec.MatchResources, spec.ParamRef)
	if len(spec.ValidationActions) == 0 {
		errs = append(errs, field.Required(path, "a binding without actions refuses nothing"))
	}
	seen := map[admissionv1.ValidationAction]bool{}
	for i, a := range spec.ValidationActions {
		errs = append(errs, oneOf(path.Index(i), &a, admissionv1.Deny, admissionv1.Warn, admissionv1.Audit)...)
		if seen[a] {
			errs = append(errs, field.Duplicate(path.Index(i), a))
		}
		seen[a] = true
	}
	if seen[admissionv1.Deny] && seen[admissionv1.Warn] {
		errs = append(errs, field.Invalid(path, spec.ValidationActions, "Deny and Warn together would say everything twice"))
	}
	return errs
}

func checkMutatingBinding(obj, _ runtime.Object) field.ErrorList {
	spec := obj.(*admissionv1.MutatingAdmissionPolicyBinding).Spec
	return checkBinding(spec.PolicyName, spec.MatchResources, spec.ParamRef)
}

// oneOf refuses a value that is absent or not among the known ones.
func oneOf[T ~string](path *field.Path, value *T, known ...T) field.ErrorList {
	switch {
	case value == nil:
		return field.ErrorList{field.Required(path, fmt.Sprintf("one of %v", known))}
	case !slices.Contains(known, *value):
		return field.ErrorList{field.NotSupported(path, *value, known)}
	default:
		return nil
	}
}
