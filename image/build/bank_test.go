package build_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"hauberk.dev/api/spec"
	"hauberk.dev/evidence"
	"hauberk.dev/image"
	"hauberk.dev/image/build"
)

const bank = "../../examples/bank"

// TestBankImages builds the images of the example and starts each in a root
// of its own, far enough to see that its program runs.
func TestBankImages(t *testing.T) {
	r, err := build.ReadRecipe(filepath.Join(bank, "bank.json"))
	if err != nil {
		t.Fatal(err)
	}
	key := signer(t)
	for _, img := range r.Images {
		t.Run(img.Name, func(t *testing.T) {
			b, err := build.Build(t.Context(), build.Spec{
				Dir: bank, Image: img, Output: filepath.Join(t.TempDir(), "image"), Builder: r.Builder, Signer: key,
				Source: evidence.Source{Repository: r.Repository, Revision: strings.Repeat("a", 40), Author: r.Author},
			})
			if err != nil {
				t.Fatal(err)
			}
			pulled, err := image.Pull(t.Context(), image.Layout(b.Layout), b.Digest, t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s %d bytes", b.Digest, pulled.Size)
			if img.Name == "bank/assistant:1" {
				checkAssistant(t, pulled)
			} else if pulled.Config.UID != 65532 {
				t.Errorf("it runs as %d", pulled.Config.UID)
			}
		})
	}
}

// checkAssistant sees that the image holds what the attacks need: a shell, a
// dynamic program with its loader, and the attacks.
func checkAssistant(t *testing.T, img image.Image) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	root := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", img.Path, root).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() { unix.Unmount(root, 0) })
	for _, run := range [][]string{{"/bin/sh", "-c", "exit 0"}, {"/bin/cat", "/etc/passwd"}, {"/bin/true"}, {"/usr/bin/attack", "proof", "x"}} {
		if out, err := exec.Command("chroot", append([]string{root}, run...)...).CombinedOutput(); err != nil {
			t.Errorf("%q: %v: %s", run, err, out)
		}
	}
}

// TestBankResources reads the example's YAML strictly into the words of
// api/spec, and checks that its parts name each other.
func TestBankResources(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join(bank, "bank.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	text = text[strings.Index(text, "apiVersion"):] // the placeholders are named in the comment
	for _, name := range []string{"KEY_builder", "KEY_reviewer", "KEY_owner"} {
		text = strings.ReplaceAll(text, "${"+name+"}", `"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"`)
	}
	text = strings.ReplaceAll(text, "${WEB_PORT}", "18080")
	if strings.Contains(text, "${") {
		t.Error("there is a placeholder nobody fills")
	}
	names := map[string][]string{}
	var workloads []spec.Workload
	var access []spec.AccessPolicy
	d := yaml.NewDecoder(strings.NewReader(text))
	for {
		var doc struct {
			APIVersion, Kind string
			Metadata         struct{ Name, Namespace string }
			Spec             map[string]any
		}
		err := d.Decode(&doc)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(names[doc.Kind], doc.Metadata.Name) {
			t.Errorf("%s %s is there twice", doc.Kind, doc.Metadata.Name)
		}
		names[doc.Kind] = append(names[doc.Kind], doc.Metadata.Name)
		switch doc.Kind {
		case "Namespace":
			continue
		case "Application":
			strict(t, doc.Spec, &spec.Application{})
		case "ReleasePolicy":
			strict(t, doc.Spec, &spec.ReleasePolicy{})
		case "GuardPolicy":
			strict(t, doc.Spec, &spec.GuardPolicy{})
		case "AccessPolicy":
			var a spec.AccessPolicy
			strict(t, doc.Spec, &a)
			access = append(access, a)
		case "Workload":
			var w spec.Workload
			strict(t, doc.Spec, &w)
			workloads = append(workloads, w)
		default:
			t.Errorf("unknown kind %q", doc.Kind)
		}
		if doc.Metadata.Namespace != "bank" {
			t.Errorf("%s %s is in namespace %q", doc.Kind, doc.Metadata.Name, doc.Metadata.Namespace)
		}
	}
	r, err := build.ReadRecipe(filepath.Join(bank, "bank.json"))
	if err != nil {
		t.Fatal(err)
	}
	if len(workloads) != len(r.Images) {
		t.Errorf("%d workloads, %d images", len(workloads), len(r.Images))
	}
	for _, w := range workloads {
		i := slices.IndexFunc(r.Images, func(img build.Image) bool { return img.Name == w.Image })
		if i < 0 || r.Images[i].Application != w.Application || !slices.Contains(names["Application"], w.Application) {
			t.Errorf("workload of image %q and application %q fits no image", w.Image, w.Application)
		}
		for _, g := range w.GuardPolicies {
			if !slices.Contains(names["GuardPolicy"], g) {
				t.Errorf("%s: no guard policy %q", w.Image, g)
			}
		}
	}
	for _, a := range access {
		if !slices.Contains(names["Workload"], a.Workload) {
			t.Errorf("access policy for %q, which does not exist", a.Workload)
		}
	}
}

// strict reads a decoded YAML value into a specification that must know every
// field.
func strict(t *testing.T, from any, to any) {
	t.Helper()
	raw, err := json.Marshal(from)
	if err != nil {
		t.Fatal(err)
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(to); err != nil {
		t.Errorf("%s: %v", raw, err)
	}
}
