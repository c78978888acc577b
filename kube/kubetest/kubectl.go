package kubetest

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// Kubectl returns the path of a real kubectl. It is built from test/kubectl
// the first time and kept in the user's cache, by version.
func Kubectl(t testing.TB) string {
	t.Helper()
	_, here, _, ok := runtime.Caller(0)
	module := filepath.Join(filepath.Dir(here), "..", "..", "test", "kubectl")
	sums, err := os.ReadFile(filepath.Join(module, "go.sum"))
	if !ok || err != nil {
		t.Fatalf("find the module of kubectl: %v", err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	version := sha256.Sum256(append(sums, runtime.Version()...))
	path := filepath.Join(cache, "hauberk", "kubectl-"+hex.EncodeToString(version[:8]))
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	// Built beside its place, so that two tests at once do not see half of it.
	part, err := os.MkdirTemp(filepath.Dir(path), "kubectl")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(part) }()
	build := exec.Command("go", "build", "-ldflags", stamp("k8s.io/component-base/version")+stamp("k8s.io/client-go/pkg/version"), "-o", filepath.Join(part, "kubectl"), ".")
	build.Dir = module
	build.Env = append(os.Environ(), "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build kubectl: %v\n%s", err, out)
	}
	if err := os.Rename(filepath.Join(part, "kubectl"), path); err != nil {
		t.Fatal(err)
	}
	return path
}

// stamp tells a binary its version; without it kubectl refuses to compare
// itself to the server.
func stamp(pkg string) string {
	return " -X " + pkg + ".gitVersion=v1.37.2 -X " + pkg + ".gitMajor=1 -X " + pkg + ".gitMinor=37"
}
