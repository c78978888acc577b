package house_test

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
)

var update = flag.Bool("update", false, "rewrite cmd/*/deps.txt from what the programs link")

// programs of the house: one for each trust boundary.
var programs = strings.Fields("hauberk hauberkd hauberk-node hauberk-mesh hauberk-xds hauberk-guest hauberk-guard containerd-shim-hauberk-v2")

// never names what a program must not link, and why.
var never = []struct{ program, prefix, why string }{
	{"hauberk-guest", "fmt", "reflection doubles an agent whose every private page is paid once per sandbox"},
	{"hauberk-guest", "net", "the agent speaks over one virtio port and opens no socket"},
	{"hauberk-guest", "encoding/json", "frames from outside are read by a bounded parser of our own"},
	{"hauberk-guest", "crypto/tls", "keys stay out of the guest"},
	{"hauberk-guest", "google.golang.org/", "the agent speaks its own framing"},
	{"hauberk-guest", "github.com/", "what runs as PID 1 beside the workload is ours to the last line"},
	{"hauberk-node", "k8s.io/", "what is privileged speaks to one control plane, by one small protocol"},
	{"hauberk-node", "sigs.k8s.io/", "what is privileged speaks to one control plane, by one small protocol"},
	{"hauberk-node", "go.etcd.io/", "the node keeps no store"},
	{"hauberk-node", "hauberk.dev/ca", "what is privileged never signs identities"},
	{"hauberk-mesh", "k8s.io/", "what faces the network knows no cluster"},
	{"hauberk-mesh", "sigs.k8s.io/", "what faces the network knows no cluster"},
	{"hauberk-mesh", "go.etcd.io/", "what faces the network keeps no store"},
	{"hauberk-mesh", "hauberk.dev/ca", "what faces the network never signs identities"},
	{"hauberk-mesh", "hauberk.dev/vm", "what faces the network starts no machine"},
	{"hauberk-mesh", "hauberk.dev/guard", "what faces the network loads no program into a kernel"},
	{"hauberk-mesh", "github.com/cilium/ebpf", "what faces the network loads no program into a kernel"},
	{"hauberk-mesh", "os/exec", "what faces the network starts no process"},
	{"hauberk-mesh", "google.golang.org/grpc", "what faces the network does not read the words of other control planes"},
	{"hauberk-mesh", "github.com/envoyproxy/", "what faces the network does not read the words of other control planes"},
	{"hauberk-xds", "k8s.io/", "what reads the words of other control planes knows no cluster"},
	{"hauberk-xds", "hauberk.dev/ca", "what reads the words of other control planes never signs identities"},
	{"hauberk-xds", "hauberk.dev/mesh", "what reads the words of other control planes carries no traffic"},
	{"hauberk-xds", "hauberk.dev/vm", "what reads the words of other control planes starts no machine"},
	{"hauberk-xds", "os/exec", "what reads the words of other control planes starts no process"},
	{"hauberk-guard", "k8s.io/", "what loads programs into a node's kernel knows no cluster"},
	{"hauberk-guard", "net/http", "what loads programs into a node's kernel faces no network"},
	{"hauberk-guard", "crypto/tls", "what loads programs into a node's kernel faces no network"},
	{"hauberk-guard", "hauberk.dev/vm", "containers of a shared kernel need no machine"},
	{"hauberk", "k8s.io/", "the command speaks to hauberkd; kubectl speaks to the API"},
	{"hauberk", "sigs.k8s.io/", "the command speaks to hauberkd; kubectl speaks to the API"},
	{"hauberk", "go.etcd.io/", "the command keeps no store"},
	{"hauberk", "hauberk.dev/ca", "only the control plane signs identities"},
	{"hauberk", "hauberk.dev/vm", "only the node and the shim start machines"},
	{"hauberk", "github.com/cilium/ebpf", "what people type loads no program into a kernel"},
	{"hauberkd", "hauberk.dev/vm", "what signs starts no machine"},
	{"hauberkd", "hauberk.dev/mesh", "what signs does not face the network of the workloads"},
	{"hauberkd", "github.com/cilium/ebpf", "what signs loads no program into a kernel"},
	{"containerd-shim-hauberk-v2", "k8s.io/", "containerd's door knows containers only"},
	{"containerd-shim-hauberk-v2", "hauberk.dev/ca", "containerd's door never signs identities"},
}

// TestWeight compares what each program links with the list beside it, so that
// a new dependency is a line in a review and not a surprise.
func TestWeight(t *testing.T) {
	mains, err := mainDirs(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range programs {
		if !slices.Contains(mains, p) {
			t.Errorf("cmd/%s: no such program", p)
		}
	}
	for _, p := range mains {
		t.Run(p, func(t *testing.T) {
			if !slices.Contains(programs, p) {
				t.Errorf("cmd/%s is not on the list of programs", p)
			}
			weigh(t, ".", p)
		})
	}
}

func weigh(t *testing.T, root, program string) {
	linked, err := links(root, program)
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(root, "cmd", program, "deps.txt")
	if *update {
		text := strings.Join(listed(linked), "\n") + "\n"
		if err := os.WriteFile(list, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	written, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range append(differs(listed(linked), strings.Fields(string(written))), forbidden(program, linked)...) {
		t.Error(f)
	}
}

// TestWeightFindsPlantedFaults builds a small house in which a guest agent
// links fmt and a list is out of date.
func TestWeightFindsPlantedFaults(t *testing.T) {
	root := t.TempDir()
	a, err := txtar.ParseFile("testdata/weight/faults.txtar")
	if err != nil {
		t.Fatal(err)
	}
	fsys, err := txtar.FS(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(root, fsys); err != nil {
		t.Fatal(err)
	}
	linked, err := links(root, "hauberk-guest")
	if err != nil {
		t.Fatal(err)
	}
	written, err := os.ReadFile(filepath.Join(root, "cmd/hauberk-guest/deps.txt"))
	if err != nil {
		t.Fatal(err)
	}
	found := append(differs(listed(linked), strings.Fields(string(written))), forbidden("hauberk-guest", linked)...)
	compare(t, found, wanted(string(a.Comment)))
}

// TestWeightReadsSomething proves that an empty answer of the go command is
// not a clean bill.
func TestWeightReadsSomething(t *testing.T) {
	root := t.TempDir()
	if _, err := mainDirs(root); err == nil {
		t.Error("a house without programs passed")
	}
	if err := os.WriteFile(filepath.Join(root, "go.mod"), []byte("module empty\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := links(root, "hauberkd"); err == nil {
		t.Errorf("a program that is not there links %d packages", len(got))
	}
}

// TestNeverNamesPrograms finds a line of the table that guards nothing.
func TestNeverNamesPrograms(t *testing.T) {
	for _, n := range never {
		if !slices.Contains(programs, n.program) {
			t.Errorf("never: %q is no program", n.program)
		}
	}
}

// mainDirs names the folders below cmd that hold a package main.
func mainDirs(root string) (names []string, err error) {
	_, files, err := tree(os.DirFS(root))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		dir := path.Dir(f.path)
		if path.Dir(dir) == "cmd" && f.Name.Name == "main" && !slices.Contains(names, path.Base(dir)) && hasMain(f) {
			names = append(names, path.Base(dir))
		}
	}
	slices.Sort(names)
	return names, nil
}

func hasMain(f source) bool {
	return slices.ContainsFunc(f.Decls, func(d ast.Decl) bool {
		name, ok := function(d)
		return ok && name == "main"
	})
}

// links lists every package a program links, built the way it is shipped.
func links(root, program string) ([]string, error) {
	cmd := exec.Command("go", "list", "-deps", "./cmd/"+program)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list packages of %s: %w: %s", program, err, stderr.Bytes())
	}
	pkgs := strings.Fields(string(out))
	if len(pkgs) < 2 {
		return nil, fmt.Errorf("list packages of %s: only %q", program, pkgs)
	}
	return pkgs, nil
}

// listed leaves out what belongs to the inside of the standard library and
// changes with each Go release.
func listed(pkgs []string) (out []string) {
	for _, p := range pkgs {
		first, _, _ := strings.Cut(p, "/")
		inside := !strings.Contains(first, ".") &&
			(slices.Contains(strings.Split(p, "/"), "internal") || first == "vendor" || first == "runtime")
		if !inside {
			out = append(out, p)
		}
	}
	slices.Sort(out)
	return out
}

func differs(have, want []string) (findings []string) {
	for _, p := range have {
		if !slices.Contains(want, p) {
			findings = append(findings, fmt.Sprintf("links %s, which deps.txt does not list (go test . -run TestWeight -update)", p))
		}
	}
	for _, p := range want {
		if !slices.Contains(have, p) {
			findings = append(findings, fmt.Sprintf("deps.txt lists %s, which is not linked (go test . -run TestWeight -update)", p))
		}
	}
	return findings
}

// forbidden finds packages that the table bars. A prefix that ends without a
// slash bars the package and what lies below it.
func forbidden(program string, linked []string) (findings []string) {
	for _, n := range never {
		if n.program != program {
			continue
		}
		for _, p := range linked {
			if under(p, strings.TrimSuffix(n.prefix, "/")) {
				findings = append(findings, fmt.Sprintf("links %s: never %s: %s", p, n.prefix, n.why))
				break
			}
		}
	}
	return findings
}
