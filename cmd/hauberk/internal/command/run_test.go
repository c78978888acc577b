package command

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/spf13/cobra"

	"hauberk.dev/api/node"
	"hauberk.dev/guard"
	"hauberk.dev/sandbox"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]uint64{"256m": 256 << 20, "1g": 1 << 30, "1.5G": 3 << 29, "64MiB": 64 << 20, "512kb": 512 << 10, "4194304": 4 << 20, "1t": 1 << 40} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("%s: %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "m", "-1m", "0", "1x", "inf", "nan", "1e30g", "1 m"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("%q is %d", s, got)
		}
	}
}

func TestParseVolume(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for s, want := range map[string]sandbox.Volume{
		dir + ":/x":        {Source: dir, Target: "/x"},
		dir + ":/x:ro":     {Source: dir, Target: "/x", ReadOnly: true},
		".:/x:rw,z":        {Source: dir, Target: "/x"},
		dir + "/.:/x:ro,Z": {Source: dir, Target: "/x", ReadOnly: true},
	} {
		if got, err := parseVolume(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "x", ":/x", dir + ":", dir + "/none:/x", dir + ":/x:rx", dir + ":/x:ro:y"} {
		if got, err := parseVolume(s); err == nil {
			t.Errorf("%q is %+v", s, got)
		}
	}
}

func TestEnvironment(t *testing.T) {
	file := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(file, []byte("# no\nA=1\n\n  B=2 3\nC\nNONE\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	shell := func(name string) (string, bool) { return "shell's", name == "C" || name == "D" }
	got, err := environment([]string{file}, []string{"D", "E=", "F=a=b", "NONE"}, shell)
	if want := []string{"A=1", "B=2 3", "C=shell's", "D=shell's", "E=", "F=a=b"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
	for _, bad := range []string{"", "=x"} {
		if _, err := environment(nil, []string{bad}, shell); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	if _, err := environment([]string{"/none"}, nil, shell); err == nil {
		t.Error("a file that is not there was read")
	}
}

func TestParseSince(t *testing.T) {
	now := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	for s, want := range map[string]time.Time{"10m": now.Add(-10 * time.Minute), "2026-11-22T09:00:00Z": now.Add(-time.Hour)} {
		if got, err := parseSince(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	if _, err := parseSince("yesterday", now); err == nil {
		t.Error("yesterday was taken")
	}
}

func TestKeys(t *testing.T) {
	for s, want := range map[string]string{"ctrl-p,ctrl-q": "\x10\x11", "a": "a", "ctrl-@,ctrl-[,z": "\x00\x1bz", "": "", "none": ""} {
		if got, err := parseKeys(s); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", s, got, err)
		}
	}
	for _, s := range []string{"ctrl-", "ctrl-1", "ab", ",", "ctrl-pp"} {
		if got, err := parseKeys(s); err == nil {
			t.Errorf("%q is %q", s, got)
		}
	}
	for in, want := range map[string]struct {
		out  string
		left bool
	}{
		"plain":             {"plain", false},
		"a\x10b":            {"a\x10b", false},
		"a\x10\x11b":        {"a", true},
		"\x10\x10\x11":      {"\x10", true},
		"a\x10":             {"a", false}, // held back until the next key tells
		"\x11\x10x\x10\x11": {"\x11\x10x", true},
	} {
		for name, wrap := range map[string]func(io.Reader) io.Reader{"whole": func(r io.Reader) io.Reader { return r }, "each": iotest.OneByteReader} {
			got, err := io.ReadAll(&watched{in: wrap(strings.NewReader(in)), keys: []byte("\x10\x11")})
			if string(got) != want.out || errors.Is(err, errDetached) != want.left {
				t.Errorf("%s %q: %q, %v", name, in, got, err)
			}
		}
	}
}

// TestReadyPolicies has the Guard's own compiler judge what is offered.
func TestReadyPolicies(t *testing.T) {
	seen := map[string]string{}
	for _, name := range policyNames() {
		list, err := readPolicies([]string{name}, false)
		if err != nil || len(list) != 1 {
			t.Fatalf("%s: %v", name, err)
		}
		c, err := guard.Compile(node.Guard{Generation: 1, Policies: list}, guard.CompileFacts{})
		if err != nil || len(c.Unsupported) > 0 {
			t.Errorf("%s: %v, unsupported %q", name, err, c.Unsupported)
		}
		if other, ok := seen[c.Digest]; ok {
			t.Errorf("%s is the same as %s", name, other)
		}
		seen[c.Digest] = name
	}
	// The one that is called so is the Guard's own.
	own, err := guard.Compile(node.Guard{Generation: 1}, guard.CompileFacts{})
	if err != nil || seen[own.Digest] != "baseline" {
		t.Errorf("the Guard's baseline is %q here, %v", seen[own.Digest], err)
	}
	// They survive the way to the shim.
	agent, _ := readPolicies([]string{"agent"}, false)
	if agent[0].Spec.Net == nil || len(agent[0].Spec.Net.Egress) == 0 {
		t.Error("a list of destinations that is empty is lost on the way, and then allows all")
	}
	if open, err := readPolicies([]string{"agent"}, true); err != nil || open[0].Spec.Net != nil || open[0].Spec.Exec == nil {
		t.Errorf("with --egress agent is %+v, %v", open, err)
	}
}

func TestPolicyFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(text string) string {
		name := filepath.Join(dir, fmt.Sprint(len(text))+".yaml")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	head := "apiVersion: hauberk.dev/v1alpha1\nkind: GuardPolicy\nmetadata: {name: a}\n"
	good := write("# two\n" + head + "spec: {exec: {origin: image}}\n---\n" + head + "spec:\n  files: [{path: /etc, deny: w}]\n---\n")
	list, err := readPolicies([]string{good, "web"}, false)
	if err != nil || len(list) != 3 || list[1].Spec.Files[0].Path != "/etc" || list[2].Name != "web" {
		t.Errorf("%+v, %v", list, err)
	}
	for text, want := range map[string]string{
		"":                                      "holds no GuardPolicy",
		"a: [":                                  "document 1",
		"x":                                     "document 1",
		"{1: 2}":                                "document 1",
		head + "spec: {exec: {orgin: image}}\n": "orgin",
		head + "stauts: {}\n":                   "stauts",
		"apiVersion: hauberk.dev/v1alpha1\nkind: Workload\nmetadata: {name: a}\n": `kind "Workload"`,
		"apiVersion: hauberk.dev/v1alpha1\nkind: GuardPolicy\n":                   "metadata.name",
		strings.Repeat("# much\n", maxPolicyFile/7+1):                             "more than",
	} {
		if _, err := readPolicies([]string{write(text)}, false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", text, err, want)
		}
	}
	if _, err := readPolicies([]string{"agnet"}, false); err == nil || !strings.Contains(err.Error(), "ready are baseline, web, batch, agent, database, dev") {
		t.Errorf("one that is not there: %v", err)
	}
}

// TestRunFlags reads command lines as docker's users write them.
func TestRunFlags(t *testing.T) {
	dir := t.TempDir()
	read := func(line ...string) (runOptions, error) {
		var o runOptions
		c := &cobra.Command{Use: "run"}
		o.flags(c)
		if err := c.ParseFlags(line); err != nil {
			return o, err
		}
		return o, o.read(c)
	}
	o, err := read("-it", "--rm", "-m", "64m", "--cpus", "1.5", "-e", "A=1", "-w", "/w", "-u", "1:2", "--hostname", "h",
		"-v", dir+":/v:ro", "--read-only", "--policy", "agent", "--entrypoint", "", "-l", "a=b", "--name", "n", "--pids-limit", "7", "image", "cmd", "-x")
	if err != nil {
		t.Fatal(err)
	}
	empty := ""
	want := sandbox.Options{
		Name: "n", Entrypoint: &empty, Env: []string{"A=1"}, WorkingDir: "/w", User: "1:2", Hostname: "h", Terminal: true, Stdin: true, Remove: true,
		Memory: 64 << 20, CPUs: 1.5, Pids: 7, ReadOnly: true, Pull: sandbox.PullMissing,
		Volumes: []sandbox.Volume{{Source: dir, Target: "/v", ReadOnly: true}}, Labels: map[string]string{"a": "b"}, Policy: o.Policy,
	}
	if !reflect.DeepEqual(o.Options, want) || len(o.Policy) != 1 {
		t.Errorf("read %+v, want %+v", o.Options, want)
	}
	for want, line := range map[string][]string{
		`--mem: size "x"`:            {"-m", "x"},
		`--volume: "nothing"`:        {"-v", "nothing"},
		`--policy "strict"`:          {"--policy", "strict"},
		`--env ""`:                   {"-e", ""},
		`--label "=x"`:               {"-l", "=x"},
		`--detach-keys: key "ctrl"`:  {"--detach-keys", "ctrl"},
		`--detach and --detach-keys`: {"-d", "--detach-keys", "a"},
	} {
		if _, err := read(line...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", line, err, want)
		}
	}
}
