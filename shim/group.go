package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"hauberk.dev/shim/oci"
)

// role of a container in its pod.
type role int

const (
	roleAlone   role = iota // its pod is its own
	roleSandbox             // it stands for a pod, and runs nothing
	roleMember              // it is one of a pod
)

// annotations by which a container runtime interface says what a container is,
// and whose: containerd's and CRI-O's.
var criAnnotations = []struct{ kind, pod string }{
	{"io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"},
	{"io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"},
}

// groupOf says to which pod a container belongs, and as what.
func groupOf(annotations map[string]string, id string) (pod string, r role, err error) {
	for _, names := range criAnnotations {
		kind, pod := annotations[names.kind], annotations[names.pod]
		switch {
		case kind == "" && (pod == "" || pod == id):
			continue
		case len(pod) > maxIdentifier || pod != "" && !identifier.MatchString(pod):
			return "", 0, fmt.Errorf("annotation %s %.128q: it names no pod", names.pod, pod)
		case kind == "sandbox" && (pod == "" || pod == id):
			return id, roleSandbox, nil
		case (kind == "container" || kind == "") && pod != "" && pod != id:
			return pod, roleMember, nil
		}
		return "", 0, fmt.Errorf("annotations %s %.32q and %s %.128q: they contradict each other", names.kind, kind, names.pod, pod)
	}
	return id, roleAlone, nil
}

// bundle is what containerd wrote down of a container.
type bundle struct {
	raw         []byte // config.json, nil if there is none
	annotations map[string]string
	pod         string // its id
	role        role
}

// readBundle reads the configuration of a container. Without one it is a pod of
// its own: the sandbox service starts a shim before there is a configuration,
// and a deletion may come after it went.
func readBundle(dir, id string) (bundle, error) {
	raw, err := readFile(filepath.Join(dir, "config.json"), oci.MaxConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return bundle{pod: id}, nil
	}
	if err != nil {
		return bundle{}, fmt.Errorf("read bundle: %w", err)
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(raw, &spec); err != nil {
		return bundle{}, fmt.Errorf("read bundle: config.json: %w", err)
	}
	b := bundle{raw: raw, annotations: spec.Annotations}
	if b.pod, b.role, err = groupOf(spec.Annotations, id); err != nil {
		return bundle{}, fmt.Errorf("read bundle: config.json: %w", err)
	}
	return b, nil
}
