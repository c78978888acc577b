// Package tls13 carries a TLS 1.3 connection on after its handshake, in a form
// that can be put down between any two bytes and taken up by another process.
//
// The handshake is crypto/tls's, with its certificates, verification and
// algorithms. Once it is done the record layer here takes over: keys from the
// secrets of the handshake, records, key updates, alerts. There is no other
// version, no resumption, no early data, no authentication later on.
//
// A connection that was not ended by the peer's close_notify ends with an error,
// never with io.EOF.
package tls13

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/wire"
)

const (
	// farewell is how long an alert waits for room to be sent in.
	farewell = time.Second
	// rekeyAfter is how many records a key seals: RFC 8446 5.5 allows AES-GCM
	// 2^24.5.
	rekeyAfter = 1 << 24
)

var errEnded = errors.New("write after the end of this half was sent")

// Conn is one end of a connection whose handshake is done. It is a net.Conn.
type Conn struct {
	wire   *wire.Conn
	client bool
	facts  tls.ConnectionState
	// owed is a key update to send before the next data: 0 for none, 1 for one
	// that answers the peer's, 2 for one that asks the peer for its own.
	owed atomic.Uint32

	reading sync.Mutex // held while something is read
	in      half
	raw     []byte // what has come: raw[at:end] is yet to be opened
	at, end int
	plain   []byte  // opened and not read yet; a part of raw before at
	message [5]byte // a handshake message that has not come whole
	partial int     // bytes of it
	skip    int     // bytes left of a message of no interest
	useless int     // records since the last that was of use
	readErr error   // how reading has ended
	rekeyed uint64  // records of one key; rekeyAfter but in tests

	writing  sync.Mutex // held while something is written
	out      half
	writeErr error // how writing has ended
	ended    bool  // close_notify is sent
}

// Server shakes hands with a client. The connection below stays the caller's if
// that fails. A key log of the configuration is not written, and no tickets
// are given out.
func Server(ctx context.Context, c *wire.Conn, cfg *tls.Config) (*Conn, error) {
	var s overheard
	return shake(ctx, c, tls.Server(&steps{Conn: c}, heard(cfg, &s)), &s, false)
}

// Client shakes hands with a server, as Server does with a client.
func Client(ctx context.Context, c *wire.Conn, cfg *tls.Config) (*Conn, error) {
	var s overheard
	return shake(ctx, c, tls.Client(&steps{Conn: c}, heard(cfg, &s)), &s, true)
}

func shake(ctx context.Context, below *wire.Conn, t *tls.Conn, s *overheard, client bool) (*Conn, error) {
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	cs := t.ConnectionState()
	c := &Conn{wire: below, client: client, rekeyed: rekeyAfter, facts: tls.ConnectionState{
		Version: cs.Version, HandshakeComplete: true, CipherSuite: cs.CipherSuite, CurveID: cs.CurveID,
		NegotiatedProtocol: cs.NegotiatedProtocol, ServerName: cs.ServerName, PeerCertificates: cs.PeerCertificates,
	}}
	read, write := s.client, s.server
	if client {
		read, write = write, read
	}
	err := c.key(read, write)
	clear(s.client)
	clear(s.server)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// key sets both directions' first keys.
func (c *Conn) key(read, write []byte) error {
	su, err := suiteOf(c.facts.CipherSuite)
	if err == nil {
		err = c.in.key(su, read)
	}
	if err == nil {
		err = c.out.key(su, write)
	}
	if err != nil {
		return fmt.Errorf("take over from the handshake: %w", err)
	}
	return nil
}

// ConnectionState is what the handshake has found out. Chains that were
// verified, and what keys could be exported from, are not kept.
func (c *Conn) ConnectionState() tls.ConnectionState { return c.facts }

// PeerCertificate is the peer's, nil if it has shown none.
func (c *Conn) PeerCertificate() *x509.Certificate {
	if len(c.facts.PeerCertificates) == 0 {
		return nil
	}
	return c.facts.PeerCertificates[0]
}

// NetConn is the connection below.
func (c *Conn) NetConn() net.Conn { return c.wire }

// Freeze stops the connection: see wire.Conn.
func (c *Conn) Freeze() { c.wire.Freeze() }

// String says between whom the connection is, and nothing it holds.
func (c *Conn) String() string {
	return fmt.Sprintf("tls13 %v %v", c.LocalAddr(), c.RemoteAddr())
}

// GoString is String.
func (c *Conn) GoString() string { return c.String() }

// Format is String, whatever the verb: a Conn holds secrets.
func (c *Conn) Format(f fmt.State, _ rune) { io.WriteString(f, c.String()) }

// LocalAddr is this end's address.
func (c *Conn) LocalAddr() net.Addr { return c.wire.LocalAddr() }

// RemoteAddr is the peer's address.
func (c *Conn) RemoteAddr() net.Addr { return c.wire.RemoteAddr() }

// SetDeadline bounds reads and writes. A write that runs out of time is the last.
func (c *Conn) SetDeadline(t time.Time) error { return c.wire.SetDeadline(t) }

// SetReadDeadline bounds reads.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.wire.SetReadDeadline(t) }

// SetWriteDeadline bounds writes.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.wire.SetWriteDeadline(t) }

// passes is a fault of the moment, not of the connection.
func passes(err error) bool {
	return errors.Is(err, wire.ErrFrozen) || errors.Is(err, os.ErrDeadlineExceeded)
}
