package mesh

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/token"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/plan"
)

// Bounds of an issuer.
const (
	maxProven = 1024 // tokens whose signature is not checked again
	maxSkew   = time.Minute * 10
)

// issuer is whose tokens a service believes.
type issuer struct {
	plan.Issuer
	now   atomic.Pointer[verifier]
	stamp fileStamp
}

// fileStamp tells whether a file is another.
type fileStamp struct {
	size    int64
	changed time.Time
}

// verifier is an issuer with the keys of the moment.
type verifier struct {
	token.Issuer
	set    [sha256.Size]byte // the digest of the keys as they were read
	mu     sync.Mutex
	proven map[[sha256.Size]byte]*token.Token
}

// proof is what became of a token.
type proof struct {
	token *token.Token
	err   error
}

func newIssuer(p plan.Issuer) (*issuer, error) {
	i := &issuer{Issuer: p}
	if i.Header == "" {
		i.Header = "authorization"
	}
	i.Header = strings.ToLower(i.Header)
	switch {
	case p.Name == "" || p.Issuer == "" || len(p.Audiences) == 0:
		return i, errors.New("it needs a name, an issuer and an audience")
	case http1.CheckField(i.Header, "") != nil:
		return i, fmt.Errorf("header %q is no field name", p.Header)
	case p.Skew < 0 || time.Duration(p.Skew)*time.Second > maxSkew:
		return i, fmt.Errorf("skew of %d seconds; want 0 to %v", p.Skew, maxSkew)
	case (p.Keys == "") == (p.File == ""):
		return i, errors.New("either keys or a file must be given")
	}
	if p.File != "" {
		// A file that is not there yet is nobody else's trouble: until it is, no
		// token of this issuer is good. Who reads it again tells why.
		i.readAgain()
		return i, nil
	}
	return i, i.take([]byte(p.Keys))
}

func (i *issuer) take(set []byte) error {
	keys, err := token.ParseKeys(set)
	if err != nil {
		return err
	}
	i.now.Store(&verifier{set: sha256.Sum256(set), Issuer: token.Issuer{Name: i.Issuer.Issuer, Audiences: i.Audiences, Keys: keys, Skew: time.Duration(i.Skew) * time.Second},
		proven: map[[sha256.Size]byte]*token.Token{}})
	return nil
}

// readAgain reads the keys, if they are in a file that is not the one read
// before. One goroutine at a time may call it.
func (i *issuer) readAgain() error {
	if i.File == "" {
		return nil
	}
	// Not to be waited for: a policy may name a pipe.
	f, err := os.OpenFile(i.File, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return fmt.Errorf("read keys: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("read keys: %w", err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("read keys: %s is no regular file", i.File)
	}
	stamp := fileStamp{info.Size(), info.ModTime()}
	if stamp == i.stamp {
		return nil
	}
	set, err := io.ReadAll(io.LimitReader(f, token.MaxKeySet+1))
	if err != nil {
		return fmt.Errorf("read keys: %w", err)
	}
	if err := i.take(set); err != nil {
		return err
	}
	i.stamp = stamp
	return nil
}

// verify checks a token; one that was good lately is only looked up.
func (v *verifier) verify(text string, now time.Time) (*token.Token, error) {
	if err := v.Keys.Check(now); err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(text))
	v.mu.Lock()
	t := v.proven[sum]
	v.mu.Unlock()
	if t == nil {
		var err error
		if t, err = v.Verify(text); err != nil {
			return nil, err
		}
		v.mu.Lock()
		if len(v.proven) >= maxProven {
			clear(v.proven)
		}
		v.proven[sum] = t
		v.mu.Unlock()
	}
	return t, t.Check(now)
}

var errNoToken = errors.New("the request has no token")

// proven tells whether a token of a request is what a rule wants. A request
// without a good one cannot be told apart.
func (f *found) proven(r *plan.Rule) (bool, error) {
	if r.Token == nil {
		return true, nil
	}
	good, err := f.prove(r.Token)
	return err == nil && slices.ContainsFunc(good, func(t *token.Token) bool { return claims(t, r.Token) }), err
}

// claims tells whether a token says all that is wanted.
func claims(t *token.Token, want *plan.Token) bool {
	for i := range want.Claims {
		c := &want.Claims[i]
		if !slices.ContainsFunc(token.Texts(t.Claims[c.Name]), func(v string) bool { return slices.Contains(c.OneOf, v) }) {
			return false
		}
	}
	return true
}

// prove finds the good tokens by the issuers that a rule names, of which there is
// one at least. Who sends another beside must not hide it from a rule that denies.
func (f *found) prove(want *plan.Token) (good []*token.Token, err error) {
	err = errNoToken
	var heard []string // fields whose token is good
	for _, name := range want.Issuers {
		i := f.s.issuers[name]
		if slices.Contains(heard, i.Header) {
			continue
		}
		p, ok := f.tokens[name]
		if !ok {
			p.token, p.err = f.verify(i)
			if f.tokens == nil {
				f.tokens = map[string]proof{}
			}
			f.tokens[name] = p
		}
		if p.err == nil {
			good, heard = append(good, p.token), append(heard, i.Header)
		} else if err == errNoToken {
			err = p.err
		}
	}
	if len(good) > 0 {
		return good, nil
	}
	return nil, err
}

func (f *found) verify(i *issuer) (*token.Token, error) {
	if !f.c.letter.known() {
		return nil, errLetter
	}
	values, aliases := f.c.letter.values(i.Header)
	switch {
	case len(aliases) > 0:
		return nil, fmt.Errorf("token: a field is there that some servers take for %s", i.Header)
	case len(values) == 0:
		return nil, errNoToken
	case len(values) > 1:
		return nil, fmt.Errorf("token: %s is there %d times", i.Header, len(values))
	}
	text := values[0]
	if i.Header == "authorization" {
		scheme, rest, _ := strings.Cut(text, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return nil, errNoToken
		}
		text = strings.Trim(rest, " ")
	}
	v := i.now.Load()
	if v == nil {
		return nil, errors.New("token: its issuer has no keys")
	}
	t, err := v.verify(text, f.now)
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	return t, nil
}
