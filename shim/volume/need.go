package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"hauberk.dev/shim/oci"
)

// Whether a machine is started for shares must be known when it starts, for its
// memory is then another kind. A container that is alone says it itself; of a
// pod only what kubelet has prepared by then can be seen.

// NeedShare says whether any of a container's volumes comes by the file server.
// pod is the pod's UID, or empty.
func NeedShare(pod string, volumes []oci.Volume) (bool, error) {
	for _, v := range volumes {
		if v.Device >= 0 {
			continue
		}
		s, err := open(v, pod)
		if err != nil {
			return false, fmt.Errorf("look at volume %s %.256q: %w", v.Field, v.Source, err)
		}
		s.close()
		if s.kind == kindShared {
			return true, nil
		}
	}
	return false, nil
}

// maxKinds is more than there are kinds of volumes.
const maxKinds = 256

// PodNeedsShare says whether kubelet, whose directory is root, has prepared a
// volume for a pod that comes by the file server. Paths of the host, which
// kubelet does not prepare, cannot be seen before their container is made.
func PodNeedsShare(root, pod string) (bool, error) {
	if pod == "" || strings.ContainsRune(pod, '/') || pod == "." || pod == ".." {
		return false, fmt.Errorf("look at volumes: %.128q is no pod's UID", pod)
	}
	dir, err := os.Open(filepath.Join(root, "pods", pod, "volumes"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at volumes: %w", err)
	}
	defer dir.Close()
	kinds, err := dir.ReadDir(maxKinds)
	if err != nil && !isEnd(err) {
		return false, fmt.Errorf("look at volumes: %w", err)
	}
	for _, k := range kinds {
		if !kubeletVolume.MatchString("/pods/x/volumes/" + k.Name() + "/x") {
			return true, nil
		}
	}
	return false, nil
}
