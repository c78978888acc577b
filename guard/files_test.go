package guard

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// longName is as long as a name can be, and no character of it stands for
// itself alone.
var longName = strings.Repeat("\xff\\", 127) + "x"

// filesScenario is what rules for files say beside "may not be changed".
func filesScenario() scenario {
	const (
		vault  = "/srv/vault may be neither read nor changed"
		closed = "/srv/vault/open/closed may not be changed"
		key    = "/srv/key may only be read by /bin/tool"
		own    = "/srv/own may only be changed by /bin/tool"
		trap   = "/srv/trap is bait"
		secret = "/srv/secret may not be read"
		later  = "may not be changed"
	)
	return scenario{
		name: "files",
		policy: spec.GuardPolicy{Files: []spec.GuardFile{
			{Path: "/srv/vault", Deny: "rw"}, {Path: "/srv/vault/open", Allow: "rw"}, {Path: "/srv/vault/open/closed", Deny: "w"},
			{Path: "/srv/key", By: []string{"/bin/tool"}, Allow: "r"},
			{Path: "/srv/own", Deny: "w", By: []string{"/bin/tool"}, Allow: "w"},
			{Path: "/srv/trap", Bait: true},
			{Path: "/srv/secret", Deny: "r"},
			{Path: "/tmp/" + longName, Deny: "w"},
		}},
		attacks: []attempt{
			{"read=40 /srv/vault/x", vault, OpRead, "P8 B4"},
			{"read=41 /proc/self/root/srv/vault/x", vault, OpRead, "P8 B5"},
			{"write=40 /srv/vault/x", vault, OpWrite, "P8"},
			{"write=41 /srv/vault/open/closed/z", closed, OpWrite, "P8"},
			{"read=42 /srv/key", key, OpRead, "P8"},
			{"write=42 /srv/key", key, OpWrite, "P8"},
			{"as=40 /bin/tool write /srv/key", key, OpWrite, "P8"},
			{"as=41 /bin/curl read /srv/key", key, OpRead, "P8 B7"},
			{"traceother /bin/tool", "by /bin/tool", OpPtrace, "B13"},
			{"write=43 /srv/own", own, OpWrite, "P8"},
			{"read=43 /srv/trap", trap, OpRead, "P9"},
			{"read=44 /srv/trap/coin", trap, OpRead, "P9"},
			{"write=44 /srv/trap/coin", trap, OpWrite, "P9"},
			{"read=45 /srv/secret/a", secret, OpRead, "P8"},
			{"link=40 /srv/secret/b /tmp/b40", secret, OpRead, "P8 B3"},
			{"rename=40 /srv/secret/c /tmp/c40", secret, OpRead, "P8 B3"},
			{"write=45 /tmp/" + longName, later, OpWrite, "P8 B6"},
		},
		benign: []string{
			"read=46 /srv/vault/open/y", "write=46 /srv/vault/open/y", "write=47 /srv/vault/open/new", "read=47 /srv/vault/open/closed/z",
			"as=42 /bin/tool read /srv/key", "as=43 /bin/tool write /srv/own", "read=48 /srv/own", "write=48 /srv/secret/a",
			"rename=41 /srv/secret/d /srv/secret/e", "write=49 /tmp/" + longName[:254],
		},
	}
}

func TestCompileFilesRefuses(t *testing.T) {
	for want, f := range map[string]spec.GuardFile{
		`files[0] "/a": set deny, allow, fim or bait`:              {Path: "/a"},
		`files[0].deny "x": want r, w or rw`:                       {Path: "/a", Deny: "x"},
		`files[0].allow "": by says`:                               {Path: "/a", Deny: "w", By: []string{"/b"}},
		`files[0].by "": want at least one program`:                {Path: "/a", Allow: "r", By: []string{}},
		`files[0].by[0] "b": want an absolute path`:                {Path: "/a", Allow: "r", By: []string{"b"}},
		`files[0].bait "/a": bait is for nobody`:                   {Path: "/a", Bait: true, Allow: "r"},
		`files[0].path "/a/": write it as "/a"`:                    {Path: "/a/", FIM: true},
		`files[0].severity "loud": want info, warning or critical`: {Path: "/a", Deny: "w", Severity: "loud"},
	} {
		g := node.Guard{Generation: 1, Policies: []node.NamedGuardPolicy{{Name: "p", Spec: spec.GuardPolicy{Files: []spec.GuardFile{f}}}}}
		if _, err := Compile(g, CompileFacts{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v; want %s", f, err, want)
		}
	}
}

func TestCompileFiles(t *testing.T) {
	c := compileForTest(t, 1, spec.GuardPolicy{OnFailure: "open", Files: []spec.GuardFile{
		{Path: "/bait", Bait: true},
		{Path: "/only", By: []string{"/b", "/a"}, Allow: "r"},
		{Path: "/also", By: []string{"/a", "/b"}, Allow: "r", Audit: true},
	}})
	files := parse(t, c.Blob).files
	for i, want := range []string{"3 0 0 80000010 /bait", "0 2 1 80000011 /only", "0 2 1 00000012 /also"} {
		if files[i] != want {
			t.Errorf("rule %d is %q, want %q", i, files[i], want)
		}
	}
	if r, _ := c.Rule(16); r.Severity != spec.SeverityCritical || r.Field != "files[0]" {
		t.Errorf("%+v; want bait to be critical, and its field", r)
	}
	if open := parse(t, c.Blob).sections[sectionOpen]; len(open) != 12 || open[4] != 16 || open[8] != 18 {
		t.Errorf("rules that may be put aside: %x; want 16 to 18", open)
	}
}

func TestRefusedPolicySaysWhy(t *testing.T) {
	c := compileForTest(t, 3, spec.GuardPolicy{Files: []spec.GuardFile{{Path: "/etc/passwd/x", Deny: "w"}}})
	reply := []byte{2, 3, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 16, 0, 0, 0, 2, byte(syscall.ENOTDIR), 0}
	a, err := c.Applied(reply)
	if !errors.Is(err, ErrRefused) || len(a.Lost) != 1 {
		t.Fatalf("%+v, %v; want a refusal", a, err)
	}
	for _, want := range []string{`policy "policy-0"`, "files[0]", "/etc/passwd/x", "not a directory"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want it to say %s", err, want)
		}
	}
	if _, err := c.Applied(append([]byte{2, 4}, reply[2:]...)); err == nil || errors.Is(err, ErrRefused) {
		t.Errorf("%v; want an answer about another generation to be none", err)
	}
}

// What cannot be held refuses the policy, and the one before it stays in force;
// unless the policy says that the rest shall be held.
func TestRuleThatCannotBeHeld(t *testing.T) {
	files := imageFiles()
	rules := []spec.GuardFile{{Path: "/srv/own", Deny: "w"}, {Path: "/etc/other/below", Deny: "w"}}
	before := compileForTest(t, 1, spec.GuardPolicy{Files: []spec.GuardFile{{Path: "/etc/app", Deny: "w"}}})
	closed, open := compileForTest(t, 2, spec.GuardPolicy{Files: rules}), compileForTest(t, 3, spec.GuardPolicy{Files: rules, OnFailure: "open"})
	files[".before"], files[".closed"], files[".open"] = before.Blob, closed.Blob, open.Blob
	o := boot(t, true, files, "policy .before", "policy .closed", "run write=1 /etc/app/1", "run write=2 /srv/own", "policy .open", "run write=3 /etc/app/1", "run write=4 /srv/own", "status")
	for run, want := range map[string]string{"write=1": "exit 10 ", "write=2": "exit 0 ", "write=3": "exit 0 ", "write=4": "exit 10 "} {
		if got := o.ran[run]; !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s; want %s", run, got, want)
		}
	}
	if o.status[0].Generation != 3 {
		t.Errorf("generation %d is in force, want 3", o.status[0].Generation)
	}
}
