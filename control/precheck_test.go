package control

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/control/rollout"
	"hauberk.dev/image"
)

func TestPreCheckNamesFieldValueAndFix(t *testing.T) {
	unknown := func(string, string) *image.Index { return nil }
	n := rollout.Name{Namespace: "bank", Name: "web"}
	for name, c := range map[string]struct {
		p     spec.GuardPolicy
		words []string
	}{
		"sound":         {spec.GuardPolicy{Files: []spec.GuardFile{{Path: "/etc", Deny: "w"}}}, nil},
		"path":          {spec.GuardPolicy{Files: []spec.GuardFile{{Path: "/etc/../x", Deny: "w"}}}, []string{`"web"`, "files[0].path", `"/etc/../x"`, `write it as "/x"`}},
		"every fault":   {spec.GuardPolicy{Files: []spec.GuardFile{{Path: "a", Deny: "w"}, {Path: "/b*", Deny: "w"}}}, []string{"files[0].path", "files[1].path"}},
		"many":          {spec.GuardPolicy{Net: &spec.GuardNet{Egress: cidrs(10000)}}, []string{"10000", "name ranges rather than addresses"}},
		"unknown words": {spec.GuardPolicy{Sys: &spec.GuardSys{Deny: []spec.GuardOperation{"teleport"}}}, []string{"sys.deny[0]", `"teleport"`}},
	} {
		t.Run(name, func(t *testing.T) {
			err := bank().preCheck(n, spec.ClusterGuardPolicy{GuardPolicy: c.p}, unknown)
			if (err != nil) != (len(c.words) > 0) {
				t.Fatalf("%v", err)
			}
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("it does not say %s: %v", w, err)
				}
			}
		})
	}
}

func cidrs(n int) (out []spec.GuardEgress) {
	for i := range n {
		out = append(out, spec.GuardEgress{CIDR: fmt.Sprintf("10.%d.%d.0/24", i/250, i%250)})
	}
	return out
}

// TestPortsThatNobodyCouldReach are found, but not where a policy only reports.
func TestPortsThatNobodyCouldReach(t *testing.T) {
	wl := bank().workloads[key{"bank", "web"}]
	in := func(ports ...int32) *spec.GuardNet {
		return &spec.GuardNet{Ingress: []spec.GuardIngress{{Protocol: "tcp", Ports: ports}}}
	}
	if errs := ports(wl, in(8080, 1)); len(errs) != 0 {
		t.Error(errs)
	}
	if errs := ports(wl, in(9)); len(errs) != 1 || !strings.Contains(errs[0].Error(), "add {ports: [8080]}") {
		t.Error(errs)
	}
	udp := in(8080)
	udp.Ingress[0].Protocol = "udp"
	if errs := ports(wl, udp); len(errs) != 1 {
		t.Error(errs)
	}
	w := bank()
	if err := w.starts(key{"bank", "web"}, wl, "web", spec.GuardPolicy{Mode: "audit", Net: in(9)}, nil); err != nil {
		t.Errorf("a policy that only reports is refused: %v", err)
	}
	if err := w.starts(key{"bank", "web"}, wl, "web", spec.GuardPolicy{Net: in(9)}, func(string, string) *image.Index { return nil }); err == nil || !strings.Contains(err.Error(), "keep workload bank/web from starting") {
		t.Errorf("%v", err)
	}
}

// shelf is an image in memory.
type shelf map[string][]byte

func (s shelf) Open(_ context.Context, digest string) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(s[digest])), nil
}

func (s shelf) put(b []byte) string {
	sum := sha256.Sum256(b)
	d := "sha256:" + hex.EncodeToString(sum[:])
	s[d] = b
	return d
}

// anImage starts /bin/app, a script for /bin/sh, which is /bin/busybox, with the
// name of a file.
func anImage(t *testing.T) *image.Index {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, f := range []struct{ name, link, text string }{
		{"bin/busybox", "", "ELF"}, {"bin/sh", "busybox", ""}, {"bin/app", "", "#!/bin/sh\n"}, {"etc/app.conf", "", "x"},
	} {
		h := &tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.text)), Typeflag: tar.TypeReg}
		if f.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		}
		err := w.WriteHeader(h)
		if _, werr := io.WriteString(w, f.text); err != nil || werr != nil {
			t.Fatal(err, werr)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	type m = map[string]any
	encode := func(v any) []byte {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	s := shelf{}
	diff := s.put(layer.Bytes())
	conf := encode(m{"os": "linux", "architecture": runtime.GOARCH, "rootfs": m{"type": "layers", "diff_ids": []string{diff}},
		"config": m{"Entrypoint": []string{"app"}, "Cmd": []string{"--config=/etc/app.conf"}}})
	manifest := encode(m{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": m{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": s.put(conf), "size": len(conf)},
		"layers": []m{{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": diff, "size": layer.Len()}}})
	x, err := image.ReadIndex(t.Context(), s, s.put(manifest), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// TestPoliciesThatWouldKillTheStart looks at what the image starts.
func TestPoliciesThatWouldKillTheStart(t *testing.T) {
	x := anImage(t)
	sum := sha256.Sum256([]byte("ELF"))
	digest := hex.EncodeToString(sum[:])
	for name, c := range map[string]struct {
		exec  spec.GuardExec
		files []spec.GuardFile
		wl    spec.Workload
		want  []string
	}{
		"sound":              {exec: spec.GuardExec{Deny: []string{"/bin/curl"}, Allow: []spec.GuardProgram{{Path: "/bin/app"}, {Path: "/bin/sh"}}}, files: []spec.GuardFile{{Path: "/etc", Deny: "w"}}},
		"denied":             {exec: spec.GuardExec{Deny: []string{"/bin/app"}}, want: []string{"exec.deny[0]", "/bin/app"}},
		"interpreter denied": {exec: spec.GuardExec{Deny: []string{"/x", "sha256:" + digest}}, want: []string{"exec.deny[1]", "/bin/busybox"}},
		"not allowed":        {exec: spec.GuardExec{Allow: []spec.GuardProgram{{Path: "/bin/app"}}}, want: []string{"exec.allow", "/bin/busybox", "add {path: /bin/busybox}"}},
		"allowed by digest":  {exec: spec.GuardExec{Allow: []spec.GuardProgram{{Path: "/bin/app"}, {SHA256: digest}}}},
		"only reported":      {exec: spec.GuardExec{Audit: true, Deny: []string{"/bin/app"}}},
		"inline": {exec: spec.GuardExec{Scripts: &spec.GuardScripts{Interpreters: []string{"/bin/sh"}, Inline: "deny"}},
			wl: spec.Workload{Command: []string{"/bin/sh", "-c", "exit"}}, want: []string{"exec.scripts.inline", "-c"}},
		"settings":          {files: []spec.GuardFile{{Path: "/etc", Deny: "rw"}}, want: []string{"files[0].path", "/etc/app.conf", "/etc/resolv.conf"}},
		"deeper decides":    {files: []spec.GuardFile{{Path: "/etc", Deny: "w"}, {Path: "/etc/app.conf", Deny: "r"}}, want: []string{"files[1].path"}},
		"by the program":    {files: []spec.GuardFile{{Path: "/etc/app.conf", By: []string{"/bin/app"}, Allow: "r"}}},
		"by another":        {files: []spec.GuardFile{{Path: "/etc/app.conf", By: []string{"/bin/sh"}, Allow: "r"}}, want: []string{"files[0].path"}},
		"bait":              {files: []spec.GuardFile{{Path: "/etc/app.conf", Bait: true}}, want: []string{"files[0].path"}},
		"no such program":   {wl: spec.Workload{Command: []string{"/nowhere"}}, exec: spec.GuardExec{Allow: []spec.GuardProgram{{Path: "/x"}}}},
		"nothing to start":  {wl: spec.Workload{Args: []string{}}},
		"reported of files": {files: []spec.GuardFile{{Path: "/etc", Deny: "rw", Audit: true}}},
	} {
		t.Run(name, func(t *testing.T) {
			got := errors.Join(append(programs(x, c.wl, &c.exec), settings(x, c.wl, c.files)...)...)
			if (got != nil) != (len(c.want) > 0) {
				t.Fatal(got)
			}
			for _, w := range c.want {
				if !strings.Contains(got.Error(), w) {
					t.Errorf("it does not say %q: %v", w, got)
				}
			}
		})
	}
}

// TestNodeIsToldOnlyWhatHasANumber: a content that changed since the last
// numbering does not go out under the old number.
func TestNodeIsToldOnlyWhatHasANumber(t *testing.T) {
	w := bank()
	k := key{"bank", "web-1"}
	i := w.instances[k]
	i.guard = 7
	w.instances[k] = i
	w.given = map[key]wire.Guard{k: {Generation: 7, Policies: []wire.NamedGuardPolicy{{Name: "as numbered"}}}}
	if g := w.desired("n1").Instances[0].Guard; g.Generation != 7 || len(g.Policies) != 1 || g.Policies[0].Name != "as numbered" {
		t.Errorf("told %+v", g)
	}
}
