package ledger

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"hauberk.dev/internal/secretfile"
)

const maxCheckpoint = 16 << 10

// Checkpoint is a signed head of the log.
type Checkpoint struct {
	Origin string
	Size   uint64
	Root   tlog.Hash
	// Note is the checkpoint as it is published, with its signatures.
	Note []byte
}

// ParseCheckpoint reads a checkpoint and checks that the holder of the
// verifier key (as Signer.VerifierKey prints it) signed it for the origin the
// key is named after.
func ParseCheckpoint(raw []byte, verifierKey string) (Checkpoint, error) {
	v, err := note.NewVerifier(strings.TrimSpace(verifierKey))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("parse checkpoint: verifier key %.80q: %w", verifierKey, err)
	}
	if len(raw) > maxCheckpoint {
		return Checkpoint{}, fmt.Errorf("parse checkpoint: is %d bytes, at most %d are allowed", len(raw), maxCheckpoint)
	}
	n, err := note.Open(raw, note.VerifierList(v))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("parse checkpoint: not signed by %s+%08x: %w", v.Name(), v.KeyHash(), err)
	}
	c, err := parseCheckpointText(n.Text)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("parse checkpoint: %w", err)
	}
	if c.Origin != v.Name() {
		return Checkpoint{}, fmt.Errorf("parse checkpoint: origin is %q, want %q", c.Origin, v.Name())
	}
	c.Note = raw
	return c, nil
}

func parseCheckpointText(text string) (Checkpoint, error) {
	lines := strings.Split(text, "\n")
	// Lines after the third are extensions; this log writes none and, as C2SP
	// asks, lets others have them.
	if len(lines) < 4 || lines[len(lines)-1] != "" || lines[0] == "" {
		return Checkpoint{}, errors.New("is not origin, size and root, each on a line")
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil || size < 0 || strconv.FormatInt(size, 10) != lines[1] {
		return Checkpoint{}, fmt.Errorf("size %.30q is not a plain number", lines[1])
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return Checkpoint{}, fmt.Errorf("root %.60q is not %d bytes of base64", lines[2], tlog.HashSize)
	}
	return Checkpoint{Origin: lines[0], Size: uint64(size), Root: tlog.Hash(root)}, nil
}

// Signer signs checkpoints with an Ed25519 key.
type Signer struct {
	note.Signer
	verifierKey string
}

// VerifierKey is what an auditor verifies the log with, on one line.
func (s *Signer) VerifierKey() string { return s.verifierKey }

// LoadOrCreateSigner reads the signing key at path, or makes one there with
// mode 0600. The key is named after the origin of the log.
func LoadOrCreateSigner(path, origin string) (*Signer, error) {
	raw, err := secretfile.Read(path)
	if errors.Is(err, fs.ErrNotExist) {
		var key string
		if key, _, err = note.GenerateKey(rand.Reader, origin); err != nil {
			return nil, fmt.Errorf("create ledger key for origin %q: %w", origin, err)
		}
		if err := secretfile.Create(path, []byte(key+"\n")); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("create ledger key: %w", err)
		}
		raw, err = secretfile.Read(path)
	}
	if err != nil {
		return nil, fmt.Errorf("load ledger key: %w", err)
	}
	s, err := parseSigner(strings.TrimSuffix(string(raw), "\n"))
	if err != nil {
		return nil, fmt.Errorf("load ledger key %s: %w", path, err)
	}
	if s.Name() != origin {
		return nil, fmt.Errorf("load ledger key %s: it is the key of log %q, not of %q", path, s.Name(), origin)
	}
	return s, nil
}

func parseSigner(key string) (*Signer, error) {
	signer, err := note.NewSigner(key)
	if err != nil {
		return nil, errors.New("is not a signed-note key (PRIVATE+KEY+name+hash+base64)")
	}
	// NewSigner has checked the form: algorithm byte 1, then the seed.
	parts := strings.SplitN(key, "+", 5)
	seed, err := base64.StdEncoding.DecodeString(parts[len(parts)-1])
	if err != nil || len(seed) != 1+ed25519.SeedSize || seed[0] != 1 {
		return nil, errors.New("is not an Ed25519 signed-note key")
	}
	public := ed25519.NewKeyFromSeed(seed[1:]).Public().(ed25519.PublicKey)
	vkey, err := note.NewEd25519VerifierKey(signer.Name(), public)
	if err != nil {
		return nil, err
	}
	return &Signer{Signer: signer, verifierKey: vkey}, nil
}

func (s *Signer) checkpoint(size int64, root tlog.Hash) (Checkpoint, error) {
	text := fmt.Sprintf("%s\n%d\n%s\n", s.Name(), size, base64.StdEncoding.EncodeToString(root[:]))
	raw, err := note.Sign(&note.Note{Text: text}, s)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("sign checkpoint: %w", err)
	}
	return Checkpoint{Origin: s.Name(), Size: uint64(size), Root: root, Note: raw}, nil
}
