//go:build interop

package alone_test

import (
	"bufio"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestPeers has sofa-rpc-node answer calls that come as JSON.
func TestPeers(t *testing.T) {
	dir := os.Getenv("HAUBERK_PEERS")
	if dir == "" {
		t.Fatal("HAUBERK_PEERS names no directory of peers; go run ./test/interop/rpc makes one")
	}
	port := freePort(t)
	_, number, _ := strings.Cut(port, ":")
	server := exec.Command("node", filepath.Join(dir, "peer.js"), "serve", "bolt", number)
	server.Stderr = os.Stderr
	said, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer server.Wait()
	defer server.Process.Kill()
	late := time.AfterFunc(time.Minute, func() { server.Process.Kill() })
	defer late.Stop()
	if line, err := bufio.NewReader(said).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the server says %q, %v", line, err)
	}
	a, address := told(t), freePort(t)
	status, answer := a.put("version: 1\nadmin: a\nlisteners: [{name: web, address: '" + address + `'}]
upstreams: [{name: s, protocol: bolt, endpoints: [{address: '` + port + `'}]}]
hosts:
- names: ["*"]
  routes:
  - upstream: s
    transcode:
      bolt:
        service: com.test.S:1.0
        methods: [{name: plus, args: [int, int]}, {name: long, args: [java.lang.String]}, {name: echo, args: [com.test.Order]}, {name: fail, args: [java.lang.String]}]
        classes:
          com.test.Order: [{name: id, type: long}, {name: text, type: java.lang.String}, {name: parts, type: java.util.List}, {name: at, type: java.util.Date}]
`)
	if status != 200 {
		t.Fatalf("%d %v", status, answer)
	}
	long := strings.Repeat("ü𝄞x", 20000)
	passed := 0
	calls := []struct {
		method, body string
		status       int
		want         string
	}{
		{"plus", "[1, 2]", 200, "3"},
		{"plus", "[-100000, 2000000000]", 200, "1999900000"},
		{"long", `["` + long + `"]`, 200, `"` + long + long + `"`},
		{"echo", `[{"id": 5000000000, "text": "ü", "parts": [1, "x", null, true, {"a": 1.5}], "at": "2026-01-02T03:04:05.678Z"}]`, 200,
			`{"id":5000000000,"text":"ü","parts":[1,"x",null,true,{"a":1.5}],"at":"2026-01-02T03:04:05.678Z"}`},
		{"fail", `["no"]`, 500, "no"},
		{"plus", `["1", 2]`, 400, "want a whole number"},
	}
	for _, c := range calls {
		r, err := http.Post("http://"+address+"/x/"+c.method, "application/json", strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r.Body)
		r.Body.Close()
		ok := err == nil && r.StatusCode == c.status
		if c.status == 200 {
			ok = ok && json.Valid(b) && string(b) == c.want
		} else {
			ok = ok && strings.Contains(string(b), c.want)
		}
		if !ok {
			t.Errorf("%s %.80s: %d %.300s, %v, want %d %.300s", c.method, c.body, r.StatusCode, b, err, c.status, c.want)
			continue
		}
		passed++
	}
	t.Logf("JSON to SOFARPC by sofa-rpc-node: %d of %d", passed, len(calls))
}
