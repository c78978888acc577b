package deploy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"

	"go.yaml.in/yaml/v3"

	"hauberk.dev/api/spec"
)

// document is one YAML document, with what deploying needs to know of it. The
// rest passes through unread: judging it is the API's business.
type document struct {
	node     yaml.Node
	Kind     string `yaml:"kind"`
	Metadata struct {
		Name      string `yaml:"name"`
		Namespace string `yaml:"namespace"`
	} `yaml:"metadata"`
	Spec struct {
		Accounts []account `yaml:"accounts"`
		Ports    []struct {
			Port     int    `yaml:"port"`
			Protocol string `yaml:"protocol"`
			Publish  int    `yaml:"publish"`
		} `yaml:"ports"`
		Replicas *int `yaml:"replicas"`
	} `yaml:"spec"`
}

type account struct {
	Name  string      `yaml:"name"`
	Roles []spec.Role `yaml:"roles"`
}

// documents splits YAML.
func documents(raw []byte) (docs []*document, err error) {
	d := yaml.NewDecoder(bytes.NewReader(raw))
	for {
		doc := new(document)
		err := d.Decode(&doc.node)
		if errors.Is(err, io.EOF) {
			return docs, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read YAML: %w", err)
		}
		if len(doc.node.Content) == 0 || doc.node.Content[0].Tag == "!!null" {
			continue
		}
		if err := doc.node.Decode(doc); err != nil {
			return nil, fmt.Errorf("read YAML, line %d: %w", doc.node.Line, err)
		}
		docs = append(docs, doc)
	}
}

// encode joins documents that pass.
func encode(docs []*document, pass func(*document) bool) ([]byte, error) {
	var b bytes.Buffer
	for _, d := range docs {
		if !pass(d) {
			continue
		}
		b.WriteString("---\n")
		e := yaml.NewEncoder(&b)
		if err := e.Encode(&d.node); err != nil {
			return nil, fmt.Errorf("write %s %s: %w", d.Kind, d.Metadata.Name, err)
		}
		if err := e.Close(); err != nil {
			return nil, fmt.Errorf("write %s %s: %w", d.Kind, d.Metadata.Name, err)
		}
	}
	return b.Bytes(), nil
}

// placeholder is a name to be replaced, such as ${WEB_PORT}.
var placeholder = regexp.MustCompile(`\$\{([A-Za-z0-9_]+)\}`)

// substitute replaces placeholders before the text is read as YAML. It names
// all faults at once.
func substitute(text string, setting func(name string) (string, error)) (string, error) {
	var errs []error
	out := placeholder.ReplaceAllStringFunc(text, func(found string) string {
		v, err := setting(placeholder.FindStringSubmatch(found)[1])
		if err != nil {
			errs = append(errs, err)
		}
		return v
	})
	return out, errors.Join(errs...)
}

// holder finds an account of an application by its role.
func holder(docs []*document, namespace, application string, role spec.Role, not string) (string, error) {
	for _, d := range docs {
		if d.Kind != "Application" || d.Metadata.Name != application || d.Metadata.Namespace != namespace {
			continue
		}
		for _, a := range d.Spec.Accounts {
			if slices.Contains(a.Roles, role) && a.Name != not {
				return a.Name, nil
			}
		}
		return "", fmt.Errorf("application %s/%s has no %s but %q", namespace, application, role, not)
	}
	return "", fmt.Errorf("application %s/%s is not in the YAML", namespace, application)
}
