package tls13

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"hauberk.dev/mesh/wire"
)

const maxPeers = 16 // certificates in a peer's chain

// State is a connection put down: plain data, with the secrets of both
// directions. It shows them to nobody who prints it; JSON, for the process that
// takes over, is the one way out.
type State struct{ words func() *state } // what prints a struct prints an address

// state in the words of the hand-over.
type state struct {
	Client bool   `json:"client,omitempty"`
	Suite  uint16 `json:"suite"`
	Read   way    `json:"read"`
	Write  way    `json:"write"`
	// Raw has come and is not opened, Plain is opened and not read.
	Raw     []byte `json:"raw,omitempty"`
	Plain   []byte `json:"plain,omitempty"`
	Message []byte `json:"message,omitempty"`
	Skip    int    `json:"skip,omitempty"`
	Useless int    `json:"useless,omitempty"`
	Owed    uint32 `json:"owed,omitempty"`
	// PeerEnded: its close_notify has come; Ended: ours is written; Fault: the
	// connection has failed.
	PeerEnded bool   `json:"peerEnded,omitempty"`
	Ended     bool   `json:"ended,omitempty"`
	Fault     string `json:"fault,omitempty"`

	Curve      uint16   `json:"curve,omitempty"`
	Protocol   string   `json:"protocol,omitempty"`
	ServerName string   `json:"serverName,omitempty"`
	Peer       [][]byte `json:"peer,omitempty"` // certificates, DER, the peer's own first
}

type way struct {
	Secret []byte `json:"secret"`
	Seq    uint64 `json:"seq"`
}

const hidden = "[state of a TLS connection]"

// String hides what the state holds.
func (State) String() string { return hidden }

// GoString hides what the state holds.
func (State) GoString() string { return hidden }

// Format hides what the state holds, whatever the verb.
func (State) Format(f fmt.State, _ rune) { io.WriteString(f, hidden) }

// LogValue hides what the state holds.
func (State) LogValue() slog.Value { return slog.StringValue(hidden) }

// MarshalJSON gives out everything, secrets too: for the process that takes over.
func (s State) MarshalJSON() ([]byte, error) { return json.Marshal(s.out()) }

// UnmarshalJSON reads a state back.
func (s *State) UnmarshalJSON(b []byte) error {
	own := &state{}
	s.words = func() *state { return own }
	return json.Unmarshal(b, own)
}

// out is what the state holds, nil for the zero State.
func (s State) out() *state {
	if s.words == nil {
		return nil
	}
	return s.words()
}

// Forget overwrites the secrets.
func (s State) Forget() {
	if own := s.out(); own != nil {
		clear(own.Read.Secret)
		clear(own.Write.Secret)
	}
}

// State is the connection once it is frozen and nobody uses it any more; that
// of the connection below is its own.
func (c *Conn) State() State {
	c.reading.Lock()
	defer c.reading.Unlock()
	c.writing.Lock()
	defer c.writing.Unlock()
	s := &state{
		Client: c.client, Suite: c.facts.CipherSuite,
		Read:  way{append([]byte(nil), c.in.secret()...), c.in.seq},
		Write: way{append([]byte(nil), c.out.secret()...), c.out.seq},
		Raw:   append([]byte(nil), c.raw[c.at:c.end]...), Plain: append([]byte(nil), c.plain...),
		Message: append([]byte(nil), c.message[:c.partial]...), Skip: c.skip, Useless: c.useless, Owed: c.owed.Load(),
		PeerEnded: c.readErr == io.EOF, Ended: c.ended,
		Curve: uint16(c.facts.CurveID), Protocol: c.facts.NegotiatedProtocol, ServerName: c.facts.ServerName,
	}
	switch {
	case c.readErr != nil && c.readErr != io.EOF:
		s.Fault = c.readErr.Error()
	case c.writeErr != nil:
		s.Fault = c.writeErr.Error()
	}
	for _, p := range c.facts.PeerCertificates {
		s.Peer = append(s.Peer, p.Raw)
	}
	return State{func() *state { return s }}
}

// Resume makes a connection of its state and the connection below, which goes
// on when that one thaws.
func Resume(below *wire.Conn, from State, client bool) (*Conn, error) {
	s := from.out()
	if s == nil {
		return nil, errors.New("resume TLS connection: no state")
	}
	if err := s.check(client); err != nil {
		return nil, fmt.Errorf("resume TLS connection: %w", err)
	}
	c := &Conn{wire: below, client: client, rekeyed: rekeyAfter, facts: tls.ConnectionState{
		Version: tls.VersionTLS13, HandshakeComplete: true, CipherSuite: s.Suite, CurveID: tls.CurveID(s.Curve),
		NegotiatedProtocol: s.Protocol, ServerName: s.ServerName,
	}}
	for _, der := range s.Peer {
		p, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("resume TLS connection: certificate of the peer: %w", err)
		}
		c.facts.PeerCertificates = append(c.facts.PeerCertificates, p)
	}
	if err := c.key(s.Read.Secret, s.Write.Secret); err != nil {
		return nil, fmt.Errorf("resume TLS connection: %w", err)
	}
	c.in.seq, c.out.seq = s.Read.Seq, s.Write.Seq
	if len(s.Raw) > 0 {
		c.raw = make([]byte, largeBuffer)
		c.end = copy(c.raw, s.Raw)
	}
	c.plain = append(c.plain, s.Plain...)
	c.partial = copy(c.message[:], s.Message)
	c.skip, c.useless, c.ended = s.Skip, s.Useless, s.Ended
	c.owed.Store(s.Owed)
	if s.PeerEnded {
		c.readErr = io.EOF
	}
	if s.Fault != "" {
		c.writeErr = errors.New(s.Fault)
		if c.readErr == nil {
			c.readErr = c.writeErr
		}
	}
	return c, nil
}

func (s *state) check(client bool) error {
	switch {
	case s.Client != client:
		return errors.New("it is the other end's")
	case len(s.Raw) > largeBuffer || len(s.Plain) > maxPlain:
		return fmt.Errorf("%d bytes of records and %d of text, at most %d and %d can be", len(s.Raw), len(s.Plain), largeBuffer, maxPlain)
	case len(s.Message) > 4 || s.Skip < 0 || s.Skip > maxMessage || s.Useless < 0 || s.Useless > maxUseless || s.Owed > 2:
		return errors.New("a count is out of its bounds")
	case len(s.Peer) > maxPeers:
		return fmt.Errorf("%d certificates, at most %d are taken", len(s.Peer), maxPeers)
	}
	return nil
}
