package attest_test

import (
	"strings"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/attest"
)

func TestJudge(t *testing.T) {
	h := func(c string) string { return strings.Repeat(c, 64) }
	good := node.Measurement{Kernel: h("1"), Initrd: h("2"), CommandLine: h("3"), Agent: h("4"), Guard: h("5")}
	ref := attest.Exactly(good)
	if v := attest.Judge(good, ref); !v.OK || v.Level != attest.LevelNone || len(v.Claims) != 6 || v.Reason != "" || v.Claims[0].Matched != h("1") {
		t.Errorf("good: %+v", v)
	}
	ref.Kernels = append(ref.Kernels, h("9"))
	newer := good
	newer.Kernel = h("9")
	if v := attest.Judge(newer, ref); !v.OK || v.Claims[0].Matched != h("9") {
		t.Errorf("second accepted kernel: %+v", v)
	}
	for name, change := range map[string]func(*node.Measurement){
		"kernel":      func(m *node.Measurement) { m.Kernel = h("6") },
		"initrd":      func(m *node.Measurement) { m.Initrd = h("6") },
		"commandLine": func(m *node.Measurement) { m.CommandLine = h("6") },
		"agent":       func(m *node.Measurement) { m.Agent = h("6") },
		"guard":       func(m *node.Measurement) { m.Guard = "" },
		"Guard":       func(m *node.Measurement) { m.GuardOff = true },
	} {
		m := good
		change(&m)
		if v := attest.Judge(m, ref); v.OK || !strings.Contains(v.Reason, name) {
			t.Errorf("%s: %+v", name, v)
		}
	}
	if v := attest.Judge(good, attest.Reference{}); v.OK {
		t.Error("an empty reference accepts")
	}
	if v := attest.Judge(node.Measurement{}, attest.Exactly(node.Measurement{})); v.OK {
		t.Error("an unmeasured guest is accepted")
	}
}
