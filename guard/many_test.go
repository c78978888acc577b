package guard

import (
	"fmt"
	"strings"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// manyRules is a policy with n rules of each kind, of those for addresses at
// most 256.
func manyRules(n int) spec.GuardPolicy {
	p := spec.GuardPolicy{Exec: &spec.GuardExec{Origin: "any", AnonymousMemory: "allow", ShellOnSocket: "allow"}, Net: &spec.GuardNet{}}
	for i := range n {
		p.Files = append(p.Files, spec.GuardFile{Path: fmt.Sprint("/srv/many-", i), Deny: "w"})
		p.Exec.Deny = append(p.Exec.Deny, fmt.Sprint("/opt/many-", i))
		if i < 256 {
			p.Net.Egress = append(p.Net.Egress, spec.GuardEgress{CIDR: fmt.Sprintf("10.%d.%d.0/24", i/256, i%256), Ports: []int32{443}})
		}
	}
	return p
}

// crowdScenario is two policies of more than 512 rules each that hold at once.
func crowdScenario() scenario {
	const destinations = "only the listed destinations"
	first, second := manyRules(512), spec.GuardPolicy{Exec: &spec.GuardExec{Origin: "any", AnonymousMemory: "allow", ShellOnSocket: "allow", Deny: []string{"/bin/perl"}}, Net: &spec.GuardNet{}}
	first.Net.Egress = append(first.Net.Egress, spec.GuardEgress{CIDR: "192.0.2.0/24"})
	for i := range 512 {
		second.Files = append(second.Files, spec.GuardFile{Path: fmt.Sprint("/srv/secret/none-", i), Deny: "rw"})
	}
	second.Files = append(second.Files, spec.GuardFile{Path: "/srv/secret/b", Deny: "r"})
	second.Net.Egress = []spec.GuardEgress{{CIDR: "192.0.2.0/24", Ports: []int32{90}}, {CIDR: "198.51.100.0/24"}}
	return scenario{
		name: "crowd", policy: first, also: []spec.GuardPolicy{second},
		attacks: []attempt{
			{"write=80 /srv/many-0", "/srv/many-0 may not be changed", OpWrite, "P8"},
			{"write=81 /srv/many-511", "/srv/many-511 may not be changed", OpWrite, "P8"},
			{"write=82 /srv/secret/none-511", "/srv/secret/none-511 may be neither", OpWrite, "P8"},
			{"read=80 /srv/secret/b", "/srv/secret/b may not be read", OpRead, "P8"},
			{"exec=80 /bin/perl", "/bin/perl may not run", OpListed, "P2"},
			{"connect=80 192.0.2.1:91", destinations, OpEgress, "P7"},
			{"connect=81 198.51.100.7:90", destinations, OpEgress, "P7"},
		},
		benign: []string{"write=83 /srv/many-512", "read=81 /srv/secret/a", "exec=81 /bin/tool", "connect=82 192.0.2.1:90"},
	}
}

// Ten thousand rules are refused by name of the field and with the limit, or
// held.
func TestManyRules(t *testing.T) {
	policies := func(list ...spec.GuardPolicy) node.Guard {
		g := node.Guard{Generation: 1}
		for i, p := range list {
			g.Policies = append(g.Policies, node.NamedGuardPolicy{Name: fmt.Sprint("policy-", i), Spec: p})
		}
		return g
	}
	files, exec, net := spec.GuardPolicy{}, manyRules(0), spec.GuardPolicy{Net: &spec.GuardNet{}}
	for i := range 10_000 {
		files.Files = append(files.Files, spec.GuardFile{Path: fmt.Sprint("/srv/a-file-of-some-length/", i), Deny: "w"})
		exec.Exec.Deny = append(exec.Exec.Deny, fmt.Sprint("/opt/a-program-of-some-length/", i))
		net.Net.Egress = append(net.Net.Egress, spec.GuardEgress{CIDR: fmt.Sprintf("10.%d.%d.0/24", i/256, i%256)})
	}
	few := files
	few.Files = files.Files[:4000]
	several := []spec.GuardPolicy{manyRules(512), manyRules(512), manyRules(512), manyRules(512)}
	for _, tt := range []struct {
		name string
		g    node.Guard
		want []string // of the error; none: it is held
	}{
		{"10,000 files", policies(files), []string{"files: ", "at most 245760"}},
		{"10,000 programs", policies(exec), []string{"exec: ", "at most 245760"}},
		{"10,000 addresses", policies(net), []string{"net", "8192"}},
		{"4,000 files", policies(few), nil},
		{"four of 512", policies(several...), nil},
		{"sixteen of 512", policies(append(append(several, several...), append(several, several...)...)...), []string{"files: ", "at most 245760"}},
	} {
		c, err := Compile(tt.g, CompileFacts{})
		if len(tt.want) == 0 && err != nil {
			t.Errorf("%s: %v; want them held", tt.name, err)
		}
		if len(tt.want) > 0 && err == nil {
			t.Errorf("%s: %d bytes; want them refused", tt.name, len(c.Blob))
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %.200s; want it to say %q", tt.name, err, want)
			}
		}
	}
}
