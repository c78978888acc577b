package tls13

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// peer is the other end in the hands of somebody who knows its keys.
type peer struct {
	t   testing.TB
	tcp *net.TCPConn
	c   *Conn
}

func (p *peer) raw(b ...byte) { p.tcp.Write(b) }

// record seals p as it is: its kind and padding last.
func (p *peer) record(inner ...byte) {
	b, err := p.c.out.seal(make([]byte, 0, 20<<10), inner[len(inner)-1], inner[:len(inner)-1])
	if err != nil {
		p.t.Error(err)
	}
	p.tcp.Write(b)
}

func TestAttacks(t *testing.T) {
	huge := append(bytes.Repeat([]byte{'x'}, maxPlain+1), kindData)
	for _, c := range []struct {
		name   string
		client bool // who is attacked
		do     func(*peer)
		want   string
		alert  uint8
	}{
		{"not encrypted", false, func(p *peer) { p.raw(kindHandshake, 3, 3, 0, 1, 0) }, "not encrypted", alertUnexpected},
		{"plain alert", false, func(p *peer) { p.raw(kindAlert, 3, 3, 0, 2, 1, 0) }, "not encrypted", alertUnexpected},
		{"change cipher spec", false, func(p *peer) { p.raw(20, 3, 3, 0, 1, 1) }, "not encrypted", alertUnexpected},
		{"empty", false, func(p *peer) { p.raw(kindData, 3, 3, 0, 0) }, "not the peer's", alertBadRecord},
		{"garbage", false, func(p *peer) { p.raw(append([]byte{kindData, 3, 3, 0, 40}, make([]byte, 40)...)...) }, "not the peer's", alertBadRecord},
		{"replayed", false, func(p *peer) { p.record('a', kindData); p.c.out.seq--; p.record('a', kindData) }, "not the peer's", alertBadRecord},
		{"reordered", false, func(p *peer) { p.c.out.seq++; p.record('a', kindData) }, "not the peer's", alertBadRecord},
		{"other header", false, func(p *peer) {
			b, _ := p.c.out.seal(make([]byte, 0, 100), kindData, []byte("a"))
			b[1]++
			p.raw(b...)
		}, "not the peer's", alertBadRecord},
		{"too long", false, func(p *peer) { p.raw(kindData, 3, 3, 0x41, 1) }, "16641 bytes", alertOverflow},
		{"too much text", false, func(p *peer) { p.record(huge...) }, "16385 bytes of text", alertOverflow},
		{"only padding", false, func(p *peer) { p.record(0, 0, 0) }, "no kind", alertUnexpected},
		{"unknown kind", false, func(p *peer) { p.record(1, 99) }, "kind 99", alertUnexpected},
		{"empties", false, func(p *peer) {
			for range maxUseless + 1 {
				p.record(kindData)
			}
		}, "without data", alertUnexpected},
		{"key updates", false, func(p *peer) {
			for range maxUseless + 1 {
				p.record(messageKeyUpdate, 0, 0, 1, 0, kindHandshake)
				p.c.out.update()
			}
		}, "without data", alertUnexpected},
		{"tickets without end", true, func(p *peer) {
			for range maxUseless + 1 {
				p.record(messageTicket, 0, 0, 1, 0, kindHandshake)
			}
		}, "without data", alertUnexpected},
		{"ticket for a server", false, func(p *peer) { p.record(messageTicket, 0, 0, 1, 0, kindHandshake) }, "handshake message 4", alertUnexpected},
		{"certificate request", true, func(p *peer) { p.record(13, 0, 0, 1, 0, kindHandshake) }, "handshake message 13", alertUnexpected},
		{"client hello", false, func(p *peer) { p.record(1, 0, 0, 1, 0, kindHandshake) }, "handshake message 1", alertUnexpected},
		{"empty handshake", false, func(p *peer) { p.record(kindHandshake) }, "empty handshake", alertUnexpected},
		{"data within a message", false, func(p *peer) { p.record(messageKeyUpdate, 0, kindHandshake); p.record('a', kindData) }, "within a handshake message", alertUnexpected},
		{"data within a ticket", true, func(p *peer) { p.record(messageTicket, 0, 0, 9, 1, kindHandshake); p.record('a', kindData) }, "within a handshake message", alertUnexpected},
		{"key update of kind 2", false, func(p *peer) { p.record(messageKeyUpdate, 0, 0, 1, 2, kindHandshake) }, "kind 2", alertIllegal},
		{"long key update", false, func(p *peer) { p.record(messageKeyUpdate, 0, 0, 2, 0, 0, kindHandshake) }, "key update of 2 bytes", alertDecode},
		{"old key", false, func(p *peer) { p.record(messageKeyUpdate, 0, 0, 1, 0, kindHandshake); p.record('a', kindData) }, "not the peer's", alertBadRecord},
		{"behind a key update", false, func(p *peer) { p.record(messageKeyUpdate, 0, 0, 1, 0, messageKeyUpdate, kindHandshake) }, "behind a key update", alertUnexpected},
		{"long alert", false, func(p *peer) { p.record(1, 0, 0, kindAlert) }, "alert of 3 bytes", alertDecode},
		{"sequence numbers end", false, func(p *peer) { p.c.in.seq = 1 }, "", 0}, // placed below
		{"cut off", false, func(p *peer) { p.tcp.CloseWrite() }, "not said that it ends", 0},
		{"cut off in a record", false, func(p *peer) { p.raw(kindData, 3, 3, 0, 40, 1); p.tcp.CloseWrite() }, "not said that it ends", 0},
		{"alert", false, func(p *peer) { p.record(2, 40, kindAlert) }, "remote error: tls: handshake failure", 0},
		{"warning", false, func(p *peer) { p.record(1, 40, kindAlert) }, "remote error: tls: handshake failure", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.want == "" {
				spent(t)
				return
			}
			a, b := sockets(t)
			hostile := &peer{t, a, made(t, a, tls.TLS_AES_128_GCM_SHA256, 's', 'c', !c.client)}
			victim := made(t, b, tls.TLS_AES_128_GCM_SHA256, 'c', 's', c.client)
			hostile.record('!', kindData)
			c.do(hostile)
			got, err := io.ReadAll(victim)
			if err == nil || !strings.Contains(err.Error(), c.want) || len(got) == 0 || got[0] != '!' {
				t.Errorf("read %d bytes, %v; want %q", len(got), err, c.want)
			}
			if _, again := victim.Read(make([]byte, 1)); again != err {
				t.Errorf("read again: %v", again)
			}
			if errors.Is(err, io.EOF) {
				t.Error("it looks like an orderly end")
			}
			if c.alert == 0 {
				return
			}
			if _, err := victim.Write([]byte("x")); err == nil {
				t.Error("a failed connection writes on")
			}
			_, err = hostile.c.Read(make([]byte, 1))
			var alert tls.AlertError
			if !errors.As(err, &alert) || uint8(alert) != c.alert {
				t.Errorf("the peer learns %v, want alert %d", err, c.alert)
			}
		})
	}
}

// spent has no sequence numbers left, in either direction.
func spent(t *testing.T) {
	client, server := pair(t, tls.TLS_AES_256_GCM_SHA384)
	client.rekeyed, server.rekeyed = 1<<64-1, 1<<64-1
	client.out.seq, server.in.seq = 1<<64-2, 1<<64-2
	if _, err := client.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	client.rekeyed = 1<<64 - 1
	client.out.secret = func() []byte { return nil } // no way out by a key update
	if _, err := client.Write([]byte("b")); err == nil {
		t.Error("sealed a record with a number used before")
	}
	if _, err := server.in.seal(make([]byte, 0, 100), kindData, []byte("b")); !errors.Is(err, errSpent) {
		t.Errorf("opened a record without a number: %v", err)
	}
}

// What is unusual but allowed: padding, empty records, tickets and messages in
// pieces, a close that says it is the user's.
func TestAllowed(t *testing.T) {
	a, b := sockets(t)
	server := &peer{t, a, made(t, a, tls.TLS_AES_128_GCM_SHA256, 's', 'c', false)}
	client := made(t, b, tls.TLS_AES_128_GCM_SHA256, 'c', 's', true)
	server.record('a', kindData, 0, 0, 0)
	server.record(kindData)
	ticket := append([]byte{messageTicket, 0, 3, 0}, make([]byte, 3<<8)...)
	for len(ticket) > 0 {
		n := min(len(ticket), 100)
		server.record(append(ticket[:n:n], kindHandshake)...)
		ticket = ticket[n:]
	}
	server.record(messageTicket, 0, 0, 1, 7, messageTicket, 0, 0, kindHandshake)
	server.record(1, 8, messageKeyUpdate, 0, 0, kindHandshake)
	server.record(1, 1, kindHandshake)
	server.c.out.update()
	server.record('b', kindData)
	server.record(1, alertUserCancel, kindAlert)
	server.record(1, alertCloseNotify, kindAlert)
	server.raw(1, 2, 3) // behind the end: nobody's
	if got, err := io.ReadAll(client); err != nil || string(got) != "ab" {
		t.Fatalf("%q, %v", got, err)
	}
	// The update that was asked for goes before the next data.
	client.Write([]byte("c"))
	if n, err := server.c.Read(make([]byte, 9)); err != nil || n != 1 || server.c.in.seq != 1 {
		t.Errorf("%d bytes, %v, %d records of this key", n, err, server.c.in.seq)
	}
}

// Bytes may come in any pieces.
func TestPieces(t *testing.T) {
	a, b := sockets(t)
	sender := made(t, a, tls.TLS_AES_128_GCM_SHA256, 's', 'c', true)
	receiver := made(t, b, tls.TLS_AES_128_GCM_SHA256, 'c', 's', false)
	sender.Freeze()
	want := bytes.Repeat([]byte("0123456789"), 2000)
	sender.Write(want)
	sender.CloseWrite()
	a.SetDeadline(time.Time{}) // that it froze by
	go func() {
		for _, one := range sender.wire.State().Unsent {
			if _, err := a.Write([]byte{one}); err != nil {
				t.Error(err)
				return
			}
		}
		a.CloseWrite()
	}()
	if got, err := io.ReadAll(receiver); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestResumeRefuses(t *testing.T) {
	client, _ := pair(t, tls.TLS_AES_128_GCM_SHA256)
	good := func() *state { return client.State().out() }
	if _, err := Resume(client.wire, State{}, true); err == nil {
		t.Error("the zero state is taken")
	}
	if _, err := Resume(client.wire, client.State(), false); err == nil {
		t.Error("the other end's state is taken")
	}
	for name, spoil := range map[string]func(*state){
		"suite":       func(s *state) { s.Suite = tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 },
		"secret":      func(s *state) { s.Read.Secret = s.Read.Secret[1:] },
		"raw":         func(s *state) { s.Raw = make([]byte, largeBuffer+1) },
		"plain":       func(s *state) { s.Plain = make([]byte, maxPlain+1) },
		"message":     func(s *state) { s.Message = make([]byte, 5) },
		"skip":        func(s *state) { s.Skip = -1 },
		"owed":        func(s *state) { s.Owed = 3 },
		"certificate": func(s *state) { s.Peer = [][]byte{{1}} },
		"chain":       func(s *state) { s.Peer = make([][]byte, maxPeers+1) },
	} {
		s := good()
		spoil(s)
		if _, err := Resume(client.wire, State{func() *state { return s }}, true); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	s := good()
	s.Fault = "it broke before"
	c, err := Resume(client.wire, State{func() *state { return s }}, true)
	if err != nil {
		t.Fatal(err)
	}
	_, err1 := c.Read(make([]byte, 1))
	_, err2 := c.Write(make([]byte, 1))
	if err1 == nil || err2 == nil {
		t.Errorf("a failed connection goes on: %v %v", err1, err2)
	}
}

var _ net.Conn = (*Conn)(nil)
