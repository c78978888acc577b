package mesh

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// TestRefusalWaitsForARequest: an answer nobody asked for would be taken for
// the answer to the next request of the connection.
func TestRefusalWaitsForARequest(t *testing.T) {
	for name, ask := range map[string]func(net.Conn) error{
		"asks": func(c net.Conn) error {
			_, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: web\r\n\r\n")
			return err
		},
		"leaves": func(c net.Conn) error { return c.(*net.TCPConn).CloseWrite() },
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			client, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			server, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() { refuseHTTP(server.(*net.TCPConn), refusal{Reason: "nobody is there"}); close(done) }()
			client.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			if n, err := client.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("before it asked: %d bytes, %v", n, err)
			}
			if err := ask(client); err != nil {
				t.Fatal(err)
			}
			client.SetReadDeadline(time.Now().Add(10 * time.Second))
			got, _ := io.ReadAll(client) // a reset is as good as an end here
			if answered := bytes.HasPrefix(got, []byte("HTTP/1.1 503 ")); answered != (name == "asks") {
				t.Errorf("answered %q", got)
			}
			client.Close()
			<-done
		})
	}
}
