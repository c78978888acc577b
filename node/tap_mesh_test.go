package node

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// tcpFile is a listener on a free port of the loopback address, as a descriptor.
func tcpFile(t *testing.T) (*os.File, netip.AddrPort) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, ln.Addr().(*net.TCPAddr).AddrPort()
}

// TestTapThroughTheDoor has a person tap an instance at the node's door, and a
// request arrive at a real proxy.
func TestTapThroughTheDoor(t *testing.T) {
	guest := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "served") }))
	defer guest.Close()
	port := netip.MustParseAddrPort(guest.Listener.Addr().String()).Port()

	// A proxy, with one sandbox whose guest is this process.
	path := filepath.Join(t.TempDir(), "mesh.sock")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- mesh.New(mesh.Options{}).Run(ctx, ln) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	l, err := link.Dial(ctx, path, link.Handlers{
		Sign: func(context.Context, string, []byte) ([][]byte, []byte, error) {
			return nil, nil, errors.New("nobody signs here")
		},
		Event: func(api.Event) {},
		Sockets: func(_ string, n int) (all []*os.File, err error) {
			for range n {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return all, err
				}
				all = append(all, os.NewFile(uintptr(fd), "socket"))
			}
			return all, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tcp, _ := tcpFile(t)
	names, _ := tcpFile(t)
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	udp, err := packets.(*net.UDPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	packets.Close()
	defer udp.Close()
	here := netip.MustParseAddr("127.0.0.1")
	identity := "spiffe://test.local/ns/bank/sa/api"
	sandbox := plan.Sandbox{Instance: "api-1", Address: here, Identity: identity, Service: "api", Namespace: "bank"}
	door, public := tcpFile(t)
	if err := errors.Join(l.AddSandbox(ctx, sandbox, tcp, udp, names),
		l.SetPublish(ctx, []link.Published{{PublishedPort: api.PublishedPort{Namespace: "bank", Service: "api", Port: port}, Listener: door}}),
		l.SetPlan(ctx, plan.Mesh{Generation: 1, TrustDomain: "test.local", Sandboxes: []plan.Sandbox{sandbox},
			Services: []plan.Service{{Name: "api", Namespace: "bank", Address: netip.MustParseAddr("10.99.0.1"), Identity: identity,
				Ports: []plan.Port{{Port: port, Protocol: "http"}}, Allow: []plan.Rule{{Name: "open", From: []string{"anonymous"}}}}}})); err != nil {
		t.Fatal(err)
	}

	n := &Node{slog: slog.New(slog.DiscardHandler), actors: map[string]*actor{"api-1": {id: "api-1"}}}
	n.mesh = newMeshPart(n)
	n.mesh.link = l
	desk := httptest.NewServer(http.HandlerFunc(n.tap))
	defer desk.Close()
	if resp, err := http.Get(desk.URL + "/?instance=other"); err != nil || resp.StatusCode != http.StatusNotFound {
		t.Errorf("an instance of others: %v, %v", resp, err)
	} else {
		resp.Body.Close()
	}
	watching, leave := context.WithTimeout(ctx, time.Minute)
	defer leave()
	req, err := http.NewRequestWithContext(watching, http.MethodGet, desk.URL+"/?instance=api-1", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() // the first answer has been flushed: the proxy listens

	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get(fmt.Sprintf("http://%s/accounts?pin=1234", public))
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(answer.Body)
	answer.Body.Close()
	if string(body) != "served" {
		t.Fatalf("%d %s", answer.StatusCode, body)
	}
	lines := bufio.NewScanner(resp.Body)
	if !lines.Scan() {
		t.Fatalf("nothing was shown: %v", lines.Err())
	}
	var r api.Request
	if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if r.Instance != "api-1" || r.Service != "api.bank" || r.Peer != "anonymous" || r.Method != "GET" || r.Path != "/accounts" || r.Status != 200 || r.Rule != "open" || r.Verdict != "allowed" {
		t.Errorf("%s", lines.Bytes())
	}
}
