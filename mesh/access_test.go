package mesh

import (
	"encoding/binary"
	"testing"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/plan"
)

// TestRequestsReadInTwoWays: a rule that denies holds for a request that some
// server takes for what it denies, however the request is written.
func TestRequestsReadInTwoWays(t *testing.T) {
	const ledger = "bank.Ledger"
	for _, c := range []struct {
		protocol, method, path string
		deny                   plan.Rule
		allowed                bool
	}{
		{"grpc", "POST", "/bank.Ledger/Transfer", plan.Rule{Services: []string{ledger}, Methods: []string{"Transfer"}}, false},
		{"grpc", "POST", "/bank.Ledger/Transfer?x", plan.Rule{Services: []string{ledger}, Methods: []string{"Transfer"}}, false},
		{"grpc", "POST", "/bank.Ledger/%54ransfer", plan.Rule{Services: []string{ledger}, Methods: []string{"Transfer"}}, false},
		{"grpc", "POST", "/bank.Ledger/%54ransfer", plan.Rule{Services: []string{ledger}}, false},
		{"grpc", "POST", "/bank.Ledger/Read", plan.Rule{Services: []string{ledger}, Methods: []string{"Transfer"}}, true},
		{"grpc", "POST", "/bank.Ledger/Read", plan.Rule{Methods: []string{"Transfer"}}, true},
		{"http", "DELETE", "/x", plan.Rule{Methods: []string{"DELETE"}}, false},
		{"http", "delete", "/x", plan.Rule{Methods: []string{"DELETE"}}, false},
		{"http", "Delete", "/x", plan.Rule{Methods: []string{"delete"}}, false},
		{"http", "trace", "/x", plan.Rule{Methods: []string{"DELETE"}}, false},
		{"http", "connect", "/x", plan.Rule{Methods: []string{"DELETE"}}, false},
		{"http", "GET", "/x", plan.Rule{Methods: []string{"DELETE"}}, true},
	} {
		c.deny.Name, c.deny.From = "no", []string{"*"}
		d, err := newDirectory(plan.Mesh{Generation: 1, TrustDomain: domain, Services: []plan.Service{{Name: "s", Namespace: "bank", Identity: spiffe("s"),
			Ports: []plan.Port{{Port: 1, Protocol: c.protocol}}, Allow: anyone(), Deny: []plan.Rule{c.deny}}}})
		if err != nil {
			t.Fatal(err)
		}
		v, status := decideRequest(d.services["bank/s"], call{caller: spiffe("web"), port: 1}, &http1.Head{Method: c.method, Target: c.path})
		if v.allowed != c.allowed {
			t.Errorf("%s %s of %s, denied %+v: %+v, %d", c.method, c.path, c.protocol, c.deny, v, status)
		}
	}
}

// TestRPCPortsKeepApart: a server of Dubbo looks for its magic within what it
// cannot read, so a call hidden in a frame of dubbo-thrift does not pass there.
func TestRPCPortsKeepApart(t *testing.T) {
	service, hidden := "com.test.S", append([]byte("\n"), dubboCall(1, "s", "", "a")...)
	message := append([]byte("\x80\x01\x00\x01\x00\x00\x00\x01m\x00\x00\x00\x09\x0b\x00\x01"), binary.BigEndian.AppendUint32(nil, uint32(len(hidden)))...)
	message = append(append(message, hidden...), 0)
	head := 2 + 4 + 2 + 1 + 4 + len(service) + 8
	size := uint32(head + len(message))
	b := binary.BigEndian.AppendUint32(nil, size)
	b = binary.BigEndian.AppendUint32(append(b, 0xda, 0xbc), size)
	b = append(binary.BigEndian.AppendUint16(b, uint16(head)), 1)
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(service))), service...)
	b = append(binary.BigEndian.AppendUint64(b, 7), message...)
	for _, step := range []int{1, 7, 1 << 20} {
		if server, _, err := pass("dubbo", b, step); err == nil || len(server) > 0 {
			t.Errorf("dubbo-thrift to a server of Dubbo: %d bytes, %v", len(server), err)
		}
		if server, _, err := pass("dubbo-thrift", b, step); err != nil || string(server) != string(b) {
			t.Errorf("dubbo-thrift: %d bytes, %v", len(server), err)
		}
		if server, _, err := pass("dubbo-thrift", dubboCall(1, "s", "", "a"), step); err == nil || len(server) > 0 {
			t.Errorf("Dubbo to a server of dubbo-thrift: %d bytes, %v", len(server), err)
		}
	}
}
