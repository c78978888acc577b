package shim

import (
	"strings"
	"testing"
)

func TestCompilePolicy(t *testing.T) {
	baseline, err := compilePolicy(nil)
	if err != nil || len(baseline.Blob) == 0 {
		t.Fatal(err)
	}
	open, err := compilePolicy(map[string]string{policyAnnotation: `{"generation":0,"policies":[{"name":"open","spec":{"exec":{"origin":"any"}}}]}`})
	if err != nil || open.Digest == baseline.Digest || open.Generation != 2 {
		t.Errorf("%+v, %v", open, err)
	}
	for raw, want := range map[string]string{
		`{"policies":[]}`: "no policy",
		`{"policies":[{"name":"x","spec":{"exec":{"origin":"moon"}}}]}`:                      "moon",
		`{"policies":[{"name":"x","spec":{}}],"more":1}`:                                     "more",
		`{"policies":[{"name":"x","spec":{"net":{"egress":[{"cidr":"everywhere"}]}}}]}`:      "everywhere",
		`{"policies":[{"name":"` + strings.Repeat("x", maxPolicy) + `","spec":{}}],"m": {}}`: "bytes",
	} {
		if _, err := compilePolicy(map[string]string{policyAnnotation: raw}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: %v, want something about %q", raw, err, want)
		}
	}
}

func TestFenceAnnotation(t *testing.T) {
	for v, want := range map[string]bool{"": false, "on": false, "off": true} {
		if got, err := unfenced(map[string]string{fenceAnnotation: v}); got != want || err != nil {
			t.Errorf("%q: %v, %v", v, got, err)
		}
	}
	if _, err := unfenced(map[string]string{fenceAnnotation: "Off"}); err == nil {
		t.Error("a word that is neither is taken")
	}
}
