package guard

import (
	"bytes"
	"crypto/ed25519"
	reference "crypto/sha512"
	"math/rand/v2"
	"testing"
)

func TestSHA512(t *testing.T) {
	random := rand.NewChaCha8([32]byte{1})
	for n := range 400 {
		b := make([]byte, n)
		_, _ = random.Read(b)
		cut := n / 3
		if got := sha512(b[:cut], nil, b[cut:]); got != reference.Sum512(b) {
			t.Fatalf("%d bytes: %x", n, got)
		}
	}
}

// What the standard library signs is taken, and what it refuses is refused: each
// byte of all that goes in changed, one at a time.
func TestVerify(t *testing.T) {
	random := rand.NewChaCha8([32]byte{2})
	for range 8 {
		seed := make([]byte, 32)
		_, _ = random.Read(seed)
		private := ed25519.NewKeyFromSeed(seed)
		public := []byte(private.Public().(ed25519.PublicKey))
		message := append([]byte("policy"), seed...)
		signature := ed25519.Sign(private, message)
		if !verify(public, message, signature) {
			t.Fatalf("a good signature is refused: key %x", public)
		}
		for _, part := range [][]byte{message, signature} {
			for i := range part {
				part[i] ^= 1 << (i % 8)
				if verify(public, message, signature) {
					t.Errorf("a signature is taken with byte %d changed", i)
				}
				part[i] ^= 1 << (i % 8)
			}
		}
	}
}

// A scalar that is the same but for the group's order is another signature of
// the same message, which nobody made.
func TestVerifyRefusesAnotherScalar(t *testing.T) {
	private := ed25519.NewKeyFromSeed(make([]byte, 32))
	public := []byte(private.Public().(ed25519.PublicKey))
	signature := ed25519.Sign(private, nil)
	carry, order := uint16(0), []byte{}
	for _, v := range groupOrder {
		order = append64(order, v)
	}
	for i := range 32 {
		carry += uint16(signature[32+i]) + uint16(order[i])
		signature[32+i] = byte(carry)
		carry >>= 8
	}
	if carry != 0 || verify(public, nil, signature) || ed25519.Verify(public, nil, signature) {
		t.Error("a signature with a scalar above the group's order is taken")
	}
}

func FuzzVerify(f *testing.F) {
	private := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))
	public := []byte(private.Public().(ed25519.PublicKey))
	f.Add(public, []byte("x"), ed25519.Sign(private, []byte("x")))
	f.Add(make([]byte, 32), []byte{}, make([]byte, 64))
	f.Add(bytes.Repeat([]byte{0xff}, 32), []byte{}, append([]byte{1}, make([]byte, 63)...))
	f.Add(append([]byte{1}, make([]byte, 31)...), []byte{}, append([]byte{1}, make([]byte, 63)...))
	f.Add(append([]byte{1}, append(make([]byte, 30), 0x80)...), []byte{}, append([]byte{1}, make([]byte, 63)...))
	f.Fuzz(func(t *testing.T, key, message, signature []byte) {
		want := len(key) == ed25519.PublicKeySize && ed25519.Verify(key, message, signature)
		if got := verify(key, message, signature); got != want {
			t.Errorf("key %x, message %x, signature %x: %v, the standard library says %v", key, message, signature, got, want)
		}
	})
}

// Nothing that a host may send in place of a sealed policy is taken, or read
// beyond its end.
func FuzzOpenSealed(f *testing.F) {
	private := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))
	said := append([]byte{1, 0, 'k', 1, 0, 'w'}, append64(nil, 3)...)
	said = append(append32(said, 4), "blob"...)
	good := append(append([]byte(sealMagic), ed25519.Sign(private, append([]byte(sealWords), said...))...), said...)
	t := trust{key: []byte(private.Public().(ed25519.PublicKey)), kernel: "k"}
	if blob, workload, why, err := t.open(good, 3, 0); err != nil || why != 0 || string(blob) != "blob" || workload != "w" {
		f.Fatalf("%q of %q, %d, %v", blob, workload, why, err)
	}
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add([]byte(sealMagic))
	f.Add([]byte{})
	f.Fuzz(func(tt *testing.T, b []byte) {
		if _, _, why, err := t.open(b, 3, 0); (err == nil) != (why == 0) || (err == nil) != bytes.Equal(b, good) {
			tt.Errorf("%x: %d, %v", b, why, err)
		}
	})
}

func FuzzParseTrust(f *testing.F) {
	good := append(append(append([]byte(trustMagic), make([]byte, keySize)...), append64(nil, 9)...), 1, 0, 'w')
	f.Add(good)
	f.Add(good[:20])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseTrust(b, "k")
		if err == nil && len(b) > 0 && (len(got.key) != keySize || len(got.workload) > maxWorkload) {
			t.Errorf("%x: %+v", b, got)
		}
		if err != nil && got.key != nil {
			t.Errorf("%x: half a trust", b)
		}
	})
}
