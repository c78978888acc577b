package check

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/client"
)

func good(string) func(context.Context) (string, error) {
	return func(context.Context) (string, error) { return "fine", nil }
}

func TestRun(t *testing.T) {
	bad := Check{"bad", func(context.Context) (string, error) {
		return "this", errors.Join(errors.New("one"), errors.New("two"))
	}}
	ok := Check{"ok", good("")}
	for _, c := range []struct {
		name  string
		suite Suite
		ok    bool
		links int
	}{
		{"all good", Suite{Links: []Check{ok, ok}, Attacks: []Check{ok}, After: []Check{ok}}, true, 3},
		{"a link", Suite{Links: []Check{ok, bad}, Attacks: []Check{ok}}, false, 2},
		{"an attack", Suite{Links: []Check{ok}, Attacks: []Check{ok, bad}}, false, 1},
		{"after", Suite{Links: []Check{ok}, Attacks: []Check{ok}, After: []Check{bad}}, false, 2},
		{"no links", Suite{Attacks: []Check{ok}}, false, 0},
		{"no attacks", Suite{Links: []Check{ok}}, false, 1},
	} {
		restored := false
		c.suite.Restore = func(context.Context) error { restored = true; return nil }
		r := Run(t.Context(), c.suite, nil)
		if r.OK != c.ok || len(r.Links) != c.links || !restored {
			t.Errorf("%s: %+v", c.name, r)
		}
	}
	r := Run(t.Context(), Suite{Links: []Check{bad}}, nil)
	if r.Links[0].OK || r.Links[0].Seen != "this; one; two" {
		t.Errorf("seen %+v", r.Links[0])
	}
}

func TestRunIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		endless := Check{"endless", func(ctx context.Context) (string, error) { <-ctx.Done(); return "", ctx.Err() }}
		r := Run(t.Context(), Suite{Links: []Check{endless, {"next", good("")}}}, nil)
		if r.Links[0].OK || !strings.Contains(r.Links[0].Seen, "not done within") || r.Links[0].Millis != within.Milliseconds() || !r.Links[1].OK {
			t.Errorf("%+v", r.Links)
		}
	})
}

// town is a control plane with one sandbox, in which an attack goes as told.
type town struct {
	mu        sync.Mutex
	said      string // by the attack
	frozen    bool   // in the act
	denial    string // in the ledger
	unwitness bool   // nothing was recorded of the freezing
	attacked  bool
}

func (w *town) start(t *testing.T) *bank {
	mux := http.NewServeMux()
	tell := func(path string, f func() any) {
		mux.HandleFunc(path, func(rw http.ResponseWriter, r *http.Request) {
			w.mu.Lock()
			defer w.mu.Unlock()
			json.NewEncoder(rw).Encode(f())
		})
	}
	tell(admin.PathStatus, func() any { return admin.Status{Ledger: admin.Ledger{Size: 5}} })
	tell(admin.PathInstances, func() any {
		return []admin.Instance{{Name: "assistant-1", Namespace: "bank", Workload: "assistant", Phase: "Running"}}
	})
	tell(admin.PathIncidents, func() any {
		list := []admin.Incident{{Name: "old", Instance: "assistant-0", State: "Contained"}}
		if w.attacked && w.frozen && !w.unwitness {
			list = append(list, admin.Incident{Name: "new", Instance: "assistant-1", State: "Contained", Rule: "the rule"})
		}
		return list
	})
	tell(admin.PathLedger, func() any {
		if w.denial == "" {
			return []admin.LedgerEntry{}
		}
		raw, _ := json.Marshal(map[string]string{"kind": "guard.denial", "instance": "assistant-1", "text": w.denial})
		return []admin.LedgerEntry{{Index: 6, Entry: raw}}
	})
	mux.HandleFunc(admin.PathExec, w.exec)
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(mux)
	srv.Listener.Close()
	srv.Listener = ln
	srv.Start()
	t.Cleanup(srv.Close)
	return &bank{Target: Target{Client: client.New(socket)}, namespace: "bank", before: map[string]bool{}}
}

func (w *town) exec(rw http.ResponseWriter, r *http.Request) {
	conn, buf, err := http.NewResponseController(rw).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+admin.StreamProtocol+"\r\n\r\n")
	w.mu.Lock()
	w.attacked = true
	frozen, said := w.frozen, w.said
	w.mu.Unlock()
	if frozen {
		io.Copy(io.Discard, buf) // says nothing, until the other end has had enough
		return
	}
	admin.WriteFrame(conn, admin.FrameStdout, []byte(said))
	admin.WriteFrame(conn, admin.FrameExit, binary.BigEndian.AppendUint32(nil, 0))
}

// TestAttackIsJudgedHonestly shows that what was not stopped, or not recorded,
// or not shown at all, is not called stopped.
func TestAttackIsJudgedHonestly(t *testing.T) {
	const failed = `{"attack":"x","succeeded":false,"seen":"EPERM"}`
	for _, c := range []struct {
		name string
		town *town
		want string // "" means stopped
	}{
		{"refused and recorded", &town{said: failed, denial: "tried to reach 203.0.113.7:443"}, ""},
		{"frozen in the act", &town{frozen: true}, ""},
		{"worked", &town{said: `{"succeeded":true,"seen":"it ran"}`, denial: "203.0.113.7"}, "the attack worked"},
		{"refused, no record", &town{said: failed}, "no record"},
		{"refused, another record", &town{said: failed, denial: "something else"}, "no record"},
		{"no answer", &town{said: ""}, "the attack said"},
		{"an answer of another kind", &town{said: "usage: attack"}, "the attack said"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			seen, err := c.town.start(t).attack(t.Context(), "203.0.113.7", "x")
			if c.want == "" && (err != nil || seen == "") || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("seen %q, %v; want %q", seen, err, c.want)
			}
		})
	}
}

// TestSilenceIsNoProof shows that an attack of which nothing was heard is not
// called stopped, whatever else was refused meanwhile.
func TestSilenceIsNoProof(t *testing.T) {
	w := town{frozen: true, unwitness: true, denial: "203.0.113.7"}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if seen, err := w.start(t).attack(ctx, "203.0.113.7", "x"); err == nil {
		t.Errorf("stopped: %q", seen)
	}
}

func TestForge(t *testing.T) {
	cert, err := forge("spiffe://d/ns/n/sa/s")
	if err != nil || cert.Leaf != nil && cert.Leaf.URIs[0].String() != "spiffe://d/ns/n/sa/s" || len(cert.Certificate) != 1 {
		t.Errorf("%v, %v", cert, err)
	}
	if _, err := fromKubeconfig(filepath.Join(t.TempDir(), "absent")); err == nil {
		t.Error("no kubeconfig, no error")
	}
}
