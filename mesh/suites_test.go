//go:build interop

package mesh

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hauberk.dev/plan"
)

// suites is a world and the programs of others.
type suites struct {
	*world
	dir   string // of the programs
	web   *box   // who calls
	shop  *box   // who is called
	other *box   // whose guest is a server of somebody else's mesh
}

// TestSuites: test/interop/suites builds what it needs and runs it.
func TestSuites(t *testing.T) {
	dir := os.Getenv("HAUBERK_PEERS")
	if dir == "" {
		t.Fatal("HAUBERK_PEERS names no directory of peers; go run ./test/interop/suites makes one")
	}
	w := newWorld(t)
	s := &suites{world: w, dir: dir, web: w.add("web", nil, nil, nil)}
	s.shop = w.add("shop", []plan.Port{{Port: 8080, Protocol: "http"}, {Port: 9090, Protocol: "grpc"}, {Port: 20880, Protocol: "dubbo"}, {Port: 7000, Protocol: "tcp"}},
		anyone(), []plan.Rule{{Name: "shop/never", From: []string{"*"}, Ports: []uint16{20880}, Methods: []string{"Drop"}}, {Name: "shop/secret", From: []string{"*"}, Ports: []uint16{8080}, Paths: []string{"/secret"}}})
	s.other = w.add("other", tcpPort, anyone(), nil)
	w.apply()
	awaitIdentity(t, w, "shop-1")
	t.Run("grpc", s.grpc)
	t.Run("dubbo-go", s.dubboGo)
	t.Run("websocket", s.webSocket)
	t.Run("istio-client", s.istioClient)
	t.Run("istio-server", s.istioServer)
}

// start starts a program in a guest, or beside it if there is none, until the end
// of the test.
func (s *suites) start(t *testing.T, b *box, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, filepath.Join(s.dir, name), args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Dir = &out, &out, t.TempDir()
	run := cmd.Start
	if b != nil {
		run = func() error { return b.guest.Do(cmd.Start) }
	}
	if err := run(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %.4000s", name, &out)
		}
	})
}

// await waits until something listens.
func await(t *testing.T, dial func() (net.Conn, error)) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		c, err := dial()
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func (s *suites) awaitPort(t *testing.T, b *box, port int) {
	t.Helper()
	await(t, func() (net.Conn, error) { return b.dial("tcp4", fmt.Sprintf("%s:%d", b.Address, port)) })
}

// run runs a program of a peer in a guest to its end.
func (s *suites) run(t *testing.T, b *box, name string, args ...string) (out []byte, err error) {
	return runIn(t, b, filepath.Join(s.dir, name), args...)
}

// cases counts what a program says of its cases.
func cases(t *testing.T, out []byte, err error, want int) {
	t.Helper()
	good := 0
	for line := range strings.Lines(string(out)) {
		switch {
		case strings.HasPrefix(line, "ok "):
			good++
		case strings.HasPrefix(line, "FAIL "):
			t.Error(strings.TrimSpace(line))
		}
	}
	t.Logf("%d cases passed of %d", good, want)
	if err != nil || good != want {
		t.Errorf("%v: %.3000s", err, out)
	}
}

// grpcCases are all of gRPC's interop client that need no credentials of Google's
// cloud and no name server.
var grpcCases = []string{"empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream", "timeout_on_sleeping_server",
	"cancel_after_begin", "cancel_after_first_response", "status_code_and_message", "special_status_message", "custom_metadata", "unimplemented_method",
	"unimplemented_service", "orca_per_rpc", "orca_oob", "rpc_soak", "channel_soak"}

func (s *suites) grpc(t *testing.T) {
	s.start(t, s.shop, "grpc-server", "-port", "9090")
	s.awaitPort(t, s.shop, 9090)
	good := 0
	for _, name := range grpcCases {
		out, err := s.run(t, s.web, "grpc-client", "-server_host", s.service("shop").Address.String(), "-server_port", "9090", "-test_case", name,
			"-service_config_json", `{"loadBalancingConfig":[{"test_backend_metrics_load_balancer":{}}]}`, // for the cases of ORCA
			"-soak_iterations", "100", "-soak_per_iteration_max_acceptable_latency_ms", "60000", "-soak_overall_timeout_seconds", "150")
		if err != nil {
			t.Errorf("%s: %v: %.2000s", name, err, out)
			continue
		}
		good++
	}
	t.Logf("%d cases passed of %d", good, len(grpcCases))
}

func (s *suites) dubboGo(t *testing.T) {
	s.start(t, s.shop, "dubbogo", "serve")
	s.awaitPort(t, s.shop, 20880)
	out, err := s.run(t, s.web, "dubbogo", "call", s.service("shop").Address.String()+":20880")
	cases(t, out, err, 7)
}

func (s *suites) webSocket(t *testing.T) {
	s.start(t, s.shop, "websocket", "serve", s.shop.Address.String()+":8080")
	s.awaitPort(t, s.shop, 8080)
	out, err := s.run(t, s.web, "websocket", "call", s.service("shop").Address.String()+":8080")
	cases(t, out, err, 10)
}

// credentials writes an identity where a program can read it.
func (s *suites) credentials(t *testing.T, workload string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	cred := s.ca.credential(t, spiffe(workload), time.Hour)
	key, err := x509.MarshalPKCS8PrivateKey(cred.Certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"key.pem":   pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		"cert.pem":  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cred.Certificate.Certificate[0]}),
		"roots.pem": s.ca.roots(),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// istioClient has Istio's client of HBONE call our gateway.
func (s *suites) istioClient(t *testing.T) {
	go serveEcho(s.shop.listen(t, 7000))
	out, err := s.run(t, nil, "hbone", "call", s.gateway.String(), s.credentials(t, "web"), serverName(s.shop.Address), s.shop.Address.String()+":7000")
	cases(t, out, err, 4)
}

// istioServer has our proxy call Istio's server of HBONE, which shows the identity
// the plan says, as it would call the gateway of another node.
func (s *suites) istioServer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gateway := addrPort(ln.Addr())
	ln.Close()
	// Istio's server dials what it is asked for: it lives where that is.
	echo, err := net.Listen("tcp", "127.0.0.1:9000")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go serveEcho(echo)
	s.start(t, nil, "hbone", "serve", gateway.String(), s.credentials(t, "other"))
	await(t, func() (net.Conn, error) { return net.Dial("tcp", gateway.String()) })
	s.service("other").Endpoints = []plan.Endpoint{{Instance: "istio-1", Address: netip.MustParseAddr("127.0.0.1"), Gateway: gateway}}
	s.plan.Generation++
	s.apply()
	for _, size := range []int{1, 1000, 1 << 20} {
		if err := s.web.call(s.service("other").Address.String()+":9000", strings.Repeat("x", size)); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}
