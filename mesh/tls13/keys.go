package tls13

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"math"

	"golang.org/x/crypto/chacha20poly1305"
)

// suite is a cipher suite of RFC 8446 B.4.
type suite struct {
	key  int // bytes
	hash func() hash.Hash
	aead func(key []byte) (cipher.AEAD, error)
}

func suiteOf(id uint16) (*suite, error) {
	switch id {
	case tls.TLS_AES_128_GCM_SHA256:
		return &suite{16, sha256.New, gcm}, nil
	case tls.TLS_AES_256_GCM_SHA384:
		return &suite{32, sha512.New384, gcm}, nil
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		return &suite{chacha20poly1305.KeySize, sha256.New, chacha20poly1305.New}, nil
	}
	return nil, fmt.Errorf("cipher suite %#04x is not one of TLS 1.3", id)
}

func gcm(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// expand is HKDF-Expand-Label of RFC 8446 7.1 with an empty context.
func (s *suite) expand(secret []byte, label string, n int) ([]byte, error) {
	const prefix = "tls13 "
	b := binary.BigEndian.AppendUint16(nil, uint16(n))
	b = append(b, byte(len(prefix)+len(label)))
	b = append(append(b, prefix...), label...)
	return hkdf.Expand(s.hash, secret, string(append(b, 0)), n)
}

// half is one direction: its secret, and the key of the moment.
type half struct {
	suite  *suite
	secret func() []byte // what prints a struct prints an address
	aead   cipher.AEAD
	iv     [nonceLen]byte
	nonce  [nonceLen]byte // of the record in hand; here, as the AEAD's interface makes it escape
	seq    uint64         // of the next record
}

var errSecret = errors.New("a traffic secret is not as long as its hash")

var errSpent = errors.New("no sequence numbers are left")

// key starts with a secret, which is copied.
func (h *half) key(s *suite, secret []byte) error {
	if len(secret) != s.hash().Size() {
		return errSecret
	}
	own := append([]byte(nil), secret...)
	h.suite, h.secret = s, func() []byte { return own }
	return h.derive()
}

// derive makes key and IV of the secret: RFC 8446 7.3.
func (h *half) derive() error {
	key, err := h.suite.expand(h.secret(), "key", h.suite.key)
	if err != nil {
		return err
	}
	iv, err := h.suite.expand(h.secret(), "iv", nonceLen)
	if err != nil {
		return err
	}
	h.aead, err = h.suite.aead(key)
	copy(h.iv[:], iv)
	h.seq = 0
	clear(key)
	return err
}

// update goes on to the next secret: RFC 8446 7.2.
func (h *half) update() error {
	next, err := h.suite.expand(h.secret(), "traffic upd", len(h.secret()))
	if err != nil {
		return err
	}
	copy(h.secret(), next)
	clear(next)
	return h.derive()
}

// count sets the nonce of the next record and counts it.
func (h *half) count() error {
	if h.seq == math.MaxUint64 {
		return errSpent
	}
	h.nonce = h.iv
	tail := h.nonce[nonceLen-8:]
	binary.BigEndian.PutUint64(tail, binary.BigEndian.Uint64(tail)^h.seq)
	h.seq++
	return nil
}
