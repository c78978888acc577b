package tls13

import (
	"crypto/tls"
	"io"
	"net"
	"strconv"
	"testing"
)

// Neither reading nor writing allocates.
func TestAllocations(t *testing.T) {
	if raced {
		t.Skip("the race detector makes sync.Pool forget")
	}
	for _, id := range suites {
		client, server := pair(t, id)
		for _, n := range []int{100, maxPlain, 2 * maxPlain} {
			out, in := make([]byte, n), make([]byte, n)
			if got := testing.AllocsPerRun(100, func() {
				if _, err := client.Write(out); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(server, in); err != nil {
					t.Fatal(err)
				}
			}); got != 0 {
				t.Errorf("%s, %d bytes: %v allocations", tls.CipherSuiteName(id), n, got)
			}
		}
	}
}

// BenchmarkEcho sends and receives the same over this layer and over crypto/tls.
func BenchmarkEcho(b *testing.B) {
	p := paper(b)
	for _, n := range []int{1 << 10, 16 << 10, 64 << 10} {
		b.Run("ours/"+strconv.Itoa(n), func(b *testing.B) {
			x, y := sockets(b)
			done := shakeBeside(b, Server, y, p.server())
			client := <-shakeBeside(b, Client, x, p.client())
			server := <-done
			if client.err != nil || server.err != nil {
				b.Fatal(client.err, server.err)
			}
			echo(b, client.c, server.c, n)
		})
		b.Run("crypto-tls/"+strconv.Itoa(n), func(b *testing.B) {
			x, y := sockets(b)
			client, server := tls.Client(x, p.client()), tls.Server(y, p.server())
			go server.Handshake()
			if err := client.Handshake(); err != nil {
				b.Fatal(err)
			}
			echo(b, client, server, n)
		})
	}
}

func echo(b *testing.B, client, server net.Conn, n int) {
	go func() {
		p := make([]byte, n)
		for {
			if _, err := io.ReadFull(server, p); err != nil {
				return
			}
			if _, err := server.Write(p); err != nil {
				return
			}
		}
	}()
	p := make([]byte, n)
	b.SetBytes(int64(2 * n))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := client.Write(p); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(client, p); err != nil {
			b.Fatal(err)
		}
	}
}
