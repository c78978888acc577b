// Package house_test holds the checks that keep the rooms apart: who may
// import whom, what each program links, and that words say something.
//
// It tests no behaviour of Hauberk; every room does that itself.
package house_test

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
)

// floors of the house, lowest first. A room imports itself and the floors
// below; what it needs of a neighbour it asks for by a small interface, which
// node, control or cmd fills.
var floors = [][]string{
	{"api", "internal"},
	{"id", "evidence", "plan", "policy", "ledger"},
	{"ca", "attest", "release", "xds", "mesh", "vm", "image", "guard", "enclave", "contain"},
	{"shim", "guest", "kube", "console", "registry"},
	{"node", "control", "sandbox"},
	{"cmd", "test", "bench", "examples", "deploy"},
}

// loosened names each import that the floors forbid and that stands, with the
// reason. A line nothing needs any more is a finding.
var loosened = []struct{ from, to, why string }{
	{"api/node", "plan", "the control plane hands a node whole plans, and one wording of them is enough"},
	{"api/mesh", "plan", "the node hands the same plans on to its proxy"},
	{"api/mesh", "internal/unixsock", "descriptors are taken off a socket in one place, and so is who is at its other end"},
}

// only names what few rooms may carry, and why. A place is a room or a package.
var only = []struct{ prefix, places, why string }{
	{"k8s.io/apimachinery/", "kube api/v1alpha1", "resources are the one thing outside kube that Kubernetes must understand"},
	{"sigs.k8s.io/controller-runtime/pkg/scheme", "kube api/v1alpha1", "resources register themselves"},
	{"k8s.io/", "kube", "engines know no cluster"},
	{"sigs.k8s.io/", "kube", "engines know no cluster"},
	{"go.etcd.io/", "kube", "the store stands behind the API, never beside it"},
	{"github.com/cilium/ebpf", "guard bench/shortcut", "one room knows the kernel's verifier; one program measures what is not used"},
	{"github.com/containerd/", "shim", "one door faces containerd"},
	{"github.com/envoyproxy/", "xds", "one room reads the words of other control planes"},
	{"github.com/spf13/", "cmd", "flags are the business of programs"},
}

func TestFloors(t *testing.T) {
	findings, err := layers(os.DirFS("."), true)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		t.Error(f)
	}
}

func TestFloorsFindPlantedFaults(t *testing.T) {
	planted(t, "layers", func(fsys fs.FS) ([]string, error) { return layers(fsys, false) })
}

// TestFloorsNoticeStaleException proves that a loosened pair cannot outlive
// its import.
func TestFloorsNoticeStaleException(t *testing.T) {
	if got := stale(map[int]bool{}); len(got) != len(loosened) || len(got) == 0 {
		t.Errorf("%d of %d unused lines found", len(got), len(loosened))
	}
}

// layers lists what breaks the floors or the weight table. Tests may look
// across, so their imports are not read. whole says that fsys is the whole
// house, where every exception must have a use.
func layers(fsys fs.FS, whole bool) (findings []string, err error) {
	module, files, err := tree(fsys)
	if err != nil {
		return nil, err
	}
	used := map[int]bool{}
	for _, f := range files {
		if f.test() || f.room() == "" {
			continue
		}
		here := floorOf(f.room())
		if here < 0 {
			findings = append(findings, fmt.Sprintf("%s: room %q is on no floor", f.path, f.room()))
			continue
		}
		for _, spec := range f.Imports {
			imp := strings.Trim(spec.Path.Value, "\"`")
			if own, ok := strings.CutPrefix(imp, module+"/"); ok {
				findings = append(findings, climbs(f, own, used)...)
				continue
			}
			findings = append(findings, carries(f, imp)...)
		}
	}
	if whole {
		findings = append(findings, stale(used)...)
	}
	return findings, nil
}

func floorOf(room string) int {
	return slices.IndexFunc(floors, func(f []string) bool { return slices.Contains(f, room) })
}

// climbs finds an import of a neighbour or of a floor above.
func climbs(f source, own string, used map[int]bool) []string {
	to, _, _ := strings.Cut(own, "/")
	if to == f.room() || floorOf(to) < floorOf(f.room()) && floorOf(to) >= 0 {
		return nil
	}
	for i, l := range loosened {
		if under(path.Dir(f.path), l.from) && under(own, l.to) {
			used[i] = true
			return nil
		}
	}
	return []string{fmt.Sprintf("%s imports %s: floor %d may not reach floor %d",
		f.path, own, floorOf(f.room()), floorOf(to))}
}

// carries finds an import that only other rooms may have, and unsafe outside
// the files that say so by their name.
func carries(f source, imp string) []string {
	if imp == "unsafe" && !strings.HasSuffix(f.path, "_unsafe.go") && !generated(f) {
		return []string{f.path + " imports unsafe: only files named *_unsafe.go may: reviewers look there first"}
	}
	for _, o := range only {
		if !strings.HasPrefix(imp, o.prefix) {
			continue
		}
		may := func(place string) bool { return under(path.Dir(f.path), place) }
		if slices.ContainsFunc(strings.Fields(o.places), may) {
			return nil
		}
		return []string{fmt.Sprintf("%s imports %s: only %s may: %s", f.path, imp, o.places, o.why)}
	}
	return nil
}

func stale(used map[int]bool) (findings []string) {
	for i, l := range loosened {
		if !used[i] {
			findings = append(findings, fmt.Sprintf("%s no longer imports %s: remove the exception", l.from, l.to))
		}
	}
	return findings
}

// under says whether a package is a place or lies below it.
func under(pkg, place string) bool {
	return pkg == place || strings.HasPrefix(pkg, place+"/")
}
