package mesh

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

// TestRefusalWaitsForARequest: an answer nobody asked for would be taken for
// the answer to the next request of the connection.
func TestRefusalWaitsForARequest(t *testing.T) {
	for name, asks := range map[string]bool{"silent": false, "asking": true} {
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
			if asks {
				if _, err := io.WriteString(client, "GET / HTTP/1.1\r\nHost: web\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
			}
			client.SetReadDeadline(time.Now().Add(10 * time.Second))
			got, _ := io.ReadAll(client) // a reset is as good as an end here
			if answered := bytes.HasPrefix(got, []byte("HTTP/1.1 503 ")); answered != asks {
				t.Errorf("answered %q", got)
			}
			client.Close()
			<-done
		})
	}
}
