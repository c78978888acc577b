package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestLogReaderEnds has nobody read the program's output any more: it goes on
// serving.
func TestLogReaderEnds(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	path := filepath.Join(t.TempDir(), "proxy.yaml")
	text := fmt.Sprintf("version: 1\naccess_log: {path: '-'}\nlisteners: [{name: web, address: '%s'}]\nhosts: [{names: ['*'], routes: [{respond: {status: 200, body: ok}}]}]\n", address)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	c := program("--allow-root", "-c", path)
	c.Stdout, c.Stderr = w, w
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	defer c.Process.Kill()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for n, deadline := 0, time.Now().Add(30*time.Second); n < 20; time.Sleep(50 * time.Millisecond) {
		resp, err := client.Get("http://" + address)
		if err == nil {
			resp.Body.Close()
			n++ // the log is written behind them
		}
		select {
		case err := <-ended:
			t.Fatalf("ended after %d requests: %v", n, err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d requests were served: %v", n, err)
		}
	}
	c.Process.Signal(syscall.SIGTERM)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
