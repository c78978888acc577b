package control

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"hauberk.dev/api/admin"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/kube"
)

// askAs names the directory of a socket that a copy of this test asks.
const askAs = "HAUBERK_TEST_ASK"

func TestMain(m *testing.M) {
	if run := os.Getenv(askAs); run != "" {
		fmt.Println(askDesk(run, "GET", admin.PathStatus, nil, nil, nil))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// strangers try the doors without the right to.
func (tn *town) strangers(t *testing.T) {
	t.Helper()
	viewer, err := tn.c.account(t.Context(), "vera", []string{kube.GroupViewer})
	if err != nil {
		t.Fatal(err)
	}
	s, err := kube.Connect(t.Context(), viewer)
	if err != nil {
		t.Fatalf("a viewer may not even look: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	err = kube.Create(ctx, s, &v1alpha1.AccessPolicy{ObjectMeta: kube.ObjectMeta{Namespace: "default", Name: "open"}, Spec: spec.AccessPolicy{Workload: "web"}})
	if err == nil || !strings.Contains(err.Error(), "only reads") {
		t.Errorf("a viewer opened access: %v", err)
	}
	if os.Geteuid() != 0 {
		t.Skip("only root may become somebody else")
	}
	// Even if the socket's own mode let them in.
	for name, mode := range map[string]os.FileMode{"": 0o755, AdminSocket: 0o666} {
		if err := os.Chmod(filepath.Join(tn.conf.Run, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Dir(tn.conf.Run), 0o755); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]string{65534: "user 65534 may not administer", 0: "<nil>"} {
		cmd := exec.Command("/proc/self/fd/3")
		self, err := os.Open("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		cmd.ExtraFiles = []*os.File{self}
		cmd.Env = append(os.Environ(), askAs+"="+tn.conf.Run)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		self.Close()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("user %d: %q, %v; want %q", uid, out, err, want)
		}
	}
}
