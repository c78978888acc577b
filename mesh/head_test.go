package mesh

import (
	"bufio"
	"io"
	"net/http"
	"testing"

	"hauberk.dev/plan"
)

// TestHeadRefused: an answer to HEAD has no body, the proxy's own neither: the
// client would read it as the answer to what it asks next.
func TestHeadRefused(t *testing.T) {
	_, web := requireWorld(t, []plan.Rule{{Name: "ok", From: []string{"*"}, Paths: []string{"/ok"}}}, nil, func(*plan.Service) {})
	c := web.mustDial(t, "10.99.0.2:8080")
	defer c.Close()
	io.WriteString(c, "HEAD /no HTTP/1.1\r\nHost: a\r\n\r\n"+get("/ok"))
	c.CloseWrite()
	r := bufio.NewReader(c)
	if resp, err := http.ReadResponse(r, &http.Request{Method: "HEAD"}); err != nil || resp.StatusCode != 403 || resp.ContentLength < 1 {
		t.Fatalf("refused HEAD: %+v, %v", resp, err)
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("what was asked next: %+v, %v", resp, err)
	}
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "served" {
		t.Errorf("%q, %v", b, err)
	}
	if rest, _ := io.ReadAll(r); len(rest) > 0 {
		t.Errorf("%q after the last answer", rest)
	}
}
