// Package token checks signed JSON Web Tokens (RFC 7515, RFC 7519) of issuers
// whose keys are known.
//
// What signs is decided by the key, never by the token: a key knows one
// algorithm, ES256, RS256 or EdDSA with Ed25519, and a token that names another
// is refused, "none" first of all. A token that says something must be
// understood (crit), that has no end, is for nobody or is larger than MaxToken
// is refused. The package fetches nothing and issues nothing.
package token

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"time"
)

// Bounds of a token.
const (
	MaxToken = 8 << 10
	maxDepth = 16
)

// Algorithms of signatures.
const (
	ES256 = "ES256"
	RS256 = "RS256"
	EdDSA = "EdDSA"
)

// Issuer is whose tokens are taken.
type Issuer struct {
	Name      string   // the claim iss
	Audiences []string // one of them must be in the claim aud
	Keys      Keys
	Skew      time.Duration
}

// Token is one whose signature, issuer and audience are good. It holds as long
// as Check says so.
type Token struct {
	// Claims are what it says: string, bool, json.Number, nil, []any and
	// map[string]any.
	Claims map[string]any

	until, from time.Time
	skew        time.Duration
}

var encoding = base64.RawURLEncoding.Strict()

// Verify reads a token and checks all of it but the time.
func (i *Issuer) Verify(text string) (*Token, error) {
	if len(text) > MaxToken {
		return nil, fmt.Errorf("token of %d bytes; at most %d", len(text), MaxToken)
	}
	signed, signature64, ok1 := cutLast(text)
	header64, payload64, ok2 := strings.Cut(signed, ".")
	if !ok1 || !ok2 || strings.Contains(payload64, ".") {
		return nil, errors.New("a token is three parts with dots between them")
	}
	var header struct {
		alg, kid string
		hasKid   bool
	}
	fields, err := object(header64)
	if err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	if _, ok := fields["crit"]; ok {
		return nil, errors.New("header: crit names what is not understood here")
	}
	header.alg, _ = fields["alg"].(string)
	if v, ok := fields["kid"]; ok {
		if header.kid, header.hasKid = v.(string); !header.hasKid {
			return nil, errors.New("header: kid is no string")
		}
	}
	signature, err := encoding.DecodeString(signature64)
	if err != nil {
		return nil, errors.New("signature: not base64url")
	}
	if err := i.Keys.verify(header.alg, header.kid, header.hasKid, signed, signature); err != nil {
		return nil, err
	}
	claims, err := object(payload64)
	if err != nil {
		return nil, fmt.Errorf("claims: %w", err)
	}
	return i.claims(claims)
}

// Unverified is the issuer that a token names, "" if it cannot be read. It says
// only whose keys to try.
func Unverified(text string) string {
	if len(text) > MaxToken {
		return ""
	}
	_, rest, _ := strings.Cut(text, ".")
	payload, _, _ := strings.Cut(rest, ".")
	claims, err := object(payload)
	if err != nil {
		return ""
	}
	name, _ := claims["iss"].(string)
	return name
}

func cutLast(s string) (before, after string, ok bool) {
	n := strings.LastIndexByte(s, '.')
	if n < 0 {
		return "", "", false
	}
	return s[:n], s[n+1:], true
}

// claims checks what every token must say.
func (i *Issuer) claims(c map[string]any) (*Token, error) {
	if iss, _ := c["iss"].(string); iss != i.Name {
		return nil, fmt.Errorf("issuer %.100q; want %q", iss, i.Name)
	}
	if !slices.ContainsFunc(Texts(c["aud"]), func(a string) bool { return slices.Contains(i.Audiences, a) }) {
		return nil, fmt.Errorf("audience %.100q; want one of %q", Texts(c["aud"]), i.Audiences)
	}
	t := &Token{Claims: c, skew: i.Skew}
	var err error
	if t.until, err = moment(c, "exp"); err != nil {
		return nil, err
	}
	if t.until.IsZero() {
		return nil, errors.New("exp: missing: a token must end")
	}
	t.from, err = moment(c, "nbf")
	return t, err
}

// Check tells whether the token holds at a time.
func (t *Token) Check(now time.Time) error {
	if !now.Before(t.until.Add(t.skew)) {
		return fmt.Errorf("expired at %s", t.until.UTC().Format(time.RFC3339))
	}
	if now.Add(t.skew).Before(t.from) {
		return fmt.Errorf("not valid before %s", t.from.UTC().Format(time.RFC3339))
	}
	return nil
}

// moment is a claim that is a time; zero if it is not there.
func moment(c map[string]any, name string) (time.Time, error) {
	v, ok := c[name]
	if !ok {
		return time.Time{}, nil
	}
	n, ok := v.(json.Number)
	f, err := n.Float64()
	if !ok || err != nil || f < 1 || f > 1<<40 {
		return time.Time{}, fmt.Errorf("%s: not a time in seconds", name)
	}
	return time.UnixMilli(int64(f * 1000)), nil
}

// Texts is a claim as the texts it may be compared with: itself, or if it is a
// list its elements. Objects and null are none.
func Texts(claim any) []string {
	list, ok := claim.([]any)
	if !ok {
		list = []any{claim}
	}
	var out []string
	for _, v := range list {
		switch v := v.(type) {
		case string:
			out = append(out, v)
		case json.Number:
			out = append(out, v.String())
		case bool:
			out = append(out, fmt.Sprint(v))
		}
	}
	return out
}

// object reads one JSON object. A name that is there twice is refused: two
// readers would see different objects.
func object(base64 string) (map[string]any, error) {
	b, err := encoding.DecodeString(base64)
	if err != nil {
		return nil, errors.New("not base64url")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	v, err := value(d, 0)
	if err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the object")
	}
	m, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("not an object")
	}
	return m, nil
}

func value(d *json.Decoder, depth int) (any, error) {
	t, err := d.Token()
	if err != nil {
		return nil, fmt.Errorf("not JSON: %w", err)
	}
	delim, ok := t.(json.Delim)
	if !ok {
		return t, nil
	}
	if depth == maxDepth {
		return nil, fmt.Errorf("over %d levels", maxDepth)
	}
	if delim == '[' {
		list := []any{}
		for d.More() {
			v, err := value(d, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = d.Token()
		return list, err
	}
	m := map[string]any{}
	for d.More() {
		k, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("not JSON: %w", err)
		}
		name := k.(string)
		if _, twice := m[name]; twice {
			return nil, fmt.Errorf("name %.60q twice", name)
		}
		if m[name], err = value(d, depth+1); err != nil {
			return nil, err
		}
	}
	_, err = d.Token()
	return m, err
}

// key verifies by its one algorithm.
type key struct {
	id  string
	alg string
	pub crypto.PublicKey
}

// Keys are those of an issuer.
type Keys struct {
	all   []key
	until time.Time // zero: for ever
}

// Check tells whether the keys hold at a time: those that were fetched do so until
// nobody has confirmed them for too long.
func (k Keys) Check(now time.Time) error {
	if k.until.IsZero() || now.Before(k.until) {
		return nil
	}
	return fmt.Errorf("the keys of its issuer held until %s and nobody has confirmed them since", k.until.UTC().Format(time.RFC3339))
}

// Len is the number of keys.
func (k Keys) Len() int { return len(k.all) }

func (k Keys) verify(alg, id string, named bool, signed string, signature []byte) error {
	tried := 0
	for i := range k.all {
		c := &k.all[i]
		if named && c.id != id || c.alg != alg {
			continue
		}
		tried++
		if c.verifies([]byte(signed), signature) {
			return nil
		}
	}
	if tried == 0 {
		return fmt.Errorf("no key %.60q for algorithm %.20q", id, alg)
	}
	return errors.New("the signature is wrong")
}

func (k *key) verifies(signed, signature []byte) bool {
	switch pub := k.pub.(type) {
	case *ecdsa.PublicKey:
		if len(signature) != 64 {
			return false
		}
		sum := sha256.Sum256(signed)
		return ecdsa.Verify(pub, sum[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
	case *rsa.PublicKey:
		sum := sha256.Sum256(signed)
		return rsa.VerifyPKCS1v15(pub, crypto.SHA256, sum[:], signature) == nil
	case ed25519.PublicKey:
		return ed25519.Verify(pub, signed, signature)
	}
	return false
}
