package mesh

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// outOfFiles fails once.
type outOfFiles struct {
	net.Listener
	failed atomic.Bool
}

func (l *outOfFiles) Accept() (net.Conn, error) {
	if !l.failed.Swap(true) {
		return nil, &net.OpError{Op: "accept", Net: "unix", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

// TestAdminOutlivesFaults: metrics are told after an accept that failed, until all
// ends.
func TestAdminOutlivesFaults(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	failing := &outOfFiles{Listener: ln}
	go func() { done <- New(Options{}).ServeAdmin(ctx, failing) }()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
	if b, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 200") || !failing.failed.Load() {
		t.Errorf("%q, %v", b, err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
