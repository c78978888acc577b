package kube

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"
)

// Bounds of what one Apply or Remove takes.
const (
	maxManifest  = 4 << 20
	maxDocuments = 1000
)

// owner is the field manager of what people apply through a Store.
const owner = "hauberk"

// Applied says what became of one document.
type Applied struct {
	Kind, Namespace, Name string
	// Result is created, configured, unchanged, deleted or absent.
	Result string
}

// FieldFault is one fault of a document.
type FieldFault struct {
	// Field is the path of the faulty field, such as spec.ports[0].port; empty
	// if the fault is not of one field.
	Field string
	// Message says what is wrong and, where known, the value.
	Message string
}

// DocumentError says why one document of a manifest was refused.
type DocumentError struct {
	// Document counts from 1.
	Document              int
	Kind, Namespace, Name string
	Faults                []FieldFault
	Err                   error
}

func (e *DocumentError) Error() string {
	what := e.Kind
	if e.Name != "" {
		what = strings.TrimPrefix(e.Kind+" "+strings.TrimPrefix(e.Namespace+"/"+e.Name, "/"), " ")
	}
	faults := make([]string, len(e.Faults))
	for i, f := range e.Faults {
		faults[i] = strings.TrimPrefix(f.Field+": "+f.Message, ": ")
	}
	if len(faults) == 0 {
		faults = append(faults, e.Err.Error())
	}
	if what != "" {
		what = " (" + what + ")"
	}
	return fmt.Sprintf("document %d%s: %s", e.Document, what, strings.Join(faults, "; "))
}

func (e *DocumentError) Unwrap() error { return e.Err }

// document is one object of a manifest.
type document struct {
	index int
	obj   *unstructured.Unstructured
	to    dynamic.ResourceInterface
}

func (d *document) fail(err error) error {
	e := &DocumentError{Document: d.index, Err: err}
	if d.obj != nil {
		e.Kind, e.Namespace, e.Name = d.obj.GetKind(), d.obj.GetNamespace(), d.obj.GetName()
	}
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
				out = append(out, FieldFault{strings.TrimPrefix(c.Field, "."), c.Message})
			}
		}
	}
	return out
}

// Apply brings the objects of a YAML manifest, one or more documents, to what
// it says, server-side. It checks every document first: a fault in one leaves
// all of them undone. Namespaces come before what is in them; a document
// without one goes to "default".
func (s *Store) Apply(ctx context.Context, manifest []byte) ([]Applied, error) {
	docs, err := s.read(manifest)
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
func (s *Store) Remove(ctx context.Context, manifest []byte) ([]Applied, error) {
	docs, err := s.read(manifest)
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
func (s *Store) read(manifest []byte) ([]*document, error) {
	docs, err := parseManifest(manifest)
	if err != nil {
		return nil, err
	}
	var errs []error
	seen := map[string]int{}
	for _, d := range docs {
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
		return fmt.Errorf("kind: the API has no %s of %s: hauberk.dev/v1alpha1 has Application, Workload, GuardPolicy, AccessPolicy, ReleasePolicy", gvk.Kind, gvk.GroupVersion())
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

// parseManifest reads YAML documents strictly: no key twice, each one object
// with a kind and a name.
func parseManifest(manifest []byte) ([]*document, error) {
	if len(manifest) > maxManifest {
		return nil, fmt.Errorf("read manifest: %d bytes, at most %d are read: split it", len(manifest), maxManifest)
	}
	reader := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(manifest)))
	var docs []*document
	var errs []error
	for index := 1; ; index++ {
		raw, err := reader.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read manifest: %w", err)
		}
		d := &document{index: index}
		switch empty, err := d.parse(raw); {
		case err != nil:
			errs = append(errs, d.fail(err))
		case !empty:
			docs = append(docs, d)
		}
		if index > maxDocuments {
			return nil, fmt.Errorf("read manifest: more than %d documents: split it", maxDocuments)
		}
	}
	if len(docs)+len(errs) == 0 {
		return nil, errors.New("read manifest: no document in it")
	}
	return docs, errors.Join(errs...)
}

func (d *document) parse(raw []byte) (empty bool, err error) {
	asJSON, err := yaml.YAMLToJSONStrict(raw)
	if err != nil {
		return false, fmt.Errorf("read YAML: %w", err)
	}
	if string(asJSON) == "null" {
		return true, nil
	}
	var fields map[string]any
	if err := utiljson.Unmarshal(asJSON, &fields); err != nil {
		return false, errors.New("read YAML: a document is an object with apiVersion, kind and metadata")
	}
	obj := &unstructured.Unstructured{Object: fields}
	var errs []error
	gv, err := schema.ParseGroupVersion(obj.GetAPIVersion())
	if err != nil || gv.Version == "" {
		errs = append(errs, fmt.Errorf("apiVersion: %q: write group/version, such as hauberk.dev/v1alpha1", obj.GetAPIVersion()))
	}
	if obj.GetKind() == "" {
		errs = append(errs, errors.New("kind: missing"))
	}
	if obj.GetName() == "" {
		errs = append(errs, errors.New("metadata.name: missing"))
	}
	if obj.IsList() {
		errs = append(errs, errors.New("kind: a list is not applied: write its items as documents of their own"))
	}
	d.obj = obj
	return false, errors.Join(errs...)
}
