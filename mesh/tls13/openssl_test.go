package tls13

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// console is an openssl program with its terminal.
type console struct {
	t    *testing.T
	cmd  *exec.Cmd
	keys io.WriteCloser

	mu   sync.Mutex
	text bytes.Buffer
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// await waits until something stands on the terminal so many times.
func (c *console) await(what string, times int) {
	c.t.Helper()
	for end := time.Now().Add(patience); strings.Count(c.String(), what) < times; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatalf("no %q from openssl:\n%s", what, c)
		}
	}
}

func openssl(t *testing.T, args ...string) *console {
	t.Helper()
	c := &console{t: t, cmd: exec.Command("openssl", args...)}
	c.cmd.Stdout, c.cmd.Stderr = c, c
	keys, err := c.cmd.StdinPipe()
	if err == nil {
		err = c.cmd.Start()
	}
	if err != nil {
		t.Fatalf("%v: scripts/setup installs it", err)
	}
	c.keys = keys
	t.Cleanup(func() {
		c.cmd.Process.Kill()
		c.cmd.Wait()
	})
	return c
}

// updates makes openssl update its keys, once asking for ours too and once not,
// with data between. The connection is moved to another home before each line.
// An s_client tells that it has read the key; an s_server sends its update at once.
func updates(t *testing.T, c *console, ours *Conn, tells bool) {
	t.Helper()
	said := bufio.NewReader(ours)
	say := func(text string) {
		t.Helper()
		if _, err := fmt.Fprintln(ours, text); err != nil {
			t.Fatal(err)
		}
		c.await(text+"\n", 1)
	}
	hear := func(text string) {
		t.Helper()
		fmt.Fprintln(c.keys, text)
		if got, err := said.ReadString('\n'); err != nil || strings.TrimSpace(got) != text {
			t.Fatalf("%q, %v; want %q\n%s", got, err, text, c)
		}
	}
	hear("one")
	say("ours-one")
	for i, key := range []string{"K", "k", "K", "K"} {
		before := string(ours.in.secret()) + string(ours.out.secret())
		fmt.Fprintln(c.keys, key)
		if tells {
			c.await("KEYUPDATE", i+1)
		} else {
			receiveUpdate(t, ours)
		}
		ours.Freeze()
		ours = moved(t, ours)
		said.Reset(ours)
		hear(fmt.Sprint("line", i))
		say(fmt.Sprint("ours", i))
		half := len(before) / 2
		if string(ours.in.secret()) == before[:half] {
			t.Errorf("%s: its key is the old one", key)
		}
		if asks := key == "K"; (string(ours.out.secret()) != before[half:]) != asks {
			t.Errorf("%s: our key was to change: %v", key, asks)
		}
	}
	// And ours, of itself.
	ours.rekeyed = ours.out.seq
	say("behind-our-update")
	hear("last")
	ours.Close()
}

// receiveUpdate reads until the peer's key is another.
func receiveUpdate(t *testing.T, c *Conn) {
	t.Helper()
	before := string(c.in.secret())
	for end := time.Now().Add(patience); string(c.in.secret()) == before; {
		c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end) {
			t.Fatalf("%d bytes, %v; want a key update", n, err)
		}
	}
	c.SetReadDeadline(time.Now().Add(patience))
}

func TestOpenSSLClient(t *testing.T) {
	p := paper(t)
	for _, id := range suites {
		t.Run(tls.CipherSuiteName(id), func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			c := openssl(t, "s_client", "-connect", ln.Addr().String(), "-tls1_3", "-ciphersuites", tls.CipherSuiteName(id),
				"-cert", p.crt, "-key", p.key_, "-CAfile", p.crt, "-verify_return_error", "-alpn", "h2")
			ln.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
			raw, err := ln.Accept()
			if err != nil {
				t.Fatal(err, c)
			}
			defer raw.Close()
			raw.SetDeadline(time.Now().Add(patience))
			m := <-shakeBeside(t, Server, raw.(*net.TCPConn), p.server())
			if m.err != nil {
				t.Fatal(m.err, c)
			}
			if got := m.c.ConnectionState(); got.CipherSuite != id || m.c.PeerCertificate() == nil {
				t.Fatalf("%+v", got)
			}
			c.await("Verify return code: 0", 1)
			updates(t, c, m.c, true)
		})
	}
}

func TestOpenSSLServer(t *testing.T) {
	p := paper(t)
	for _, id := range suites {
		t.Run(tls.CipherSuiteName(id), func(t *testing.T) {
			// It chooses its port and says which.
			c := openssl(t, "s_server", "-accept", "127.0.0.1:0", "-tls1_3", "-ciphersuites", tls.CipherSuiteName(id), "-naccept", "1",
				"-cert", p.crt, "-key", p.key_, "-CAfile", p.crt, "-Verify", "1", "-verify_return_error", "-alpn", "h2")
			c.await("ACCEPT 127.0.0.1:", 1)
			_, rest, _ := strings.Cut(c.String(), "ACCEPT ")
			address, _, _ := strings.Cut(rest, "\n")
			raw, err := net.Dial("tcp", strings.TrimSpace(address))
			if err != nil {
				t.Fatal(err, c)
			}
			defer raw.Close()
			raw.SetDeadline(time.Now().Add(patience))
			m := <-shakeBeside(t, Client, raw.(*net.TCPConn), p.client())
			if m.err != nil {
				t.Fatal(m.err, c)
			}
			if got := m.c.ConnectionState(); got.CipherSuite != id || m.c.PeerCertificate() == nil {
				t.Fatalf("%+v", got)
			}
			c.await("CIPHER is", 1)
			updates(t, c, m.c, false)
		})
	}
}
