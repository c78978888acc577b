package boot_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"hauberk.dev/internal/kernel"
	"hauberk.dev/vm/boot"
)

const user = 64490

// config boots nothing but the probe: the agent is any program.
func config(t *testing.T) boot.Config {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("starting the probe needs root")
	}
	if _, err := kernel.Find("/", kernel.Flavour); errors.Is(err, kernel.ErrMissing) {
		t.Skip(err)
	}
	dir := t.TempDir()
	return boot.Config{State: filepath.Join(dir, "state"), Run: filepath.Join(dir, "run"), User: user, Agent: "/bin/true"}
}

func TestOpen(t *testing.T) {
	c := config(t)
	linked := 0
	c.Link = func(types, overlay io.ReaderAt, buildID string) ([]byte, error) {
		linked++
		magic := make([]byte, 4)
		if _, err := overlay.ReadAt(magic, 0); err != nil || string(magic) != "\x7fELF" || buildID == "" {
			t.Errorf("overlay module begins with %q, %v; build id %q", magic, err, buildID)
		}
		return []byte("bundle"), nil
	}
	g, err := boot.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	first := g.Measurement()
	for what, digest := range map[string]string{
		"kernel": first.Kernel, "initrd": first.Initrd, "agent": first.Agent, "Guard": first.Guard, "command line": first.CommandLine,
	} {
		if len(digest) != 64 {
			t.Errorf("%s has digest %q", what, digest)
		}
	}
	if err := g.Template(128, 1, "test").Check(); err != nil || first.GuardOff || linked != 1 {
		t.Errorf("template: %v; guard off %v, linked %d times", err, first.GuardOff, linked)
	}
	for range 2 {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	c.Link = nil
	if g, err = boot.Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	second := g.Measurement()
	if !second.GuardOff || second.Initrd == first.Initrd || second.Kernel != first.Kernel {
		t.Errorf("without the Guard: %+v, with it %+v", second, first)
	}
}

func TestOpenRefuses(t *testing.T) {
	for says, edit := range map[string]func(*boot.Config){
		"installed kernel": func(c *boot.Config) { c.Kernel = "/boot/bzImage" },
		"no such file":     func(c *boot.Config) { c.Agent = "/nowhere" },
		"cannot link":      func(c *boot.Config) { c.Link = linking(nil, errors.New("cannot link")) },
		"bundle is empty":  func(c *boot.Config) { c.Link = linking(nil, nil) },
	} {
		c := config(t)
		edit(&c)
		if _, err := boot.Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("error %v, want one that says %q", err, says)
		}
	}
}

func linking(bundle []byte, err error) boot.Link {
	return func(io.ReaderAt, io.ReaderAt, string) ([]byte, error) { return bundle, err }
}
