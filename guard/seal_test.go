package guard

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/evidence"
)

func signerForTest(t testing.TB, n byte) (*evidence.KeySigner, ed25519.PublicKey) {
	t.Helper()
	private := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
	s, err := evidence.NewSigner(private, "signer of policies")
	if err != nil {
		t.Fatal(err)
	}
	return s, private.Public().(ed25519.PublicKey)
}

func seal(t testing.TB, c Compiled, by Signer, kernel, workload string) []byte {
	t.Helper()
	b, err := c.Seal(by, kernel, workload)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestTrustBehindBundle(t *testing.T) {
	m, err := prepare()
	if err != nil {
		t.Fatal(err)
	}
	_, key := signerForTest(t, 1)
	with, err := Trust{Key: key, Workload: "bank/web", Least: 7}.Behind(m.bundle)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ReadManifest(with)
	if err != nil || got.Trust == nil || !got.Trust.Key.Equal(key) || got.Trust.Workload != "bank/web" || got.Trust.Least != 7 || len(got.Programs) == 0 {
		t.Errorf("%+v, %v", got.Trust, err)
	}
	if plain, err := ReadManifest(m.bundle); err != nil || plain.Trust != nil {
		t.Errorf("a bundle without trust: %+v, %v", plain.Trust, err)
	}
	if _, err := ReadManifest(with[:len(with)-1]); err == nil {
		t.Error("a trust that was cut is read")
	}
	for name, trust := range map[string]Trust{"no key": {}, "long name": {Key: key, Workload: strings.Repeat("x", 256)}} {
		if _, err := trust.Behind(m.bundle); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := (Trust{Key: key}).Behind(with); err == nil {
		t.Error("a second trust is taken")
	}
}

// A guest that was made to trust one signer takes nothing else: not without a
// signature, not by another key, not what was changed, not for another kernel or
// workload, and nothing older. What it took stays in force.
func TestSealedPolicies(t *testing.T) {
	m, err := prepare()
	if err != nil {
		t.Fatal(err)
	}
	signer, key := signerForTest(t, 1)
	other, _ := signerForTest(t, 2)
	s := guest{image: buildImage(t, m, imageFiles(), nil), memory: 192, trust: &Trust{Key: key, Least: 5}}.start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	kernel := m.kernel.BuildID
	good := compileForTest(t, 10, strict())
	newer := compileForTest(t, 11, strict())
	changed := seal(t, good, signer, kernel, "bank/web")
	changed[len(changed)-1] ^= 1
	try := func(name string, generation uint64, blob []byte, want string, why uint8) {
		t.Helper()
		_, err := s.c.GuardPolicy(ctx, generation, blob)
		if want == "" {
			if err != nil {
				t.Errorf("%s: %v; want it taken", name, err)
			}
			return
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want it refused, with %q", name, err, want)
		}
		s.toldUntaken(t, name, why)
	}
	try("unsigned", 10, good.Blob, "not signed", 1)
	try("too old for the guest", 4, seal(t, compileForTest(t, 4, strict()), signer, kernel, "bank/web"), "out of its turn", 6)
	try("good", 10, seal(t, good, signer, kernel, "bank/web"), "", 0)
	try("by another key", 11, seal(t, newer, other, kernel, "bank/web"), "another key", 3)
	try("changed", 10, changed, "another key", 3)
	try("cut", 11, seal(t, newer, signer, kernel, "bank/web")[:40], "another key", 3)
	try("another kernel's", 11, seal(t, newer, signer, strings.Repeat("ab", 20), "bank/web"), "signed for kernel", 4)
	try("another workload's", 11, seal(t, newer, signer, kernel, "bank/db"), "bank/db", 5)
	try("said to be newer", 11, seal(t, good, signer, kernel, "bank/web"), "out of its turn", 6)
	status := func() Status {
		t.Helper()
		raw, err := s.c.GuardStatus(ctx)
		if err != nil {
			t.Fatal(err)
		}
		st, err := DecodeStatus(raw)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	if st := status(); st.Generation != 10 || st.Digest != good.Digest {
		t.Errorf("generation %d, digest %s in force; want the good one's", st.Generation, st.Digest)
	}
	try("newer", 11, seal(t, newer, signer, kernel, "bank/web"), "", 0)
	try("replayed", 10, seal(t, good, signer, kernel, "bank/web"), "out of its turn", 6)
	if st := status(); st.Generation != 11 {
		t.Errorf("generation %d in force, want 11", st.Generation)
	}
	if _, err := s.c.MountRoot(ctx, guestproto.MountRoot{Serial: "root0"}); err != nil {
		t.Errorf("apply the policy to a root that comes later: %v", err)
	}
}

// toldUntaken waits for the guest's own record of a policy that it did not take.
func (s *sandbox) toldUntaken(t *testing.T, name string, why uint8) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		s.mu.Lock()
		heard := s.events
		s.events = nil
		s.mu.Unlock()
		for _, e := range heard {
			if e.Op == OpPolicy && e.Verdict == Denied && e.Why == why {
				t.Log(e)
				return
			}
		}
	}
	t.Errorf("%s: the guest did not tell", name)
}
