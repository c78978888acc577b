package tls13

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"

	"hauberk.dev/mesh/wire"
)

// steps hands the handshake no byte behind the record it reads, so nothing that
// comes after the handshake is left in it.
type steps struct {
	*wire.Conn
	head [headerLen]byte
	have int // bytes of the header that have come
	left int // bytes of the record behind it
}

func (s *steps) Read(p []byte) (int, error) {
	if s.left > 0 {
		n, err := s.Conn.Read(p[:min(len(p), s.left)])
		s.left -= n
		return n, err
	}
	n, err := s.Conn.Read(p[:min(len(p), headerLen-s.have)])
	copy(s.head[s.have:], p[:n])
	if s.have += n; s.have == headerLen {
		s.have, s.left = 0, int(s.head[3])<<8|int(s.head[4])
	}
	return n, err
}

// overheard is what crypto/tls tells its key log: the only way it gives out the
// secrets of a connection.
type overheard struct{ client, server []byte }

var errKeyLog = errors.New("the handshake tells its secrets in an unknown form")

// Write takes one line: a label, the client's random, a secret.
func (s *overheard) Write(line []byte) (int, error) {
	part := bytes.Fields(line)
	if len(part) != 3 {
		return 0, errKeyLog
	}
	var secret *[]byte
	switch string(part[0]) {
	case "CLIENT_TRAFFIC_SECRET_0":
		secret = &s.client
	case "SERVER_TRAFFIC_SECRET_0":
		secret = &s.server
	default:
		return len(line), nil
	}
	b := make([]byte, hex.DecodedLen(len(part[2])))
	if _, err := hex.Decode(b, part[2]); err != nil {
		return 0, errKeyLog
	}
	*secret = b
	return len(line), nil
}

// heard is the configuration with s for its key log, TLS 1.3 alone, and nothing
// that lets a connection be resumed.
func heard(cfg *tls.Config, s *overheard) *tls.Config {
	own := cfg.Clone()
	own.KeyLogWriter = s
	own.MinVersion, own.MaxVersion = tls.VersionTLS13, tls.VersionTLS13
	own.SessionTicketsDisabled, own.ClientSessionCache = true, nil
	if choose := cfg.GetConfigForClient; choose != nil {
		own.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			chosen, err := choose(hello)
			if err != nil || chosen == nil {
				return nil, err
			}
			return heard(chosen, s), nil
		}
	}
	return own
}
