package cri

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"hauberk.dev/registry"
)

// TestImages makes all images, from stand-ins for the programs in them.
func TestImages(t *testing.T) {
	dir := t.TempDir()
	busybox, inside := filepath.Join(dir, "busybox"), filepath.Join(dir, "inside")
	for name, text := range map[string]string{busybox: "#!/bin/sh\nprintf 'busybox\\nls\\nsh\\n'\n", inside: "program"} {
		if err := os.WriteFile(name, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	store, err := registry.Open(filepath.Join(dir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	const want = "sha256:5521f161d81e311e2254485ae3eb5a7ef99005499bc71c6feb6332229c6ca7ee"
	got, err := makeImages(context.Background(), store, inside, busybox)
	if err != nil {
		t.Fatal(err)
	}
	// The suite is built with this digest: another one builds it anew.
	if got != want {
		t.Errorf("the image named by digest is %s, not %s", got, want)
	}
	for image, tags := range map[string]string{"pause": "3.10.2 3.9", staging + "test-image-tags": "1 2 3", "e2e-test-images/httpd": "2.4.39-4"} {
		if all, err := store.Tags(context.Background(), image); err != nil || strings.Join(all, " ") != tags {
			t.Errorf("%s has tags %q, %v", image, all, err)
		}
	}
	one, _ := store.Tag(context.Background(), staging+"test-image-tags", "1")
	two, _ := store.Tag(context.Background(), staging+"test-image-tags", "2")
	three, _ := store.Tag(context.Background(), staging+"test-image-1", "latest")
	if one == "" || one != two || one == three {
		t.Errorf("digests %q %q %q: want two equal, the third another", one, two, three)
	}
}

// TestConfig appends the shipped configuration to that of a private containerd.
func TestConfig(t *testing.T) {
	for name, want := range map[string]string{"config.toml": "version = 2", "config-2.toml": "version = 3"} {
		shipped, err := os.ReadFile(filepath.Join("../../deploy/containerd", name))
		if err != nil {
			t.Fatal(err)
		}
		s := &Server{options: options{dir: "/d"}}
		text := s.config(shipped)
		if !strings.HasPrefix(text, want+"\n") || strings.Count(text, "\nversion") != 0 || !strings.Contains(text, "runtimes.hauberk]") {
			t.Errorf("%s:\n%s", name, text)
		}
	}
}

// TestHierarchies finds at least one tree of cgroups on every machine.
func TestHierarchies(t *testing.T) {
	all, err := hierarchies("group")
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range all {
		if !strings.HasPrefix(h.group, h.mount) || filepath.Base(h.group) != "group" {
			t.Errorf("%+v", h)
		}
		if _, err := os.Stat(filepath.Join(filepath.Dir(h.group), "cgroup.procs")); err != nil {
			t.Errorf("%+v: %v", h, err)
		}
	}
}

// TestEdit changes what occurs once, and nothing else.
func TestEdit(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	if err := os.WriteFile(name, []byte("one two two"), 0o600); err != nil {
		t.Fatal(err)
	}
	edit := func(old string) error { return module{edits: map[string][2]string{"f": {old, "three"}}}.edit(dir) }
	if err := edit("one"); err != nil {
		t.Fatal(err)
	}
	if raw, _ := os.ReadFile(name); string(raw) != "three two two" {
		t.Errorf("%q", raw)
	}
	for _, old := range []string{"two", "four"} {
		if err := edit(old); err == nil {
			t.Errorf("%q was changed", old)
		}
	}
}
