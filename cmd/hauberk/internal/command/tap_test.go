package command

import (
	"bytes"
	"strings"
	"testing"

	"hauberk.dev/api/mesh"
)

func TestTapFilters(t *testing.T) {
	r := &mesh.Request{Instance: "ledger-1", Peer: "spiffe://d/ns/bank/sa/web", Method: "GET", Path: "/accounts/7", Verdict: "denied", Rule: "ledger/deny[0]", Status: 403, Protocol: "http"}
	for text, want := range map[string]bool{"verdict=denied": true, "verdict=allowed": false, "status!=200": true, "status!=403": false, "path~accounts": true,
		"path~none": false, "peer~/sa/web": true, "rule=ledger/deny[0]": true, "method=GET status=403": true, "method=GET status=404": false, "": true} {
		f, err := parseFilters(strings.Fields(text))
		if err != nil {
			t.Fatal(err)
		}
		if f(r) != want {
			t.Errorf("%q: %v", text, !want)
		}
	}
	for _, text := range []string{"verdict", "size=1", "path!x", "=x"} {
		if _, err := parseFilters([]string{text}); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
	r.Path = "/\x1b[31m"
	var out bytes.Buffer
	if err := showRequest(&out, "text", r, nil); err != nil || strings.Contains(out.String(), "\x1b") || !strings.Contains(out.String(), "denied, 403") {
		t.Errorf("%q, %v", out.String(), err)
	}
}
