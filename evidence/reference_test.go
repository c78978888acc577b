package evidence

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"errors"
)

// reference gives the DSSE reference library one of our keys.
type reference struct{ s *KeySigner }

func (r *reference) Sign(_ context.Context, data []byte) ([]byte, error) { return r.s.Sign(data) }
func (r *reference) KeyID() (string, error)                              { return string(r.s.KeyID()), nil }
func (r *reference) Public() crypto.PublicKey                            { return r.s.Key().Public() }

func (r *reference) Verify(_ context.Context, data, sig []byte) error {
	if !ed25519.Verify(r.s.Key().Public().(ed25519.PublicKey), data, sig) {
		return errors.New("bad signature")
	}
	return nil
}
