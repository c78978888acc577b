package guard

import (
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A guest that is to take policies from one signer alone is made with Trust
// behind its bundle, where it is measured with the rest. What it takes then is
// Sealed. guest/guard reads both.
const (
	trustMagic  = "HBTRUST\x01"
	sealMagic   = "HBSEAL1\x01"
	sealWords   = "hauberk.dev guard policy 1\x00"
	maxWorkload = 255
)

// Trust is whose policies a guest takes.
type Trust struct {
	Key ed25519.PublicKey
	// Workload is the only one whose policies are taken; empty is that of the
	// first policy, for guests that are made before they are anybody's.
	Workload string
	// Least is the oldest generation that is taken: a guest remembers none from
	// before it was started.
	Least uint64
}

// Behind gives a bundle for guests with that trust.
func (t Trust) Behind(bundle []byte) ([]byte, error) {
	m, err := ReadManifest(bundle)
	switch {
	case err != nil:
		return nil, fmt.Errorf("add trust to bundle: %w", err)
	case m.Trust != nil:
		return nil, errors.New("add trust to bundle: it has one")
	case len(t.Key) != ed25519.PublicKeySize:
		return nil, fmt.Errorf("add trust to bundle: key of %d bytes, want an Ed25519 public key", len(t.Key))
	case len(t.Workload) > maxWorkload:
		return nil, fmt.Errorf("add trust to bundle: workload of %d characters, at most %d are taken", len(t.Workload), maxWorkload)
	}
	b := append(slices.Clone(bundle), trustMagic...)
	b = binary.LittleEndian.AppendUint64(append(b, t.Key...), t.Least)
	return appendText(b, t.Workload), nil
}

// trust reads what follows the programs of a bundle, of which there may be
// nothing.
func (c *bundleCursor) trust() *Trust {
	if c.bad || len(c.b) == 0 {
		return nil
	}
	c.bad = string(c.take(len(trustMagic))) != trustMagic
	t := &Trust{Key: slices.Clone(c.take(ed25519.PublicKeySize))}
	t.Least = uint64(c.u32())
	t.Least |= uint64(c.u32()) << 32
	t.Workload = c.text()
	c.bad = c.bad || len(t.Workload) > maxWorkload
	return t
}

// Signer signs with the Ed25519 key that guests trust; evidence.KeySigner does.
type Signer interface {
	Sign(message []byte) ([]byte, error)
}

// Seal signs a policy for the guests of one kernel, by its build id, and one
// workload. Its generation is what tells it from older ones.
func (c *Compiled) Seal(s Signer, kernel, workload string) ([]byte, error) {
	if kernel == "" || workload == "" || len(workload) > maxWorkload {
		return nil, fmt.Errorf("seal policy %d: kernel %q, workload %q: want both named", c.Generation, kernel, workload)
	}
	said := appendText(appendText(nil, kernel), workload)
	said = binary.LittleEndian.AppendUint64(said, c.Generation)
	said = append(binary.LittleEndian.AppendUint32(said, uint32(len(c.Blob))), c.Blob...)
	signature, err := s.Sign(append([]byte(sealWords), said...))
	if err != nil {
		return nil, fmt.Errorf("seal policy %d: %w", c.Generation, err)
	}
	if len(signature) != ed25519.SignatureSize {
		return nil, fmt.Errorf("seal policy %d: signature of %d bytes, want one of Ed25519", c.Generation, len(signature))
	}
	return slices.Concat([]byte(sealMagic), signature, said), nil
}

// Why a guest with a Trust did not take a policy: Event.Why of OpPolicy.
var sealWhy = map[uint8]string{
	1: "it was not signed",
	2: "it could not be read",
	3: "another key signed it, or it was changed",
	4: "it is for another kernel",
	5: "it is for another workload",
	6: "it is older than the one before",
}

// untaken reads the agent's record of a policy that it did not take.
func untaken(record []byte) (Event, error) {
	le := binary.LittleEndian
	e := Event{Op: OpPolicy, Verdict: Verdict(record[2]), Why: record[5], Count: le.Uint64(record[24:]), Generation: le.Uint64(record[40:])}
	e.SinceBoot = time.Duration(le.Uint64(record[32:]))
	if _, known := sealWhy[e.Why]; !known || e.Verdict != Denied {
		return Event{}, fmt.Errorf("decode record of a policy that was not taken: reason %d: %w", e.Why, errRecord)
	}
	return e, nil
}
