package guard

import (
	"slices"
	"strings"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// netScenario is about who may be reached, and who may reach the workload.
func netScenario() scenario {
	const (
		listed = "only the listed destinations"
		names  = "names may only be asked of"
		peers  = "only the listed peers"
	)
	return scenario{
		name: "network",
		policy: spec.GuardPolicy{
			Net: &spec.GuardNet{
				Egress: []spec.GuardEgress{
					{CIDR: "192.0.2.0/24", Protocol: "tcp", Ports: []int32{80, 8080}},
					{CIDR: "192.0.2.0/24", Protocol: "udp", Ports: []int32{5354, 5355}},
					{CIDR: "2001:db8::/64", Ports: []int32{8080}},
				},
				Ingress: []spec.GuardIngress{
					{CIDR: "192.0.2.0/24", Protocol: "tcp", Ports: []int32{8080, 8090}},
					{CIDR: "2001:db8::/64", Ports: []int32{8080, 8090}},
					{Protocol: "udp", Ports: []int32{5354}},
					{CIDR: "192.0.2.0/24", Protocol: "udp", Ports: []int32{5355}},
				},
				DNS: &spec.GuardDNS{Servers: []string{"198.51.100.7"}},
			},
			Sys: &spec.GuardSys{Deny: []spec.GuardOperation{"rawsocket"}},
		},
		attacks: []attempt{
			{"udp=40 192.0.2.1:80", listed, OpEgress, "P7 T1048"},
			{"sendto=40 192.0.2.1:80", listed, OpEgress, "P7 T1048"},
			{"mptcp 192.0.2.1:8090", listed, OpEgress, "P7 T1095"},
			{"tcp6 [2001:db8::1]:8090", listed, OpEgress, "P7 T1048"},
			{"sourceroute 203.0.113.9 192.0.2.1:5354", listed, OpEgress, "P7 T1599"},
			{"uringconnect 203.0.113.9:99", listed, OpEgress, "B1 P7"},
			{"uringconnect=2 203.0.113.9:99 poll", listed, OpEgress, "B1 P7"},
			{"udp=41 192.0.2.1:53", names, OpEgress, "B19 T1071.004"},
			{"sendto=41 192.0.2.1:53", names, OpEgress, "B19 T1071.004"},
			{"udp=42 198.51.100.7:853", names, OpEgress, "B19 T1071.004"},
			{"udplite", "only TCP, UDP", OpRawSocket, "P7 T1095"},
			{"vsock", "the machine's own host", OpHost, "T1611"},
			{"dialfrom 198.51.100.7 192.0.2.1:8080", peers, OpIngress, "T1133"},
			{"udpfrom 198.51.100.7 192.0.2.1:5355", peers, OpIngress, "T1133"},
			{"listen 192.0.2.1:8081", peers, OpBind, "T1571"},
			{"listen=2 [2001:db8::1]:8081", peers, OpBind, "T1571"},
			{"listen=3 0.0.0.0:0", peers, OpBind, "T1571"},
			{"bindudp 192.0.2.1:5999", peers, OpBind, "T1571"},
		},
		benign: []string{
			"dialfrom=40 192.0.2.1 192.0.2.1:8080", "tcp6=40 [2001:db8::1]:8080", "udpfrom=40 192.0.2.1 192.0.2.1:5355",
			"answer 198.51.100.7 192.0.2.1:5354", "listen=40 127.0.0.1:9999", "bindudp=40 127.0.0.1:5998", "bindudp=41 192.0.2.1:0",
			"udp=43 198.51.100.7:53", "udp=44 127.0.0.1:53", "dialfrom=41 127.0.0.1 127.0.0.1:7000",
		},
	}
}

// Who listens and who is let in is on the record.
func TestRecordOfTheNetwork(t *testing.T) {
	open := compileForTest(t, 1, spec.GuardPolicy{})
	files := imageFiles()
	files[".open"] = open.Blob
	o := boot(t, true, files, "policy .open", "run dialfrom 198.51.100.7 192.0.2.1:8080")
	for op, want := range map[Op]string{OpListening: "listens at 192.0.2.1:8080", OpConnected: "connected to 192.0.2.1:8080", OpAccepted: "let 198.51.100.7:"} {
		if !slices.ContainsFunc(o.events["dialfrom"], func(e Event) bool {
			return e.Op == op && e.Verdict == Allowed && strings.Contains(e.String(), want)
		}) {
			t.Errorf("no record of %q in %v", want, o.events["dialfrom"])
		}
	}
}

func TestCompileNet(t *testing.T) {
	one := spec.GuardPolicy{Net: &spec.GuardNet{
		Egress:  []spec.GuardEgress{{CIDR: "10.0.0.0/8", Protocol: "tcp"}, {CIDR: "10.1.0.0/16", Ports: []int32{443}}},
		Ingress: []spec.GuardIngress{{CIDR: "10.0.0.0/8", Protocol: "udp", Ports: []int32{53}}},
		DNS:     &spec.GuardDNS{Servers: []string{"10.0.0.10", "::ffff:10.0.0.11", "fd00::1"}},
	}}
	two := spec.GuardPolicy{Net: &spec.GuardNet{Audit: true, Ingress: []spec.GuardIngress{{Ports: []int32{80}}}, DNS: &spec.GuardDNS{}}}
	c := compileForTest(t, 1, one, two)
	p := parse(t, c.Blob)
	// Lists: names of one, destinations of one, peers of one, names of two, peers of two.
	for key, want := range map[string][3]uint32{
		"10.0.0.0/8:0":       {1<<1 | 1 | 1<<3, 1 | 1<<3, 1 | 1<<3},
		"10.1.0.0/16:443":    {1 << 1, 1 << 1, 0},
		"10.0.0.10/32:53":    {3, 3, 0},
		"10.0.0.11/32:53":    {3, 3, 0},
		"fd00::1/128:53":     {3, 3, 0},
		"192.0.2.1/32:53":    {^uint32(3), ^uint32(3), 0},
		"from 10.0.0.0/8:53": {0, 1 << 2, 0},
		"from 0.0.0.0/0:80":  {1 << 4, 1 << 4, 0},
		"from ::/0:80":       {1 << 4, 1 << 4, 0},
		"from 127.0.0.0/8:0": {allLists, allLists, allLists},
		"at ::/128:53":       {0, 1 << 2, 0},
		"at ::/128:80":       {1 << 4, 1 << 4, 0},
		"127.0.0.0/8:853":    {allLists, allLists, allLists},
	} {
		if got := p.allowed[key]; got != want {
			t.Errorf("%s is on lists %b, want %b", key, got, want)
		}
	}
	if deny, audit, dns := p.rule(ingressDeny), p.rule(ingressAudit), p.rule(dnsLists); deny != 1<<2 || audit != 1<<4 || dns != 1|1<<3 {
		t.Errorf("lists %b, %b of peers and %b of names; want 100, 10000 and 1001", deny, audit, dns)
	}
	_, err := Compile(node.Guard{Generation: 1, Policies: []node.NamedGuardPolicy{{Name: "p", Spec: spec.GuardPolicy{Net: &spec.GuardNet{
		Egress:  []spec.GuardEgress{{CIDR: "10.0.0.0/8", Protocol: "icmp"}},
		Ingress: []spec.GuardIngress{{}, {CIDR: "10.0.0.1/8", Ports: []int32{1}}, {Ports: []int32{65536}}},
		DNS:     &spec.GuardDNS{Servers: []string{"dns", "fe80::1%eth0"}},
	}}}}}, CompileFacts{})
	for _, want := range []string{
		`net.egress[0].protocol "icmp"`, `net.ingress[0].ports "": name the ports`, `net.ingress[1].cidr "10.0.0.1/8": write it as 10.0.0.0/8`,
		`net.ingress[2].ports[0] "65536"`, `net.dns.servers[0] "dns"`, `net.dns.servers[1] "fe80::1%eth0"`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want it to say %s", err, want)
		}
	}
}
