//go:build interop

package mesh

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hauberk.dev/plan"
)

// TestPeers: a client and a server of sofa-rpc-node, in guests, over SOFABolt
// in both versions and over Dubbo. test/interop/rpc runs it.
func TestPeers(t *testing.T) {
	dir := os.Getenv("HAUBERK_PEERS")
	if dir == "" {
		t.Fatal("HAUBERK_PEERS names no directory of peers; go run ./test/interop/rpc makes one")
	}
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	ledger := w.add("ledger", []plan.Port{{Port: 12200, Protocol: "bolt"}, {Port: 12201, Protocol: "bolt"}, {Port: 20880, Protocol: "dubbo"}},
		[]plan.Rule{{Name: "ledger/use", From: []string{spiffe("web")}, Services: []string{"com.test.S:1.0"}, Methods: []string{"plus", "long"}},
			{Name: "ledger/hello", From: []string{spiffe("web")}, Methods: []string{"hello"}}}, nil)
	w.service("web").Callbacks = []plan.Rule{{Name: "web/back", From: []string{spiffe("ledger")}, Services: []string{"com.test.Back:1.0"}, Methods: []string{"plus"}}}
	w.apply()
	for _, c := range []struct{ protocol, port string }{{"bolt", "12200"}, {"bolt2", "12201"}, {"dubbo", "20880"}} {
		t.Run(c.protocol, func(t *testing.T) {
			served, stop := startPeer(t, ledger, dir, "serve", c.protocol, c.port)
			line, err := served.ReadString('\n')
			if err != nil || line != "ready\n" {
				t.Fatalf("the server says %q, %v", line, err)
			}
			calls, _ := startPeer(t, web, dir, "call", c.protocol, "10.99.0.2:"+c.port)
			out, err := io.ReadAll(calls)
			if err != nil {
				t.Fatal(err)
			}
			checkCalls(t, out)
			stop()
			if rest, err := io.ReadAll(served); err != nil || len(rest) > 0 {
				t.Errorf("the server was asked for what is refused: %q, %v", rest, err)
			}
		})
		t.Run(c.protocol+" asks its client", func(t *testing.T) {
			asking, _ := startPeer(t, ledger, dir, "asks", c.protocol, c.port)
			if line, err := asking.ReadString('\n'); err != nil || line != "ready\n" {
				t.Fatalf("the server says %q, %v", line, err)
			}
			asked, _ := startPeer(t, web, dir, "asked", c.protocol, "10.99.0.2:"+c.port)
			for _, want := range []string{"told", "plus", "plus"} {
				if line, err := asked.ReadString('\n'); err != nil || line != want+"\n" {
					t.Fatalf("the client is asked %q, %v; want %q", line, err, want)
				}
			}
			got := map[string]int{}
			for range 3 {
				line, err := asking.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%s", line)
				if strings.Contains(line, `"drop","error":`) && strings.Contains(line, "no rule of web.bank allows callbacks of it") {
					line = "refused"
				}
				got[line]++
			}
			if got[`{"method":"plus","result":3}`+"\n"] != 1 || got[`{"method":"plus","result":5}`+"\n"] != 1 || got["refused"] != 1 {
				t.Errorf("%v", got)
			}
		})
	}
}

// startPeer starts a peer in a guest, to be ended with the test or before.
func startPeer(t *testing.T, b *box, dir string, args ...string) (*bufio.Reader, context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	cmd := exec.CommandContext(ctx, "node", append([]string{filepath.Join(dir, "peer.js")}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = b.guest.Do(cmd.Start)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); cmd.Wait() })
	return bufio.NewReader(out), cancel
}

// checkCalls compares what a client was told: sums, a long string, and refusals
// in the words of the mesh.
func checkCalls(t *testing.T, out []byte) {
	t.Helper()
	got := map[string]int{}
	for line := range bytes.Lines(out) {
		var r struct {
			Method, Error string
			Result        float64
		}
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		t.Logf("%s", bytes.TrimSpace(line))
		switch {
		case r.Method == "drop" && strings.Contains(r.Error, "access denied to "+spiffe("web")):
			got["refused"]++
		case r.Method == "plus" && r.Error == "":
			got["sum"] += int(r.Result)
		case r.Method == "long" && r.Result == 100_000:
			got["long"]++
		default:
			t.Errorf("%s", line)
		}
	}
	if got["refused"] != 2 || got["sum"] != 3+7+11 || got["long"] != 1 {
		t.Errorf("%v", got)
	}
}
