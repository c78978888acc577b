// Package evidence holds signed statements: who said what about which digest,
// in formats that others can check.
//
// It wraps payloads in DSSE envelopes, knows the in-toto statements of the
// release chain (provenance, review, approval, verification summary), launch
// tickets and receipts. It decides whether a signature is good and a statement
// well formed; whether that is enough is the business of the gate, the CA and
// the node. Verifying with no keys is an error, never a pass.
package evidence

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"hauberk.dev/internal/strictjson"
)

// Bounds of an envelope.
const (
	MaxEnvelope   = 1 << 20
	maxSignatures = 16
	maxType       = 256
)

// ErrNoKeys says that a verification was asked for with nothing to trust.
var ErrNoKeys = errors.New("no trusted keys were given, so nothing can be verified")

// Envelope is a DSSE envelope (https://github.com/secure-systems-lab/dsse).
// Its payload is not to be believed before Verify has returned it.
type Envelope struct {
	PayloadType string      `json:"payloadType"`
	Payload     []byte      `json:"payload"`
	Signatures  []Signature `json:"signatures"`
}

// Signature is one signature of an envelope.
type Signature struct {
	KeyID KeyID  `json:"keyid"`
	Sig   []byte `json:"sig"`
}

// envelopeJSON is the wire form. DSSE allows both base64 alphabets, which
// encoding/json does not.
type envelopeJSON struct {
	PayloadType string          `json:"payloadType"`
	Payload     string          `json:"payload"`
	Signatures  []signatureJSON `json:"signatures"`
}

type signatureJSON struct {
	KeyID string `json:"keyid"`
	Sig   string `json:"sig"`
}

// ParseEnvelope reads the JSON form of an envelope, strictly and bounded.
func ParseEnvelope(raw []byte) (Envelope, error) {
	var w envelopeJSON
	if err := strictjson.Decode(raw, MaxEnvelope, &w); err != nil {
		return Envelope{}, fmt.Errorf("parse envelope: %w", err)
	}
	switch {
	case w.PayloadType == "" || len(w.PayloadType) > maxType:
		return Envelope{}, fmt.Errorf("parse envelope: payload type of %d bytes, want 1 to %d", len(w.PayloadType), maxType)
	case len(w.Signatures) == 0:
		return Envelope{}, errors.New("parse envelope: it has no signature")
	case len(w.Signatures) > maxSignatures:
		return Envelope{}, fmt.Errorf("parse envelope: it has %d signatures, at most %d are allowed", len(w.Signatures), maxSignatures)
	}
	payload, err := decodeBase64(w.Payload)
	if err != nil {
		return Envelope{}, fmt.Errorf("parse envelope: payload: %w", err)
	}
	env := Envelope{PayloadType: w.PayloadType, Payload: payload}
	for i, s := range w.Signatures {
		sig, err := decodeBase64(s.Sig)
		if err != nil {
			return Envelope{}, fmt.Errorf("parse envelope: signature %d: %w", i, err)
		}
		if len(s.KeyID) > maxType || len(sig) == 0 || len(sig) > 1024 {
			return Envelope{}, fmt.Errorf("parse envelope: signature %d: key id of %d bytes and signature of %d bytes are out of range", i, len(s.KeyID), len(sig))
		}
		env.Signatures = append(env.Signatures, Signature{KeyID: KeyID(s.KeyID), Sig: sig})
	}
	return env, nil
}

func decodeBase64(s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") { // encoding/base64 skips them
		return nil, errors.New("base64 has line breaks")
	}
	if strings.ContainsAny(s, "-_") {
		return base64.URLEncoding.Strict().DecodeString(s)
	}
	return base64.StdEncoding.Strict().DecodeString(s)
}

// UnmarshalJSON is ParseEnvelope, so that no path around it exists.
func (e *Envelope) UnmarshalJSON(raw []byte) error {
	env, err := ParseEnvelope(raw)
	if err == nil {
		*e = env
	}
	return err
}

// Raw is the JSON form.
func (e Envelope) Raw() json.RawMessage {
	raw, err := json.Marshal(e)
	if err != nil { // strings and bytes always marshal
		panic(err)
	}
	return raw
}

// PAE is the pre-authentication encoding: the bytes a DSSE signature covers.
func PAE(payloadType string, payload []byte) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "DSSEv1 %d %s %d ", len(payloadType), payloadType, len(payload))
	b.Write(payload)
	return b.Bytes()
}

// Sign wraps a payload in an envelope with one signature.
func Sign(payloadType string, payload []byte, s Signer) (Envelope, error) {
	env := Envelope{PayloadType: payloadType, Payload: payload}
	if payloadType == "" || len(payloadType) > maxType {
		return Envelope{}, fmt.Errorf("sign envelope: payload type of %d bytes, want 1 to %d", len(payloadType), maxType)
	}
	sig, err := s.Sign(PAE(payloadType, payload))
	if err != nil {
		return Envelope{}, fmt.Errorf("sign envelope: %w", err)
	}
	env.Signatures = []Signature{{KeyID: s.KeyID(), Sig: sig}}
	if n := len(env.Raw()); n > MaxEnvelope {
		return Envelope{}, fmt.Errorf("sign envelope: it would be %d bytes, at most %d are allowed", n, MaxEnvelope)
	}
	return env, nil
}

// Verify returns the payload if at least one signature is good under one of
// the keys, and the ids of every key that signed. The caller compares the
// payload type with the one it expects.
func Verify(env Envelope, keys ...Key) (payload []byte, by []KeyID, err error) {
	if len(keys) == 0 {
		return nil, nil, fmt.Errorf("verify %s: %w", env.PayloadType, ErrNoKeys)
	}
	if len(env.Signatures) == 0 || len(env.Signatures) > maxSignatures {
		return nil, nil, fmt.Errorf("verify %s: it has %d signatures, want 1 to %d", env.PayloadType, len(env.Signatures), maxSignatures)
	}
	message := PAE(env.PayloadType, env.Payload)
	for _, k := range keys {
		if signedBy(env, message, k) {
			by = append(by, k.ID)
		}
	}
	if len(by) == 0 {
		return nil, nil, &SignatureError{Type: env.PayloadType, Signed: ids(env), Trusted: keys}
	}
	return env.Payload, by, nil
}

// signedBy tries the signatures that name the key or name none: a key id is a
// hint and proves nothing.
func signedBy(env Envelope, message []byte, k Key) bool {
	for _, s := range env.Signatures {
		if (s.KeyID == "" || s.KeyID == k.ID) && k.verify(message, s.Sig) {
			return true
		}
	}
	return false
}

func ids(env Envelope) []KeyID {
	var out []KeyID
	for _, s := range env.Signatures {
		out = append(out, s.KeyID)
	}
	return out
}

// SignatureError says that no trusted key signed an envelope.
type SignatureError struct {
	Type    string
	Signed  []KeyID
	Trusted []Key
}

func (e *SignatureError) Error() string {
	known := map[KeyID]string{}
	var names []string
	for _, k := range e.Trusted {
		known[k.ID] = k.Subject
		names = append(names, k.String())
	}
	var signed []string
	for _, id := range e.Signed {
		if subject, ok := known[id]; ok {
			return fmt.Sprintf("verify %s: the signature under key %s of %s does not match the content, which was changed after signing; sign it again", e.Type, id.Short(), subject)
		}
		signed = append(signed, id.Short())
	}
	return fmt.Sprintf("verify %s: signed by key %s, trusted are %s; sign with a trusted key, or register the key with its account",
		e.Type, strings.Join(signed, ", "), strings.Join(names, ", "))
}
