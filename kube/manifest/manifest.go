// Package manifest reads the YAML that people write into objects of an API.
//
// It is strict and bounded and knows no server: whether a kind exists and its
// fields make sense is for the API to say.
package manifest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Bounds of what one manifest holds.
const (
	maxManifest  = 4 << 20
	maxDocuments = 1000
)

// Document is one object of a manifest.
type Document struct {
	// Index counts the documents from 1, empty ones too.
	Index  int
	Object *unstructured.Unstructured
}

// Fault is one fault of a document.
type Fault struct {
	// Field is the path of the faulty field, such as spec.ports[0].port; empty
	// if the fault is not of one field.
	Field string
	// Message says what is wrong and, where known, the value.
	Message string
}

// Error says why one document of a manifest was refused.
type Error struct {
	// Document counts from 1.
	Document              int
	Kind, Namespace, Name string
	Faults                []Fault
	Err                   error
}

func (e *Error) Error() string {
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

func (e *Error) Unwrap() error { return e.Err }

// Fail says that the document at an index, of which obj may be known, is
// refused.
func Fail(index int, obj *unstructured.Unstructured, err error) *Error {
	e := &Error{Document: index, Err: err}
	if obj != nil {
		e.Kind, e.Namespace, e.Name = obj.GetKind(), obj.GetNamespace(), obj.GetName()
	}
	return e
}

// Parse reads YAML documents strictly: no key twice, each one object
// with a kind and a name.
func Parse(raw []byte) ([]Document, error) {
	if len(raw) > maxManifest {
		return nil, fmt.Errorf("read manifest: %d bytes, at most %d are read: split it", len(raw), maxManifest)
	}
	reader := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(raw)))
	var docs []Document
	var errs []error
	for index := 1; ; index++ {
		text, err := reader.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read manifest: %w", err)
		}
		switch obj, err := parse(text); {
		case err != nil:
			errs = append(errs, Fail(index, obj, err))
		case obj != nil:
			docs = append(docs, Document{index, obj})
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

// parse reads one document; an empty one is nil.
func parse(raw []byte) (*unstructured.Unstructured, error) {
	asJSON, err := yaml.YAMLToJSONStrict(raw)
	if err != nil {
		return nil, fmt.Errorf("read YAML: %w", err)
	}
	if string(asJSON) == "null" {
		return nil, nil
	}
	var fields map[string]any
	if err := utiljson.Unmarshal(asJSON, &fields); err != nil {
		return nil, errors.New("read YAML: a document is an object with apiVersion, kind and metadata")
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
	return obj, errors.Join(errs...)
}
