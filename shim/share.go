package shim

import (
	"fmt"
	"strconv"

	"hauberk.dev/shim/volume"
)

// shareAnnotation of a pod says that containers of it will want directories of
// the host, so that its machine starts for that. Without it the machine is
// replaced when the first container wants one, and those that come later can
// have none.
const shareAnnotation = "hauberk.dev/shares"

// kubeletRoot is where kubelet prepares volumes.
const kubeletRoot = "/var/lib/kubelet"

// willShare says whether a pod's machine is to start for sharing.
func willShare(annotations map[string]string, uid string) (bool, error) {
	if text := annotations[shareAnnotation]; text != "" {
		share, err := strconv.ParseBool(text)
		if err != nil {
			return false, fmt.Errorf("read annotation %s %.64q: want true or false", shareAnnotation, text)
		}
		return share, nil
	}
	if uid == "" {
		return false, nil
	}
	return volume.PodNeedsShare(kubeletRoot, uid)
}
