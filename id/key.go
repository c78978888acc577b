package id

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"

	"hauberk.dev/internal/secretfile"
)

// LoadOrCreateKey reads the P-256 key at path, or makes one there with mode
// 0600. Of two processes that create at once, both return the same key.
func LoadOrCreateKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := LoadKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("create key %s: %w", path, err)
	}
	raw, err := MarshalKey(key)
	if err != nil {
		return nil, fmt.Errorf("create key %s: %w", path, err)
	}
	if err := secretfile.Create(path, raw); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return LoadKey(path)
}

// LoadKey reads the P-256 key at path and refuses a file that others could
// have read or replaced.
func LoadKey(path string) (*ecdsa.PrivateKey, error) {
	raw, err := secretfile.Read(path)
	if err != nil {
		return nil, fmt.Errorf("load key: %w", err)
	}
	key, err := ParseKey(raw)
	if err != nil {
		return nil, fmt.Errorf("load key %s: %w", path, err)
	}
	return key, nil
}

// MarshalKey is the PKCS #8 PEM form of a P-256 key.
func MarshalKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// ParseKey reads one PKCS #8 PEM block with a P-256 key.
func ParseKey(raw []byte) (*ecdsa.PrivateKey, error) {
	der, err := onlyBlock(raw, "PRIVATE KEY")
	if err != nil {
		return nil, fmt.Errorf("parse key: %w", err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("parse key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("parse key: is a %T, want ECDSA P-256", parsed)
	}
	return key, nil
}

// MarshalPublicKey is the PEM form of a public key.
func MarshalPublicKey(public crypto.PublicKey) ([]byte, error) {
	if err := CheckPublicKey(public); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("marshal public key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// ParsePublicKey reads one PEM block with an ECDSA P-256 or Ed25519 key.
func ParsePublicKey(raw []byte) (crypto.PublicKey, error) {
	der, err := onlyBlock(raw, "PUBLIC KEY")
	if err != nil {
		return nil, fmt.Errorf("parse public key: %w", err)
	}
	public, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("parse public key: %w", err)
	}
	return public, CheckPublicKey(public)
}

// CheckPublicKey refuses keys of kinds that Hauberk does not use.
func CheckPublicKey(public crypto.PublicKey) error {
	switch p := public.(type) {
	case *ecdsa.PublicKey:
		if p.Curve == elliptic.P256() {
			return nil
		}
		return fmt.Errorf("public key is on curve %s, want P-256", p.Params().Name)
	case ed25519.PublicKey:
		if len(p) == ed25519.PublicKeySize {
			return nil
		}
	}
	return fmt.Errorf("public key is a %T, want ECDSA P-256 or Ed25519", public)
}

func onlyBlock(raw []byte, kind string) ([]byte, error) {
	if len(raw) > 64<<10 {
		return nil, fmt.Errorf("is %d bytes, at most %d are allowed", len(raw), 64<<10)
	}
	block, rest := pem.Decode(raw)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("is not a PEM block of type %s", kind)
	}
	if next, _ := pem.Decode(rest); next != nil {
		return nil, errors.New("has more than one PEM block")
	}
	return block.Bytes, nil
}
