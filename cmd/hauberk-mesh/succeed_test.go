package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"
)

// TestSucceedAlone upgrades the proxy that is told by a file as a supervisor does: it
// starts the same command again, and is told when that serves. One whose configuration
// is wrong changes nothing.
func TestSucceedAlone(t *testing.T) {
	dir, err := os.MkdirTemp("", "hm")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	file, door, notify := filepath.Join(dir, "proxy.yaml"), filepath.Join(dir, "next"), filepath.Join(dir, "notify")
	const text = "version: 1\nlisteners: [{name: web, address: '127.0.0.1:0'}]\nhosts: [{names: ['*'], routes: [{respond: {status: 200, body: %s}}]}]\n"
	write := func(what string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(what), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(fmt.Sprintf(text, "one"))
	supervisor, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer supervisor.Close()
	t.Setenv("NOTIFY_SOCKET", notify)
	toldOf := func() int {
		t.Helper()
		b := make([]byte, 1<<10)
		supervisor.SetReadDeadline(time.Now().Add(60 * time.Second))
		n, err := supervisor.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		ready, main := 0, 0
		if _, err := fmt.Sscanf(string(b[:n]), "READY=%d\nMAINPID=%d\n", &ready, &main); err != nil || ready != 1 || main <= 1 {
			t.Fatalf("%q, %v", b[:n], err)
		}
		return main
	}
	start := func() *running {
		return launch(t, "--allow-root", "-c", file, "--handover", door, "--take-over", door)
	}
	first := start()
	if pid := toldOf(); pid != first.Process.Pid {
		t.Fatalf("process %d, want %d", pid, first.Process.Pid)
	}
	var at []string
	waitFor(t, "address", first, func() bool {
		at = regexp.MustCompile(`listener=web address=(\S+)`).FindStringSubmatch(first.text())
		return at != nil
	})
	kept, err := net.Dial("tcp", at[1])
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	ask := func() string {
		t.Helper()
		kept.SetDeadline(time.Now().Add(60 * time.Second))
		io.WriteString(kept, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(kept), nil)
		if err != nil {
			t.Fatal(err, first.text())
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.Close {
			t.Errorf("%v, close %v", err, resp.Close)
		}
		return string(b)
	}
	if got := ask(); got != "one" {
		t.Errorf("%q", got)
	}
	write("version: 9\n")
	wrong := start()
	waitFor(t, "end of the process with a wrong configuration", wrong, wrong.hasEnded)
	if got := ask(); got != "one" || wrong.err == nil {
		t.Errorf("%q, %v", got, wrong.err)
	}
	last := first
	for _, what := range []string{"two", "three"} {
		write(fmt.Sprintf(text, what))
		next := start()
		if pid := toldOf(); pid != next.Process.Pid {
			t.Fatalf("process %d, want %d", pid, next.Process.Pid)
		}
		waitFor(t, "end of the process before", last, last.hasEnded)
		if last.err != nil {
			t.Errorf("%v\n%s", last.err, last.text())
		}
		if got := ask(); got != what {
			t.Errorf("%q, want %q", got, what)
		}
		last = next
	}
	last.Process.Signal(syscall.SIGTERM)
	waitFor(t, "end", last, last.hasEnded)
	if last.err != nil {
		t.Errorf("%v\n%s", last.err, last.text())
	}
}
