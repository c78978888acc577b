package guard

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// act is what an honest program does: a script of a container of its own.
type act struct {
	name string
	// policy is the ready-made one that fits.
	policy string
	// with changes that policy as who runs such a thing would.
	with func(*spec.GuardPolicy)
	// run is given to sh -eu in an empty directory, and ends with 0 if all went
	// well.
	run string
	// slim acts are tried by every run of the tests; all of them only if
	// HAUBERK_REALITY is set to all.
	slim bool
}

// acting is how an act ended.
type acting struct {
	code   int
	out    string
	events []Event // of what was denied
	took   time.Duration
}

// realRow is what came of one act.
type realRow struct {
	Name    string  `json:"name"`
	Policy  string  `json:"policy"`
	Open    string  `json:"open"`
	Enforce string  `json:"enforce"`
	Seconds float64 `json:"seconds"` // enforced, on an emulated processor
}

// TestReality runs real programs of Debian in a machine without the Guard, where
// they must work or they prove nothing, and in one where the ready-made policy
// that fits is enforced: there they must work too, and nothing is denied.
func TestReality(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("unpacking packages with their owners needs root")
	}
	all := os.Getenv("HAUBERK_REALITY") == "all"
	only := strings.Split(os.Getenv("HAUBERK_REALITY_ONLY"), ",") // some, by parts of their names
	list := slices.DeleteFunc(acts(), func(a act) bool {
		return !all && !a.slim || !slices.ContainsFunc(only, func(part string) bool { return strings.Contains(a.name, part) })
	})
	if len(list) == 0 {
		t.Fatal("there are no acts")
	}
	image := debian(t, packages(all))
	rows := make([]realRow, len(list))
	for i, a := range list {
		rows[i] = realRow{Name: a.name, Policy: a.policy, Open: "FAILS", Enforce: "FAILS"}
	}
	t.Run("ways", func(t *testing.T) {
		for name, guarded := range map[string]bool{"open": false, "enforce": true} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				guest{image: image, memory: realMemory(all), open: !guarded}.start(t).reality(t, list, rows, guarded)
			})
		}
	})
	worked := 0
	for _, r := range rows {
		if r.Open == "works" && r.Enforce == "works" {
			worked++
		}
	}
	t.Logf("%d of %d acts of real programs work, without the Guard and under a ready-made policy", worked, len(rows))
	writeReality(t, rows)
}

// realMemory is how much a machine needs, in MiB: what is written lies in it.
func realMemory(all bool) int {
	if all {
		return 2048
	}
	return 512
}

func writeReality(t *testing.T, rows []realRow) {
	t.Helper()
	dir := os.Getenv("HAUBERK_ATTACKS")
	if dir == "" {
		return
	}
	raw, err := json.MarshalIndent(rows, "", " ")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "reality.json"), raw, 0o644)
	}
	if err != nil {
		t.Error(err)
	}
}

// reality runs acts one after the other.
func (s *sandbox) reality(t *testing.T, list []act, rows []realRow, guarded bool) {
	ctx, cancel := context.WithTimeout(t.Context(), 110*time.Minute)
	defer cancel()
	if _, err := s.c.MountRoot(ctx, guestproto.MountRoot{Serial: "root0", UpperBytes: 1 << 30}); err != nil {
		t.Error(err)
		return
	}
	if err := s.c.Network(ctx, guestproto.Network{}); err != nil { // none but loopback
		t.Error(err)
		return
	}
	for i, a := range list {
		if guarded {
			if err := s.putInForce(t, ctx, uint64(i+1), a); err != nil {
				t.Errorf("%s: %v", a.name, err)
				continue
			}
		}
		got, err := s.act(t, ctx, a, guarded)
		if err != nil {
			t.Errorf("%s: %v", a.name, err)
			return
		}
		state := &rows[i].Open
		if guarded {
			state, rows[i].Seconds = &rows[i].Enforce, got.took.Seconds()
		}
		*state = "works"
		if got.code != 0 {
			*state = "FAILS"
			t.Errorf("%s (guarded: %t): exit %d; want it to work:\n%s", a.name, guarded, got.code, got.out)
		}
		if n := len(got.events); n > 0 {
			*state = "FAILS"
			t.Errorf("%s: %s: %d denials, such as %v", a.name, a.policy, n, got.events[:min(n, 4)])
		}
		if testing.Verbose() {
			t.Logf("%s (guarded: %t): %s, %.1f s", a.name, guarded, *state, got.took.Seconds())
		}
	}
}

// putInForce makes the act's policy that of the machine.
func (s *sandbox) putInForce(t *testing.T, ctx context.Context, generation uint64, a act) error {
	p, ok := FindReady(a.policy)
	if !ok {
		return fmt.Errorf("there is no policy %q", a.policy)
	}
	if a.with != nil {
		a.with(&p.Spec)
	}
	c := compileNamed(t, generation, node.NamedGuardPolicy{Name: p.Name, Spec: p.Spec})
	reply, err := s.c.GuardPolicy(ctx, generation, c.Blob)
	if err != nil {
		return err
	}
	_, err = c.Applied(reply)
	return err
}

// scripted is what every script begins with.
const scripted = `exec </dev/null 2>&1
await() { n=0; until "$@" >/dev/null 2>&1; do n=$((n+1)); [ $n -lt 900 ] || { echo "never came: $*"; "$@" 2>&1 || exit 1; }; sleep 0.1; done; }
`

// Containers have the rights that engines commonly give.
const realRights = 1<<0 | 1<<1 | 1<<3 | 1<<4 | 1<<5 | 1<<6 | 1<<7 | 1<<8 | 1<<10 | 1<<13 | 1<<18 | 1<<27 | 1<<29 | 1<<31

// act runs one in a container of its own, whatever of it is left ends with that.
func (s *sandbox) act(t *testing.T, ctx context.Context, a act, guarded bool) (got acting, err error) {
	before, heard := uint64(0), 0
	if guarded {
		before = s.guardStatus(t, ctx).Sequence
		s.mu.Lock()
		heard = len(s.events)
		s.mu.Unlock()
	}
	began := time.Now()
	p, err := s.c.Create(ctx, guestproto.Create{
		Hostname: "box", Files: []guestproto.File{{Path: "/etc/hosts", Mode: 0o644, Data: []byte("127.0.0.1 localhost box\n")}},
		Program: guestproto.Program{
			Args: []string{"/bin/sh", "-euc", scripted + a.run}, Cwd: "/acts/" + strings.ReplaceAll(a.name, " ", "-"), NewPrivileges: true,
			Env:    []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "TERM=xterm"},
			Rights: guestproto.Rights{Given: true, Bounding: realRights, Effective: realRights, Permitted: realRights},
		},
	})
	if err != nil {
		return got, err
	}
	if err := p.Start(ctx); err != nil {
		return got, err
	}
	said := make(chan []byte, 1)
	go func() {
		out, _ := io.ReadAll(p.Stdout())
		said <- out
	}()
	go io.Copy(io.Discard, p.Stderr()) // it says all to the other
	limit, stop := context.WithTimeout(ctx, 10*time.Minute)
	defer stop()
	status, err := p.Wait(limit)
	if err != nil && ctx.Err() == nil && limit.Err() != nil { // it hangs
		if err = p.SignalAll(ctx, syscall.SIGKILL); err == nil {
			status, err = p.Wait(ctx)
		}
	}
	if err != nil {
		return got, err
	}
	got.took, got.code = time.Since(began), status.Code
	out := <-said
	got.out = string(bytes.TrimSpace(out[max(0, len(out)-4000):]))
	if err := p.Forget(ctx); err != nil {
		return got, err
	}
	if guarded {
		got.events = s.denials(t, ctx, before, heard)
	}
	return got, nil
}

// denials waits until all that was denied since a sequence has been told.
func (s *sandbox) denials(t *testing.T, ctx context.Context, before uint64, heard int) (list []Event) {
	last := s.guardStatus(t, ctx).Sequence
	for ; ; time.Sleep(20 * time.Millisecond) {
		s.mu.Lock()
		list = slices.DeleteFunc(slices.Clone(s.events[heard:]), func(e Event) bool { return e.Verdict == Allowed || e.Op == OpRepeated })
		s.mu.Unlock()
		if last == before || len(list) > 0 && list[len(list)-1].Sequence >= last || ctx.Err() != nil {
			return list
		}
	}
}

// Every act is one of its name, and there are as many as were asked for.
func TestActsAreMany(t *testing.T) {
	seen := map[string]bool{}
	slim := 0
	for _, a := range acts() {
		if seen[a.name] || a.run == "" {
			t.Errorf("%s is there twice, or does nothing", a.name)
		}
		seen[a.name] = true
		if a.slim {
			slim++
		}
		if _, ok := FindReady(a.policy); !ok {
			t.Errorf("%s: there is no policy %q", a.name, a.policy)
		}
	}
	if len(seen) < 60 || slim < 8 {
		t.Errorf("%d acts, %d of them slim; want 60, and 8", len(seen), slim)
	}
}
