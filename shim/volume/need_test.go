package volume

import (
	"os"
	"path/filepath"
	"testing"

	"hauberk.dev/shim/oci"
)

func TestNeedShare(t *testing.T) {
	k := newKubelet(t, "secret")
	root := filepath.Dir(filepath.Dir(filepath.Dir(filepath.Dir(filepath.Dir(k.dir)))))
	for _, c := range []struct {
		source string
		want   bool
	}{{k.dir, false}, {t.TempDir(), true}} {
		got, err := NeedShare("uid", []oci.Volume{{Mount: -1, Device: 0}, {Device: -1, Source: c.source, Target: "/v"}})
		if err != nil || got != c.want {
			t.Errorf("%s: %v, %v", c.source, got, err)
		}
	}
	if _, err := NeedShare("", []oci.Volume{{Device: -1, Source: "/no/such", Target: "/v"}}); err == nil {
		t.Error("a source that is missing is no fault")
	}
	// Of another pod an emptyDir is a directory like any other.
	e := newKubelet(t, "empty-dir")
	if got, err := NeedShare("another", []oci.Volume{{Device: -1, Source: e.dir, Target: "/v"}}); err != nil || !got {
		t.Errorf("another pod's emptyDir: %v, %v", got, err)
	}
	if got, err := PodNeedsShare(root, "uid"); err != nil || got {
		t.Errorf("a pod with a secret: %v, %v", got, err)
	}
	if err := os.Mkdir(filepath.Join(root, "pods/uid/volumes/kubernetes.io~csi"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := PodNeedsShare(root, "uid"); err != nil || !got {
		t.Errorf("a pod with a volume of CSI: %v, %v", got, err)
	}
	if got, err := PodNeedsShare(root, "other"); err != nil || got {
		t.Errorf("a pod without volumes: %v, %v", got, err)
	}
	if _, err := PodNeedsShare(root, "../x"); err == nil {
		t.Error("a path is taken for a UID")
	}
}
