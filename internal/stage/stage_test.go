package stage_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"hauberk.dev/internal/stage"
)

// names lists an archive.
func names(t *testing.T, raw []byte) string {
	t.Helper()
	out := ""
	for r := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out += h.Name + "\n"
	}
}

func TestImages(t *testing.T) {
	if _, err := os.Stat(stage.Busybox); err != nil {
		t.Skip(err)
	}
	layer, err := stage.Layer(map[string]string{"inside": "/proc/self/exe"})
	if err != nil {
		t.Fatal(err)
	}
	if got := names(t, layer); !strings.Contains(got, "bin/sh\n") || !strings.Contains(got, "inside\n") || !strings.Contains(got, "tmp/\n") {
		t.Errorf("the layer has\n%s", got)
	}
	path := filepath.Join(t.TempDir(), "image")
	for want, write := range map[string]func() error{
		"manifest.json": func() error { return stage.DockerArchive(path, "x:1", layer) },
		"oci-layout":    func() error { return stage.Layout(path, "docker.io/x:1", layer) },
	} {
		if err := write(); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(path)
		if err != nil || !strings.Contains(names(t, raw), want) {
			t.Errorf("no %s: %v", want, err)
		}
	}
	if _, err := stage.Layer(map[string]string{"x": "/no/such"}); err == nil {
		t.Error("a program that is not there is in the layer")
	}
}

func TestProcesses(t *testing.T) {
	cmd := exec.Command("sleep", "61")
	cmd.Args[0] = "hauberk-stage-test"
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if found := stage.Processes("hauberk-stage-test", "no such word anywhere"); found[cmd.Process.Pid] != "hauberk-stage-test 61 " || len(found) != 1 {
		t.Errorf("found %d, and %q", len(found), found[cmd.Process.Pid])
	}
}
