package sandbox_test

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"hauberk.dev/sandbox"
)

// testNetwork has a sandbox go to one port of this machine, not to another, and
// serve on one of its own.
func (w *world) testNetwork(t *testing.T) {
	own := ownAddress(t)
	allowed, refused := greeter(t, own), greeter(t, own)
	b := w.start(t, sandbox.Options{Egress: []string{allowed}, Publish: []string{"0:80"},
		Args: []string{"busybox", "httpd", "-f", "-p", "80", "-h", "/etc"}})
	ask := func(to string) string {
		t.Helper()
		host, port, _ := net.SplitHostPort(to)
		out, _, _ := execIn(t, b, "", sandbox.Cmd{Args: []string{"sh", "-c", "cat /etc/resolv.conf; busybox nc -w5 " + host + " " + port}})
		return out
	}
	if got := ask(allowed); got != "nameserver 169.254.1.1\noutside" {
		t.Errorf("what is on the list says %q", got)
	}
	if got := ask(refused); strings.Contains(got, "outside") {
		t.Errorf("what is not on the list says %q", got)
	}
	i, err := b.Info(t.Context())
	if err != nil || len(i.Ports) != 1 {
		t.Fatalf("ports %q, %v", i.Ports, err)
	}
	at := strings.TrimSuffix(i.Ports[0], ":80")
	if got := page(t, at); !strings.Contains(got, "app:x:1000") {
		t.Errorf("the published port says %q", got)
	}
	if err := b.Remove(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", at); err == nil {
		c.Close()
		t.Error("the port is still published")
	}
}

// page fetches a file of the guest, which may not be listening yet.
func page(t *testing.T, at string) string {
	t.Helper()
	var got []byte
	for deadline := time.Now().Add(callTime); len(got) == 0 && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("tcp", at)
		if err != nil {
			continue
		}
		c.SetDeadline(time.Now().Add(callTime))
		fmt.Fprint(c, "GET /passwd HTTP/1.0\r\n\r\n")
		got, _ = io.ReadAll(c)
		c.Close()
	}
	return string(got)
}

// ownAddress is one of this machine that is not its loopback's: what is sent to
// it stays here.
func ownAddress(t *testing.T) string {
	t.Helper()
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	t.Skip("this machine has no address but its loopback's")
	return ""
}

// greeter says outside to whoever comes.
func greeter(t *testing.T, address string) string {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "outside")
			c.Close()
		}
	}()
	return l.Addr().String()
}
