package command

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// ready are policies that have a name here, in the order in which they are
// offered. None but the last is weaker than the baseline.
var ready = []struct {
	name, why string
	spec      spec.GuardPolicy
}{
	{"baseline", "only the image's own programs run, and none does what a service does not do", spec.GuardPolicy{
		Exec: &spec.GuardExec{Origin: "image", AnonymousMemory: "allow", ShellOnSocket: "deny"},
		Sys:  &spec.GuardSys{Deny: everySys},
	}},
	{"agent", "for code that was not written by people: the image's files stay as they are, and nothing is reached", spec.GuardPolicy{
		Exec:  &spec.GuardExec{Origin: "image", AnonymousMemory: "allow", ShellOnSocket: "deny", Severity: spec.SeverityCritical},
		Files: protect("w", "/bin", "/sbin", "/lib", "/lib64", "/usr", "/etc", "/boot", "/opt"),
		Net:   &spec.GuardNet{Egress: []spec.GuardEgress{{CIDR: "127.0.0.0/8"}}, Severity: spec.SeverityCritical},
		Sys:   &spec.GuardSys{Deny: everySys, Severity: spec.SeverityCritical},
	}},
	{"web", "for a server: as baseline, no code is made in memory, and its programs and settings stay as they are", spec.GuardPolicy{
		Exec:  &spec.GuardExec{Origin: "image", AnonymousMemory: "deny", ShellOnSocket: "deny"},
		Files: protect("w", "/bin", "/sbin", "/lib", "/lib64", "/usr", "/etc"),
		Sys:   &spec.GuardSys{Deny: everySys},
	}},
	{"dev", "for trying things: what was written may run, shells on sockets too; the kernel stays out of reach", spec.GuardPolicy{
		Exec: &spec.GuardExec{Origin: "any", AnonymousMemory: "allow", ShellOnSocket: "allow"},
		Sys:  &spec.GuardSys{Deny: []spec.GuardOperation{"bpf", "module"}},
	}},
}

var everySys = []spec.GuardOperation{"bpf", "module", "ptrace", "mount", "rawsocket", "mknod", "iouring", "userns"}

func protect(deny string, paths ...string) (out []spec.GuardFile) {
	for _, p := range paths {
		out = append(out, spec.GuardFile{Path: p, Deny: deny})
	}
	return out
}

func policyNames() (out []string) {
	for _, r := range ready {
		out = append(out, r.name)
	}
	return out
}

const maxPolicyFile = 1 << 20

// readPolicies gives the policies of names and files. Several intersect. Who
// asks for destinations by flags means those, which are enforced outside the
// guest, so that the ready policies have no list of them then.
func readPolicies(names []string, egress bool) (out []node.NamedGuardPolicy, err error) {
	for _, name := range names {
		i := slices.Index(policyNames(), name)
		if i >= 0 {
			p := node.NamedGuardPolicy{Name: name, Spec: ready[i].spec}
			if egress {
				p.Spec.Net = nil
			}
			out = append(out, p)
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

// parsePolicies reads GuardPolicy documents as kubectl takes them. Every field
// must be known: what is not understood is not enforced.
func parsePolicies(raw []byte) (out []node.NamedGuardPolicy, err error) {
	d := yaml.NewDecoder(bytes.NewReader(raw))
	for n := 1; ; n++ {
		var v any
		if err := d.Decode(&v); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		if v == nil {
			continue
		}
		data, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
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
			Spec spec.GuardPolicy `json:"spec"`
		}
		j := json.NewDecoder(bytes.NewReader(data))
		j.DisallowUnknownFields()
		if err := j.Decode(&doc); err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		if doc.Kind != "GuardPolicy" || !strings.HasPrefix(doc.APIVersion, "hauberk.dev/") {
			return nil, fmt.Errorf("document %d: kind %q of %q: want GuardPolicy of hauberk.dev/v1alpha1", n, doc.Kind, doc.APIVersion)
		}
		if doc.Metadata.Name == "" {
			return nil, fmt.Errorf("document %d: metadata.name: want one", n)
		}
		out = append(out, node.NamedGuardPolicy{Name: doc.Metadata.Name, Spec: doc.Spec})
	}
	if len(out) == 0 {
		return nil, errors.New("it holds no GuardPolicy")
	}
	return out, nil
}
