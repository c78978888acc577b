package evidence

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
)

// KeyID is the SHA-256 of a key's SubjectPublicKeyInfo, in hexadecimal.
type KeyID string

// Short is enough of the id for a person to recognise it.
func (id KeyID) Short() string {
	switch {
	case id == "":
		return "(unnamed)"
	case len(id) > 12:
		return fmt.Sprintf("%q", string(id[:12])+"…")
	}
	return fmt.Sprintf("%q", string(id))
}

// Key is a public key that is trusted to speak for a subject.
type Key struct {
	ID      KeyID
	Subject string // whose it is, for messages: "builder ci of application bank"
	public  crypto.PublicKey
}

func (k Key) String() string { return fmt.Sprintf("%s (%s)", k.ID.Short(), k.Subject) }

// Public returns the public key.
func (k Key) Public() crypto.PublicKey { return k.public }

// NewKey takes an ECDSA P-256 or Ed25519 public key.
func NewKey(public crypto.PublicKey, subject string) (Key, error) {
	switch p := public.(type) {
	case *ecdsa.PublicKey:
		if p.Curve != elliptic.P256() {
			return Key{}, fmt.Errorf("key of %s: curve %s, want P-256", subject, p.Params().Name)
		}
	case ed25519.PublicKey:
		if len(p) != ed25519.PublicKeySize {
			return Key{}, fmt.Errorf("key of %s: Ed25519 key of %d bytes", subject, len(p))
		}
	default:
		return Key{}, fmt.Errorf("key of %s: is a %T, want ECDSA P-256 or Ed25519", subject, public)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return Key{}, fmt.Errorf("key of %s: %w", subject, err)
	}
	sum := sha256.Sum256(der)
	return Key{ID: KeyID(hex.EncodeToString(sum[:])), Subject: subject, public: public}, nil
}

// ParseKey reads one PEM "PUBLIC KEY" block, as Application.accounts[].key has
// it.
func ParseKey(raw []byte, subject string) (Key, error) {
	if len(raw) > 4096 {
		return Key{}, fmt.Errorf("key of %s: is %d bytes, at most 4096 are allowed", subject, len(raw))
	}
	block, rest := pem.Decode(raw)
	if block == nil || block.Type != "PUBLIC KEY" {
		return Key{}, fmt.Errorf("key of %s: is not a PEM block of type PUBLIC KEY", subject)
	}
	if next, _ := pem.Decode(rest); next != nil {
		return Key{}, fmt.Errorf("key of %s: has more than one PEM block", subject)
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return Key{}, fmt.Errorf("key of %s: %w", subject, err)
	}
	return NewKey(public, subject)
}

// PEM is the form ParseKey reads.
func (k Key) PEM() []byte {
	der, err := x509.MarshalPKIXPublicKey(k.public)
	if err != nil { // NewKey marshalled it before
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func (k Key) verify(message, sig []byte) bool {
	switch p := k.public.(type) {
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(message)
		return ecdsa.VerifyASN1(p, sum[:], sig)
	case ed25519.PublicKey:
		return ed25519.Verify(p, message, sig)
	}
	return false // the zero Key trusts nobody
}

// Signer signs messages under one key.
type Signer interface {
	KeyID() KeyID
	Sign(message []byte) ([]byte, error)
}

// KeySigner is a Signer with its key in hand.
type KeySigner struct {
	key     Key
	private crypto.Signer
}

// NewSigner takes an ECDSA P-256 or Ed25519 private key.
func NewSigner(private crypto.Signer, subject string) (*KeySigner, error) {
	if private == nil {
		return nil, errors.New("signer: no private key")
	}
	key, err := NewKey(private.Public(), subject)
	if err != nil {
		return nil, err
	}
	return &KeySigner{key: key, private: private}, nil
}

// Key is the public half, with the signer's subject.
func (s *KeySigner) Key() Key { return s.key }

// KeyID names the key.
func (s *KeySigner) KeyID() KeyID { return s.key.ID }

// Sign signs SHA-256 of the message under ECDSA, the message under Ed25519.
func (s *KeySigner) Sign(message []byte) ([]byte, error) {
	if _, ok := s.key.public.(ed25519.PublicKey); ok {
		return s.private.Sign(rand.Reader, message, crypto.Hash(0))
	}
	sum := sha256.Sum256(message)
	return s.private.Sign(rand.Reader, sum[:], crypto.SHA256)
}
