package command

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"go.yaml.in/yaml/v3"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/guard"
)

func policyNames() (out []string) {
	for _, r := range guard.Ready() {
		out = append(out, r.Name)
	}
	return out
}

const maxPolicyFile = 1 << 20

// readPolicies gives the policies of names and files. Several intersect. Who
// asks for destinations by flags means those, which are enforced outside the
// guest, so that the ready policies have no list of them then.
func readPolicies(names []string, egress bool) (out []node.NamedGuardPolicy, err error) {
	for _, name := range names {
		if r, ok := guard.FindReady(name); ok {
			if egress {
				r.Spec.Net = withoutEgress(r.Spec.Net)
			}
			out = append(out, node.NamedGuardPolicy{Name: name, Spec: r.Spec})
			continue
		}
		raw, err := readBounded(name)
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("--policy %q: no such policy, and no such file; ready are %s", name, strings.Join(policyNames(), ", "))
		}
		if err != nil {
			return nil, fmt.Errorf("--policy: %w", err)
		}
		list, err := parsePolicies(raw)
		if err != nil {
			return nil, fmt.Errorf("--policy %s: %w", name, err)
		}
		out = append(out, list...)
	}
	return out, nil
}

func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxPolicyFile+1))
	if err == nil && len(raw) > maxPolicyFile {
		err = fmt.Errorf("%s: more than %d bytes", name, maxPolicyFile)
	}
	return raw, err
}

// withoutEgress takes the list of destinations away, and nothing else.
func withoutEgress(n *spec.GuardNet) *spec.GuardNet {
	if n == nil || n.Ingress == nil && n.DNS == nil {
		return nil
	}
	rest := *n
	rest.Egress = nil
	return &rest
}

// policyDocument is a policy as it stands in a file.
type policyDocument struct {
	file      string
	namespace string
	name      string
	floor     bool // a ClusterGuardPolicy
	spec      spec.ClusterGuardPolicy
	node      *yaml.Node // of the whole document
}

func (d *policyDocument) named() node.NamedGuardPolicy {
	return node.NamedGuardPolicy{Name: d.name, Spec: d.spec.GuardPolicy}
}

// parsePolicies reads GuardPolicy documents as kubectl takes them.
func parsePolicies(raw []byte) (out []node.NamedGuardPolicy, err error) {
	docs, err := parseDocuments("", raw)
	if err != nil {
		return nil, err
	}
	for _, d := range docs {
		if d.floor {
			return nil, fmt.Errorf("kind %q: want GuardPolicy: a floor is the control plane's to hold", "ClusterGuardPolicy")
		}
		out = append(out, d.named())
	}
	return out, nil
}

// parseDocuments reads GuardPolicy and ClusterGuardPolicy documents. Every field
// must be known: what is not understood is not enforced.
func parseDocuments(file string, raw []byte) (out []policyDocument, err error) {
	d := yaml.NewDecoder(bytes.NewReader(raw))
	for n := 1; ; n++ {
		var at yaml.Node
		if err := d.Decode(&at); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		var v any
		if err := at.Decode(&v); err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		if v == nil {
			continue
		}
		doc, err := parseDocument(v, &at)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		doc.file, doc.node = file, &at
		out = append(out, doc)
	}
	if len(out) == 0 {
		return nil, errors.New("it holds no GuardPolicy")
	}
	return out, nil
}

func parseDocument(v any, at *yaml.Node) (policyDocument, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return policyDocument{}, err
	}
	var head struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
	}
	_ = json.Unmarshal(data, &head) // what it is not is said below
	floor := head.Kind == "ClusterGuardPolicy"
	if !floor && head.Kind != "GuardPolicy" || !strings.HasPrefix(head.APIVersion, "hauberk.dev/") {
		return policyDocument{}, fmt.Errorf("kind %q of %q: want GuardPolicy of hauberk.dev/v1alpha1", head.Kind, head.APIVersion)
	}
	var doc struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   struct {
			Name        string            `json:"name"`
			Namespace   string            `json:"namespace"`
			Labels      map[string]string `json:"labels"`
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
		Spec json.RawMessage `json:"spec"`
	}
	if err := decodeStrict(data, &doc); err != nil {
		return policyDocument{}, located(err, at)
	}
	out := policyDocument{name: doc.Metadata.Name, namespace: doc.Metadata.Namespace, floor: floor}
	if out.name == "" {
		return out, errors.New("metadata.name: want one")
	}
	if doc.Spec == nil {
		return out, nil
	}
	if floor {
		err = decodeStrict(doc.Spec, &out.spec)
	} else {
		err = decodeStrict(doc.Spec, &out.spec.GuardPolicy)
	}
	return out, located(err, at)
}

func decodeStrict(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	return d.Decode(into)
}

// located adds the line of the field that an error of JSON is about.
func located(err error, at *yaml.Node) error {
	if err == nil {
		return nil
	}
	word := ""
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) {
		word = wrong.Field[strings.LastIndexByte(wrong.Field, '.')+1:]
	} else if _, rest, ok := strings.Cut(err.Error(), "unknown field \""); ok {
		word, _, _ = strings.Cut(rest, `"`)
	}
	if line := lineOfKey(at, word); line > 0 {
		return fmt.Errorf("line %d: %w", line, err)
	}
	return err
}

// lineOfKey finds where a key stands.
func lineOfKey(at *yaml.Node, key string) int {
	for i, c := range at.Content {
		if at.Kind == yaml.MappingNode && i%2 == 0 && c.Value == key {
			return c.Line
		}
		if line := lineOfKey(c, key); line > 0 {
			return line
		}
	}
	return 0
}
