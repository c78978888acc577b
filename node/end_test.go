package node

import (
	"os"
	"path/filepath"
	"testing"

	wire "hauberk.dev/api/node"
	"hauberk.dev/internal/netns"
)

func TestEndLeavesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may make network namespaces")
	}
	c := Config{State: t.TempDir(), Run: t.TempDir()}
	if err := End(c); err != nil {
		t.Fatalf("nothing to end: %v", err)
	}
	namespaces := filepath.Join(c.Run, "netns")
	if err := os.Mkdir(namespaces, 0o700); err != nil {
		t.Fatal(err)
	}
	ns, err := netns.Create(namespaces, "web-1")
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	j, err := openJournal(filepath.Join(c.State, "instances"))
	if err != nil {
		t.Fatal(err)
	}
	if err := j.put(entry{Instance: wire.Instance{ID: "web-1"}}); err != nil {
		t.Fatal(err)
	}
	if err := End(c); err != nil {
		t.Fatal(err)
	}
	if left, err := netns.List(namespaces); err != nil || len(left) != 0 {
		t.Errorf("namespaces %v are left, %v", left, err)
	}
	if left, err := j.all(); err != nil || len(left) != 0 {
		t.Errorf("journal entries %v are left, %v", left, err)
	}
}
