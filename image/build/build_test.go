package build_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hauberk.dev/evidence"
	"hauberk.dev/image"
	"hauberk.dev/image/build"
)

// module makes a checked-out Go module.
func module(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":       "module example.com/shop\n\ngo 1.26\n",
		"till/main.go": "package main\n\nimport \"fmt\"\n\nfunc main() { fmt.Println(\"open\") }\n",
	} {
		os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	script := `git init -q . && git add . && git -c user.name=a -c user.email=a@b commit -q -m one`
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir
}

func text(s string) *string { return &s }

var shop = build.Image{
	Name: "shop/till:1", Application: "shop",
	Programs: []build.Program{{Package: "./till", Path: "/bin/till"}},
	Files: []build.File{
		{Path: "/etc/passwd", Text: text("root:x:0:0::/:\ntill:x:70:71::/:\n")},
		{Path: "/bin/cat", Copy: "/bin/cat", Libraries: true},
		{Path: "/bin/tac", Link: "cat"},
		{Path: "/var/till", Directory: true, Mode: "1777"},
	},
	Entrypoint: []string{"/bin/till"}, Env: []string{"A=b"}, User: "till",
}

func signer(t *testing.T) *evidence.KeySigner {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := evidence.NewSigner(key, "builder")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func specOf(t *testing.T, dir string, s *evidence.KeySigner) build.Spec {
	t.Helper()
	src, modified, err := build.Checkout(t.Context(), dir, "https://example.com/shop", "dana")
	if err != nil {
		t.Fatal(err)
	}
	return build.Spec{Dir: dir, Image: shop, Output: filepath.Join(t.TempDir(), "till"), Source: src, Modified: modified, Builder: "https://example.com/builder", Signer: s}
}

// TestBuild builds twice, from two directories, and runs what came out in a
// root made of the image alone.
func TestBuild(t *testing.T) {
	key := signer(t)
	dir := module(t)
	one, err := build.Build(t.Context(), specOf(t, dir, key))
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	if out, err := exec.Command("cp", "-r", dir, elsewhere).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	two, err := build.Build(t.Context(), specOf(t, elsewhere, key))
	if err != nil {
		t.Fatal(err)
	}
	if one.Digest != two.Digest {
		t.Errorf("two builds have digests %s and %s", one.Digest, two.Digest)
	}
	named, err := image.Layout(one.Layout).Manifest("shop/till:1")
	if err != nil || named != one.Digest {
		t.Errorf("the index names %s, %v", named, err)
	}
	img, err := image.Pull(t.Context(), image.Layout(one.Layout), one.Digest, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if img.Config.UID != 70 || img.Config.GID != 71 || !slices.Equal(img.Config.Env, []string{"A=b"}) {
		t.Errorf("configuration is %+v", img.Config)
	}
	checkProvenance(t, one, key)
	runInside(t, img.Path)
}

func runInside(t *testing.T, erofs string) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	root := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", erofs, root).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() { unix.Unmount(root, 0) })
	for _, run := range [][]string{{"/bin/till"}, {"/bin/cat", "/etc/passwd"}} {
		out, err := exec.Command("chroot", append([]string{root}, run...)...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "open") && !strings.Contains(string(out), "till:x:70") {
			t.Errorf("%q: %v: %s", run, err, out)
		}
	}
}

func checkProvenance(t *testing.T, b build.Built, key *evidence.KeySigner) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(b.Layout, build.ProvenancePath))
	if err != nil {
		t.Fatal(err)
	}
	env, err := evidence.ParseEnvelope(raw)
	if err != nil {
		t.Fatal(err)
	}
	p, _, err := evidence.VerifyStatement[evidence.Provenance](env, b.Digest, key.Key())
	if err != nil {
		t.Fatal(err)
	}
	src, err := p.Source()
	if err != nil || src.Repository != "https://example.com/shop" || len(src.Revision) != 40 || src.Author != "dana" {
		t.Errorf("source is %+v, %v", src, err)
	}
	if p.BuildDefinition.BuildType != build.BuildType || p.RunDetails.Builder.ID != "https://example.com/builder" || p.RunDetails.Builder.Version["go"] == "" {
		t.Errorf("provenance is %+v", p)
	}
	found := false
	for _, d := range p.BuildDefinition.ResolvedDependencies {
		found = found || d.URI == "file:///bin/cat" && len(d.Digest["sha256"]) == 64
	}
	if !found {
		t.Error("the file copied from this machine is not among the materials")
	}
}

func TestModified(t *testing.T) {
	dir := module(t)
	if err := os.WriteFile(filepath.Join(dir, "till", "more.go"), []byte("package main\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if s := specOf(t, dir, signer(t)); !s.Modified {
		t.Error("a changed checkout is taken for its revision")
	}
}

func TestRefused(t *testing.T) {
	dir := module(t)
	for name, test := range map[string]struct {
		spoil func(*build.Spec)
		want  string
	}{
		"no signer":      {func(s *build.Spec) { s.Signer = nil }, "builder's key"},
		"no such dir":    {func(s *build.Spec) { s.Dir = "/nonexistent" }, "go build"},
		"no such main":   {func(s *build.Spec) { s.Image.Programs = []build.Program{{Package: "./none", Path: "/bin/x"}} }, "go build ./none"},
		"outside":        {func(s *build.Spec) { s.Image.Programs = []build.Program{{Package: "./../x", Path: "/bin/x"}} }, "below the module"},
		"name":           {func(s *build.Spec) { s.Image.Name = "Till" }, "repository:tag"},
		"twice":          {func(s *build.Spec) { s.Image.Files = []build.File{{Path: "/bin/till", Text: text("x")}} }, "there twice"},
		"below a file":   {func(s *build.Spec) { s.Image.Files = []build.File{{Path: "/bin/till/x", Text: text("x")}} }, "not a directory"},
		"missing copy":   {func(s *build.Spec) { s.Image.Files = []build.File{{Path: "/x", Copy: "/nonexistent"}} }, "no such file"},
		"two kinds":      {func(s *build.Spec) { s.Image.Files = []build.File{{Path: "/x", Link: "y", Directory: true}} }, "exactly one"},
		"relative path":  {func(s *build.Spec) { s.Image.Files = []build.File{{Path: "/x/../y", Link: "y"}} }, "clean absolute"},
		"foreign output": {func(s *build.Spec) { os.MkdirAll(filepath.Join(s.Output, "precious"), 0o755) }, "no image layout"},
	} {
		t.Run(name, func(t *testing.T) {
			s := specOf(t, dir, signer(t))
			test.spoil(&s)
			_, err := build.Build(t.Context(), s)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want %q", err, test.want)
			}
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(s.Output), ".build-*")); len(left) != 0 {
				t.Errorf("left over: %q", left)
			}
			if name == "foreign output" {
				if _, err := os.Stat(filepath.Join(s.Output, "precious")); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func FuzzRecipe(f *testing.F) {
	good, err := json.Marshal(build.Recipe{Version: 1, Repository: "https://example.com/shop", Author: "dana", Builder: "https://example.com/builder", Namespace: "shop", Images: []build.Image{shop}})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := build.ParseRecipe(good); err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"version":2,"surprise":1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := build.ParseRecipe(raw)
		if err != nil {
			return
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := build.ParseRecipe(again); err != nil {
			t.Errorf("what was read prints as something that is refused: %v", err)
		}
	})
}
