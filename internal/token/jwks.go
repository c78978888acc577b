package token

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"
)

// Bounds of a key set.
const (
	MaxKeySet = 64 << 10
	maxKeys   = 16
	minRSA    = 2048 // bits
	maxRSA    = 8192
)

// jwk is one key of a set (RFC 7517, RFC 8037).
type jwk struct {
	Kty string   `json:"kty"`
	Use string   `json:"use"`
	Ops []string `json:"key_ops"`
	Alg string   `json:"alg"`
	Kid string   `json:"kid"`
	Crv string   `json:"crv"`
	X   string   `json:"x"`
	Y   string   `json:"y"`
	N   string   `json:"n"`
	E   string   `json:"e"`
	D   string   `json:"d"`
	K   string   `json:"k"`
}

// ParseKeys reads a JSON Web Key Set. Keys of kinds and for uses that are not
// known here are left out; a set without any other, or with a secret in it, is
// refused.
func ParseKeys(set []byte) (Keys, error) {
	var k Keys
	if len(set) > MaxKeySet {
		return k, fmt.Errorf("read keys: %d bytes; at most %d", len(set), MaxKeySet)
	}
	var s struct {
		Keys  []jwk  `json:"keys"`
		Until *int64 `json:"hauberk_until"` // seconds; hauberk-xds writes it
	}
	if err := json.Unmarshal(set, &s); err != nil {
		return k, fmt.Errorf("read keys: %w: want {\"keys\": [...]}", err)
	}
	if s.Until != nil {
		if *s.Until < 1 || *s.Until > 1<<40 {
			return k, fmt.Errorf("read keys: hauberk_until: %d is no time in seconds", *s.Until)
		}
		k.until = time.Unix(*s.Until, 0)
	}
	if len(s.Keys) > maxKeys {
		return k, fmt.Errorf("read keys: %d keys; at most %d", len(s.Keys), maxKeys)
	}
	var errs []error
	for n, j := range s.Keys {
		one, ok, err := j.key()
		if err != nil {
			errs = append(errs, fmt.Errorf("read keys: keys[%d] %.60q: %w", n, j.Kid, err))
		}
		if ok {
			k.all = append(k.all, one)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return Keys{}, err
	}
	if len(k.all) == 0 {
		return k, fmt.Errorf("read keys: none for %s, %s or %s", ES256, RS256, EdDSA)
	}
	return k, nil
}

// key makes a key ready; it is not ok if it is none of ours.
func (j *jwk) key() (k key, ok bool, err error) {
	if j.D != "" || j.K != "" || j.Kty == "oct" {
		return k, false, errors.New("it is a secret, and nobody may know it but its issuer: replace it, and give the public key")
	}
	if j.Use != "" && j.Use != "sig" || j.Ops != nil && !slices.Contains(j.Ops, "verify") {
		return k, false, nil
	}
	k.id = j.Kid
	switch {
	case j.Kty == "EC" && j.Crv == "P-256":
		k.alg = ES256
		k.pub, err = j.ec()
	case j.Kty == "RSA" && (j.Alg == "" || j.Alg == RS256):
		k.alg = RS256
		k.pub, err = j.rsa()
	case j.Kty == "OKP" && j.Crv == "Ed25519":
		k.alg = EdDSA
		var x []byte
		if x, err = encoding.DecodeString(j.X); err == nil && len(x) != ed25519.PublicKeySize {
			err = fmt.Errorf("x: %d bytes", len(x))
		}
		k.pub = ed25519.PublicKey(x)
	default:
		return k, false, nil
	}
	if err != nil {
		return k, false, err
	}
	if j.Alg != "" && j.Alg != k.alg && (k.alg != EdDSA || j.Alg != "Ed25519") {
		return k, false, fmt.Errorf("alg %.20q does not fit the key, which is for %s", j.Alg, k.alg)
	}
	return k, true, nil
}

func (j *jwk) ec() (*ecdsa.PublicKey, error) {
	x, err1 := encoding.DecodeString(j.X)
	y, err2 := encoding.DecodeString(j.Y)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if len(x) != 32 || len(y) != 32 {
		return nil, fmt.Errorf("x and y of %d and %d bytes; want 32", len(x), len(y))
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append(append([]byte{4}, x...), y...))
}

func (j *jwk) rsa() (*rsa.PublicKey, error) {
	n, err1 := encoding.DecodeString(j.N)
	e, err2 := encoding.DecodeString(j.E)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	modulus, exponent := new(big.Int).SetBytes(n), new(big.Int).SetBytes(e)
	if bits := modulus.BitLen(); bits < minRSA || bits > maxRSA {
		return nil, fmt.Errorf("n: %d bits; want %d to %d", bits, minRSA, maxRSA)
	}
	if !exponent.IsInt64() || exponent.Int64() < 3 || exponent.Int64() > 1<<31-1 || exponent.Bit(0) == 0 {
		return nil, errors.New("e: not an odd number of 3 to 2147483647")
	}
	return &rsa.PublicKey{N: modulus, E: int(exponent.Int64())}, nil
}
