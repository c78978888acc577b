package kube

import (
	"context"
	"fmt"
	"reflect"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/registry/generic"
	"k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/names"
)

// resource is how one built-in kind is stored and served.
type resource struct {
	object, list     runtime.Object
	group            string
	plural, singular string
	short            []string
	cluster          bool // not in a namespace
	name             validation.ValidateNameFunc
	// prepare brings an object into its stored form; old is nil at creation.
	prepare func(obj, old runtime.Object)
	// check says what is wrong with it; old is nil at creation.
	check      func(obj, old runtime.Object) field.ErrorList
	table      table
	attributes storage.AttrFunc
	seconds    uint64 // it expires after; 0 keeps it
}

// resources of the built-in kinds, except those that store nothing.
func resources() []resource {
	admission := func(obj, list runtime.Object, plural, singular string, check func(obj, old runtime.Object) field.ErrorList) resource {
		return resource{object: obj, list: list, group: admissionv1.GroupName, plural: plural, singular: singular, cluster: true, prepare: prepareGeneration, check: check}
	}
	return []resource{
		{object: &corev1.Namespace{}, list: &corev1.NamespaceList{}, plural: "namespaces", singular: "namespace", short: []string{"ns"}, cluster: true, name: validation.ValidateNamespaceName, prepare: prepareNamespace, table: namespaceTable, attributes: namespaceAttributes},
		{object: &corev1.ConfigMap{}, list: &corev1.ConfigMapList{}, plural: "configmaps", singular: "configmap", short: []string{"cm"}, check: checkConfigMap, table: configMapTable},
		{object: &corev1.Secret{}, list: &corev1.SecretList{}, plural: "secrets", singular: "secret", prepare: prepareSecret, check: checkSecret, table: secretTable, attributes: secretAttributes},
		{object: &corev1.ServiceAccount{}, list: &corev1.ServiceAccountList{}, plural: "serviceaccounts", singular: "serviceaccount", short: []string{"sa"}, name: validation.ValidateServiceAccountName},
		{object: &corev1.Event{}, list: &corev1.EventList{}, plural: "events", singular: "event", short: []string{"ev"}, table: eventTable, attributes: eventAttributes, seconds: eventSeconds},
		{object: &coordinationv1.Lease{}, list: &coordinationv1.LeaseList{}, group: coordinationv1.GroupName, plural: "leases", singular: "lease", check: checkLease, table: leaseTable},
		admission(&admissionv1.ValidatingWebhookConfiguration{}, &admissionv1.ValidatingWebhookConfigurationList{}, "validatingwebhookconfigurations", "validatingwebhookconfiguration", checkValidatingWebhooks),
		admission(&admissionv1.MutatingWebhookConfiguration{}, &admissionv1.MutatingWebhookConfigurationList{}, "mutatingwebhookconfigurations", "mutatingwebhookconfiguration", checkMutatingWebhooks),
		admission(&admissionv1.ValidatingAdmissionPolicy{}, &admissionv1.ValidatingAdmissionPolicyList{}, "validatingadmissionpolicies", "validatingadmissionpolicy", checkValidatingPolicy),
		admission(&admissionv1.ValidatingAdmissionPolicyBinding{}, &admissionv1.ValidatingAdmissionPolicyBindingList{}, "validatingadmissionpolicybindings", "validatingadmissionpolicybinding", checkValidatingBinding),
		admission(&admissionv1.MutatingAdmissionPolicy{}, &admissionv1.MutatingAdmissionPolicyList{}, "mutatingadmissionpolicies", "mutatingadmissionpolicy", checkMutatingPolicy),
		admission(&admissionv1.MutatingAdmissionPolicyBinding{}, &admissionv1.MutatingAdmissionPolicyBindingList{}, "mutatingadmissionpolicybindings", "mutatingadmissionpolicybinding", checkMutatingBinding),
	}
}

// storages opens the storage of every built-in kind, by version served.
func (b *builtin) storages(getter generic.RESTOptionsGetter, who rights) (map[schema.GroupVersion]map[string]rest.Storage, error) {
	out := map[schema.GroupVersion]map[string]rest.Storage{}
	for _, r := range resources() {
		store, err := b.store(r, getter)
		if err != nil {
			return nil, fmt.Errorf("open storage of %s: %w", r.plural, err)
		}
		gv := schema.GroupVersion{Group: r.group, Version: "v1"}
		if out[gv] == nil {
			out[gv] = map[string]rest.Storage{}
		}
		if r.plural == "namespaces" {
			addNamespaces(out[gv], store, r.short)
			continue
		}
		out[gv][r.plural] = stored{store, r.short}
		if r.plural == "events" {
			out[eventsv1.SchemeGroupVersion] = map[string]rest.Storage{"events": stored{store, r.short}}
		}
	}
	out[authenticationv1.SchemeGroupVersion] = map[string]rest.Storage{"selfsubjectreviews": selfReview{}}
	out[authorizationv1.SchemeGroupVersion] = map[string]rest.Storage{
		"selfsubjectaccessreviews": selfAccessReview{who}, "subjectaccessreviews": accessReview{who}, "selfsubjectrulesreviews": rulesReview{who},
	}
	return out, nil
}

// stored is a store with short names.
type stored struct {
	*registry.Store
	short []string
}

// ShortNames implements rest.ShortNamesProvider.
func (s stored) ShortNames() []string { return s.short }

func (b *builtin) store(r resource, getter generic.RESTOptionsGetter) (*registry.Store, error) {
	if r.name == nil {
		r.name = validation.NameIsDNSSubdomain
	}
	how := strategy{ObjectTyper: b.scheme, NameGenerator: names.SimpleNameGenerator, resource: r}
	qualified := schema.GroupResource{Group: r.group, Resource: r.plural}
	s := &registry.Store{
		NewFunc:                   maker(r.object),
		NewListFunc:               maker(r.list),
		DefaultQualifiedResource:  qualified,
		SingularQualifiedResource: schema.GroupResource{Group: r.group, Resource: r.singular},
		CreateStrategy:            how,
		UpdateStrategy:            how,
		DeleteStrategy:            how,
		TableConvertor:            r.table,
	}
	if r.table == nil {
		s.TableConvertor = nameTable
	}
	if r.seconds > 0 {
		s.TTLFunc = func(runtime.Object, uint64, bool) (uint64, error) { return r.seconds, nil }
	}
	return s, s.CompleteWithOptions(&generic.StoreOptions{RESTOptions: getter, AttrFunc: r.attributes})
}

// maker makes empty objects of a kind.
func maker(of runtime.Object) func() runtime.Object {
	t := reflect.TypeOf(of).Elem()
	return func() runtime.Object { return reflect.New(t).Interface().(runtime.Object) }
}

// strategy is what happens to an object before it is stored.
type strategy struct {
	runtime.ObjectTyper
	names.NameGenerator
	resource
}

func (s strategy) NamespaceScoped() bool                                   { return !s.cluster }
func (strategy) AllowCreateOnUpdate(context.Context) bool                  { return false }
func (strategy) AllowUnconditionalUpdate(context.Context) bool             { return true }
func (strategy) Canonicalize(runtime.Object)                               {}
func (strategy) WarningsOnCreate(context.Context, runtime.Object) []string { return nil }
func (strategy) WarningsOnUpdate(context.Context, runtime.Object, runtime.Object) []string {
	return nil
}

func (s strategy) PrepareForCreate(_ context.Context, obj runtime.Object) {
	if s.prepare != nil {
		s.prepare(obj, nil)
	}
}

func (s strategy) PrepareForUpdate(_ context.Context, obj, old runtime.Object) {
	if s.prepare != nil {
		s.prepare(obj, old)
	}
}

func (s strategy) Validate(_ context.Context, obj runtime.Object) field.ErrorList {
	m, err := meta.Accessor(obj)
	if err != nil {
		return field.ErrorList{field.InternalError(nil, err)}
	}
	errs := validation.ValidateObjectMetaAccessor(m, !s.cluster, s.name, field.NewPath("metadata"))
	if s.check != nil {
		errs = append(errs, s.check(obj, nil)...)
	}
	return errs
}

func (s strategy) ValidateUpdate(_ context.Context, obj, old runtime.Object) field.ErrorList {
	m, err := meta.Accessor(obj)
	if err != nil {
		return field.ErrorList{field.InternalError(nil, err)}
	}
	was, err := meta.Accessor(old)
	if err != nil {
		return field.ErrorList{field.InternalError(nil, err)}
	}
	errs := validation.ValidateObjectMetaAccessorUpdate(m, was, field.NewPath("metadata"))
	if s.check != nil {
		errs = append(errs, s.check(obj, old)...)
	}
	return errs
}

// prepareGeneration counts changes of anything but the metadata.
func prepareGeneration(obj, old runtime.Object) {
	m, err := meta.Accessor(obj)
	if err != nil {
		return
	}
	if old == nil {
		m.SetGeneration(1)
		return
	}
	was, err := meta.Accessor(old)
	if err != nil {
		return
	}
	m.SetGeneration(was.GetGeneration())
	before, after := old.DeepCopyObject(), obj.DeepCopyObject()
	for _, o := range []runtime.Object{before, after} {
		v := reflect.ValueOf(o).Elem()
		v.FieldByName("ObjectMeta").SetZero()
		v.FieldByName("TypeMeta").SetZero()
	}
	if !equality.Semantic.DeepEqual(before, after) {
		m.SetGeneration(was.GetGeneration() + 1)
	}
}
