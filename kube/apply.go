package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"hauberk.dev/kube/manifest"
)

// owner is the field manager of what people apply through a Store.
const owner = "hauberk"

// Applied says what became of one document.
type Applied struct {
	Kind, Namespace, Name string
	// Result is created, configured, unchanged, deleted or absent.
	Result string
}

// Why a document of a manifest was refused.
type (
	DocumentError = manifest.Error
	FieldFault    = manifest.Fault
)

// document is one object of a manifest.
type document struct {
	index int
	obj   *unstructured.Unstructured
	to    dynamic.ResourceInterface
}

func (d *document) fail(err error) error {
	e := manifest.Fail(d.index, d.obj, err)
	e.Faults = faults(err)
	return e
}

// faults reads the fields out of an answer of the API.
func faults(err error) (out []FieldFault) {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return nil
	}
	if details := status.Status().Details; details != nil {
		for _, c := range details.Causes {
			// A cause without a field only says that rules were left out.
			if c.Type != metav1.CauseTypeUnexpectedServerResponse && c.Field != "<nil>" {
				out = append(out, FieldFault{Field: strings.TrimPrefix(c.Field, "."), Message: c.Message})
			}
		}
	}
	return out
}

// Apply brings the objects of a YAML manifest, one or more documents, to what
// it says, server-side. It checks every document first: a fault in one leaves
// all of them undone. Namespaces come before what is in them; a document
// without one goes to "default".
func (s *Store) Apply(ctx context.Context, raw []byte) ([]Applied, error) {
	docs, err := s.read(raw)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(docs, func(a, b *document) int { return rank(a) - rank(b) })
	if err := s.check(ctx, docs); err != nil {
		return nil, err
	}
	var out []Applied
	for _, d := range docs {
		result, err := d.apply(ctx)
		if err != nil {
			return out, d.fail(err)
		}
		out = append(out, Applied{d.obj.GetKind(), d.obj.GetNamespace(), d.obj.GetName(), result})
	}
	return out, nil
}

// rank orders kinds that others need before the others.
func rank(d *document) int {
	switch d.obj.GetKind() {
	case "CustomResourceDefinition":
		return 0
	case "Namespace":
		return 1
	default:
		return 2
	}
}

// check has the server judge every document without storing it.
func (s *Store) check(ctx context.Context, docs []*document) error {
	made := map[string]bool{}
	for _, d := range docs {
		if d.obj.GetKind() == "Namespace" {
			_, err := d.to.Get(ctx, d.obj.GetName(), metav1.GetOptions{})
			made[d.obj.GetName()] = apierrors.IsNotFound(err)
		}
	}
	var errs []error
	for _, d := range docs {
		dry := *d
		if made[d.obj.GetNamespace()] {
			// The namespace is not there yet; any other shows the same faults.
			mapping, err := s.live.RESTMapper().RESTMapping(d.obj.GroupVersionKind().GroupKind(), d.obj.GroupVersionKind().Version)
			if err != nil {
				errs = append(errs, d.fail(err))
				continue
			}
			dry.obj = d.obj.DeepCopy()
			dry.obj.SetNamespace(metav1.NamespaceDefault)
			dry.to = s.anyKind.Resource(mapping.Resource).Namespace(metav1.NamespaceDefault)
		}
		if _, err := dry.patch(ctx, metav1.DryRunAll); err != nil {
			errs = append(errs, d.fail(explain(err, d.obj.GetNamespace())))
		}
	}
	return errors.Join(errs...)
}

// explain adds the way out where the API only says what is wrong.
func explain(err error, namespace string) error {
	var status apierrors.APIStatus
	if apierrors.IsNotFound(err) && errors.As(err, &status) && status.Status().Details != nil && status.Status().Details.Kind == "namespaces" {
		return fmt.Errorf("metadata.namespace: namespace %q does not exist: add a Namespace document or create it first: %w", namespace, err)
	}
	return err
}

func (d *document) patch(ctx context.Context, dryRun ...string) (*unstructured.Unstructured, error) {
	raw, err := json.Marshal(d.obj)
	if err != nil {
		return nil, err
	}
	force := true
	return d.to.Patch(ctx, d.obj.GetName(), types.ApplyPatchType, raw, metav1.PatchOptions{FieldManager: owner, Force: &force, FieldValidation: metav1.FieldValidationStrict, DryRun: dryRun})
}

func (d *document) apply(ctx context.Context) (string, error) {
	before, err := d.to.Get(ctx, d.obj.GetName(), metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return "", err
	}
	created := err != nil
	after, err := d.patch(ctx)
	switch {
	case err != nil:
		return "", err
	case created:
		return "created", nil
	case sameContent(before, after):
		return "unchanged", nil
	default:
		return "configured", nil
	}
}

// sameContent compares what people see of an object; who manages which field
// may change without a change of the object.
func sameContent(a, b *unstructured.Unstructured) bool {
	a, b = a.DeepCopy(), b.DeepCopy()
	for _, o := range []*unstructured.Unstructured{a, b} {
		o.SetManagedFields(nil)
		o.SetResourceVersion("")
	}
	return equality.Semantic.DeepEqual(a, b)
}

// Remove deletes the objects of a manifest, the last first. It does not wait
// until they are gone.
func (s *Store) Remove(ctx context.Context, raw []byte) ([]Applied, error) {
	docs, err := s.read(raw)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(docs, func(a, b *document) int { return rank(a) - rank(b) })
	slices.Reverse(docs)
	background := metav1.DeletePropagationBackground
	var out []Applied
	for _, d := range docs {
		result := "deleted"
		err := d.to.Delete(ctx, d.obj.GetName(), metav1.DeleteOptions{PropagationPolicy: &background})
		if apierrors.IsNotFound(err) {
			result, err = "absent", nil
		}
		if err != nil {
			return out, d.fail(err)
		}
		out = append(out, Applied{d.obj.GetKind(), d.obj.GetNamespace(), d.obj.GetName(), result})
	}
	return out, nil
}

// read splits a manifest and finds where its documents belong.
func (s *Store) read(raw []byte) ([]*document, error) {
	parsed, err := manifest.Parse(raw)
	if err != nil {
		return nil, err
	}
	var errs []error
	var docs []*document
	seen := map[string]int{}
	for _, p := range parsed {
		d := &document{index: p.Index, obj: p.Object}
		docs = append(docs, d)
		if err := s.place(d); err != nil {
			errs = append(errs, d.fail(err))
			continue
		}
		key := d.obj.GroupVersionKind().GroupKind().String() + " " + d.obj.GetNamespace() + "/" + d.obj.GetName()
		if first := seen[key]; first > 0 {
			errs = append(errs, d.fail(fmt.Errorf("metadata.name: %q repeats document %d", d.obj.GetName(), first)))
		}
		seen[key] = d.index
	}
	return docs, errors.Join(errs...)
}

// place finds the collection of a document.
func (s *Store) place(d *document) error {
	gvk := d.obj.GroupVersionKind()
	mapping, err := s.live.RESTMapper().RESTMapping(gvk.GroupKind(), gvk.Version)
	if meta.IsNoMatchError(err) {
		return fmt.Errorf("kind: the API has no %s of %s: hauberk.dev/v1alpha1 has Application, Workload, GuardPolicy, ClusterGuardPolicy, AccessPolicy, ReleasePolicy", gvk.Kind, gvk.GroupVersion())
	}
	if err != nil {
		return err
	}
	collection := s.anyKind.Resource(mapping.Resource)
	switch cluster := mapping.Scope.Name() == meta.RESTScopeNameRoot; {
	case cluster && d.obj.GetNamespace() != "":
		return fmt.Errorf("metadata.namespace: %q: a %s is in no namespace: remove the field", d.obj.GetNamespace(), gvk.Kind)
	case cluster:
		d.to = collection
		return nil
	case d.obj.GetNamespace() == "":
		d.obj.SetNamespace(metav1.NamespaceDefault)
	}
	d.to = collection.Namespace(d.obj.GetNamespace())
	return nil
}
