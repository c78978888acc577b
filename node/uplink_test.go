package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/internal/netns"
)

func upTo(t *testing.T, h http.HandlerFunc) *uplink {
	t.Helper()
	srv := httptest.NewTLSServer(h)
	t.Cleanup(srv.Close)
	u := newUplink(srv.Listener.Addr().String(), srv.Client().Transport.(*http.Transport).TLSClientConfig)
	u.quiet = time.Minute
	t.Cleanup(u.http.CloseIdleConnections)
	return u
}

// TestOnlyDecisionsAreRefusals: trouble of the control plane is tried again.
func TestOnlyDecisionsAreRefusals(t *testing.T) {
	body := `{"reason":"Revoked","message":"no"}`
	for status, want := range map[int]bool{409: true, 400: true, 403: true, 500: false, 503: false} {
		u := upTo(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status); fmt.Fprint(w, body) })
		if err := u.call(t.Context(), "/", nil, nil); err == nil || isRefusal(err) != want {
			t.Errorf("status %d: %v; a refusal: %v, want %v", status, err, isRefusal(err), want)
		}
	}
	for name, answer := range map[string]string{"garbage": "<html>", "empty": "", "too large": `"` + strings.Repeat("x", maxBody) + `"`} {
		u := upTo(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, answer) })
		var out any
		if err := u.call(t.Context(), "/", nil, &out); err == nil || isRefusal(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWatchEnds(t *testing.T) {
	line := func(d wire.Desired) string {
		raw, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		return string(raw) + "\n"
	}
	good := line(wire.Desired{Roots: "r"})
	for name, c := range map[string]struct {
		watch   func(w http.ResponseWriter, r *http.Request)
		handled int
		says    string
		quiet   time.Duration // unless a minute will do
	}{
		"orders, then end":      {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "\n", good, "\n\n", good) }, 2, "EOF", 0},
		"garbage":               {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, good, "{]\n", good) }, 1, "decode", 0},
		"refused":               {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) }, 0, "403", 0},
		"silent from the start": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, 0, "canceled", 100 * time.Millisecond},
		"silent later": {func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, good)
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, 1, "canceled", 3 * time.Second}, // in which a busy host shakes hands and sends one order
	} {
		t.Run(name, func(t *testing.T) {
			u := upTo(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == wire.PathHello {
					fmt.Fprint(w, "{}")
					return
				}
				c.watch(w, r)
			})
			if c.quiet > 0 {
				u.quiet = c.quiet
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			handled := 0
			err := u.watch(ctx, wire.Hello{}, func(wire.Desired) { handled++ })
			if err == nil || ctx.Err() != nil || handled != c.handled || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%d orders, %v (%v)", handled, err, ctx.Err())
			}
		})
	}
}

func TestBypassed(t *testing.T) {
	drop := func(to string, packets uint64) netns.Drop {
		return netns.Drop{Destination: netip.MustParseAddr(to), Port: 53, Protocol: 17, Packets: packets}
	}
	for name, c := range map[string]struct {
		before, now netns.Drops
		want        []string // severity and cause
	}{
		"nothing new":  {netns.Drops{Spoofed: 4, Bypass: []netns.Drop{drop("192.0.2.1", 2)}}, netns.Drops{Spoofed: 4, Bypass: []netns.Drop{drop("192.0.2.1", 2)}}, nil},
		"spoofed":      {netns.Drops{}, netns.Drops{Spoofed: 1}, []string{"critical bypass"}},
		"datagram":     {netns.Drops{}, netns.Drops{Bypass: []netns.Drop{drop("192.0.2.1", 2)}}, []string{"warning mesh"}},
		"other guest":  {netns.Drops{}, netns.Drops{Bypass: []netns.Drop{drop("10.88.0.9", 2)}}, []string{"critical bypass"}},
		"counter fell": {netns.Drops{Spoofed: 9, Rest: 9, Bypass: []netns.Drop{drop("10.88.0.9", 9)}}, netns.Drops{Bypass: []netns.Drop{drop("10.88.0.9", 2)}}, nil},
		"the rest":     {netns.Drops{Rest: 1}, netns.Drops{Rest: 3}, []string{"warning mesh"}},
	} {
		var got []string
		for _, r := range bypassed(c.before, c.now) {
			if !r.Denied || critical(r) != (r.Cause == "bypass") {
				t.Errorf("%s: %+v", name, r)
			}
			got = append(got, string(r.Severity)+" "+r.Cause)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestCredentialTakesOnlyWhole(t *testing.T) {
	k := &credential{}
	for name, j := range map[string]admin.Joined{
		"nothing": {}, "no chain": {Roots: "-----BEGIN"}, "garbage": {Chain: [][]byte{{1, 2}}, Roots: "x"},
	} {
		if err := k.take(j); err == nil || k.current.Roots != nil || k.domain != "" {
			t.Errorf("%s was taken: %v", name, err)
		}
	}
}

func TestWhatAContainerFinds(t *testing.T) {
	env := environment([]string{"PATH=/app", "A=image"}, []spec.EnvVar{{Name: "A", Value: "own"}})
	if env[len(env)-1] != "A=own" || !slices.Contains(env, "PATH=/app") {
		t.Errorf("environment %q: the workload's own must come last", env)
	}
	for _, f := range files(wire.Instance{ID: "web-1", Namespace: "bank", Address: "10.88.0.7"}) {
		want := map[string]string{"/etc/resolv.conf": "search bank.svc", "/etc/hosts": "10.88.0.7 web-1", "/etc/hostname": "web-1\n"}[f.Path]
		if want == "" || !strings.Contains(string(f.Data), want) {
			t.Errorf("%s: %q", f.Path, f.Data)
		}
	}
}

func TestGuestAddress(t *testing.T) {
	for text, good := range map[string]bool{"10.88.3.4": true, "10.99.0.1": false, "::1": false, "": false, "10.88.0.1/32": false, "::ffff:10.88.0.1": false} {
		if _, err := guestAddress(text); (err == nil) != good {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// FuzzOrder reads what a control plane sends.
func FuzzOrder(f *testing.F) {
	f.Add([]byte(`{"epoch":{"number":3,"instances":["a"]},"instances":[{"id":"a","address":"10.88.0.1","ticket":{}}]}`))
	f.Add([]byte(`{"instances":[{"id":"../a","address":"::1"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var d wire.Desired
		if json.Unmarshal(raw, &d) != nil {
			return
		}
		j := &journal{dir: t.TempDir()}
		for _, i := range d.Instances {
			if a, err := guestAddress(i.Address); err == nil {
				guestMAC(a)
				machineUser(a)
			}
			if err := j.put(entry{Instance: i}); err == nil && strings.ContainsRune(i.ID, '/') {
				t.Errorf("an instance called %q was written", i.ID)
			}
		}
	})
}
