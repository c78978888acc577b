package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// asker is a client on one connection.
type asker struct {
	net.Conn
	in *bufio.Reader
}

func dialAsker(t *testing.T, address string) *asker {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return &asker{c, bufio.NewReader(c)}
}

func (a *asker) send(path string) { fmt.Fprintf(a, "GET %s HTTP/1.1\r\nHost: h\r\n\r\n", path) }

func (a *asker) status() (int, error) {
	resp, err := http.ReadResponse(a.in, nil)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

func (a *asker) ask(path string) (int, error) {
	a.send(path)
	return a.status()
}

// TestDescriptorsRunOut: without a descriptor left, who is connected is served on,
// what needs another is refused in HTTP's words, who knocks waits, and all is well
// once some are free.
func TestDescriptorsRunOut(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("taking descriptors from another process needs root")
	}
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "up") }))
	defer up.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	path := filepath.Join(t.TempDir(), "proxy.yaml")
	text := "version: 1\nlisteners: [{name: web, address: '" + address + "'}]\nhosts:\n- names: ['*']\n  routes:\n" +
		"  - {path: /own, respond: {status: 200, body: own}}\n  - {prefix: /, upstream: up}\n" +
		"upstreams: [{name: up, outlier: {ejection: 10ms}, endpoints: [{address: '" + strings.TrimPrefix(up.URL, "http://") + "'}]}]\n"
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	c := program("--allow-root", "-c", path)
	var out bytes.Buffer
	c.Stderr = &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	t.Cleanup(func() {
		c.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("%v: %s", err, &out)
			}
		case <-time.After(time.Minute):
			c.Process.Kill()
			t.Errorf("the proxy does not end: %s", &out)
		}
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if probe, err := net.Dial("tcp", address); err == nil {
			probe.Close()
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	first := dialAsker(t, address)
	if status, err := first.ask("/own"); status != 200 {
		t.Fatal(status, err)
	}
	leaveDescriptors(t, c.Process.Pid, 8)

	all := make([]*asker, 40)
	for i := range all {
		all[i] = dialAsker(t, address)
		all[i].send("/own")
	}
	served := 0 // as many as there are descriptors, in the order they came
	for ; served < len(all); served++ {
		all[served].SetReadDeadline(time.Now().Add(4 * time.Second))
		if status, err := all[served].status(); err != nil {
			break
		} else if status != 200 {
			t.Fatalf("connection %d: %d", served, status)
		}
	}
	if served == 0 || served > 10 { // one or two may have been closing when they were counted
		t.Errorf("%d connections served with 8 descriptors", served)
	}
	if status, err := first.ask("/own"); status != 200 {
		t.Errorf("who was there before: %d, %v", status, err)
	}
	if status, err := first.ask("/far"); status != 502 && status != 503 {
		t.Errorf("what needs a descriptor: %d, %v", status, err)
	}
	if status, err := first.ask("/own"); status != 200 {
		t.Errorf("after that: %d, %v", status, err)
	}
	// Each that goes makes room for one that waits.
	for i, a := range all {
		a.SetReadDeadline(time.Now().Add(time.Minute))
		if i >= served {
			if status, err := a.status(); status != 200 {
				t.Fatalf("connection %d, which has waited: %d, %v", i, status, err)
			}
		}
		a.Close()
	}
	status := 0
	for deadline := time.Now().Add(time.Minute); status != 200 && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if status, err = first.ask("/far"); err != nil {
			t.Fatal(err)
		}
	}
	if status != 200 {
		t.Errorf("with descriptors again: %d", status)
	}
}

// leaveDescriptors lets a process open so many more files.
func leaveDescriptors(t *testing.T, pid, more int) {
	t.Helper()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	highest := 0
	for _, f := range open {
		var n int
		fmt.Sscan(f.Name(), &n)
		highest = max(highest, n)
	}
	// The limit is on numbers, of which the lowest free one is taken.
	limit := uint64(highest + 1 + more - (highest + 1 - len(open)))
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: limit}, nil); err != nil {
		t.Fatal(err)
	}
}
