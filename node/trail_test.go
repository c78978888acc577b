package node

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/guard"
	"hauberk.dev/guard/trail"
)

// told is the agent's word that a refused exec was repeated 999 times.
func told() []byte {
	b := make([]byte, 48)
	b[0], b[1], b[2] = 2, byte(guard.OpRepeated), byte(guard.Denied)
	binary.LittleEndian.PutUint32(b[8:], 1)
	binary.LittleEndian.PutUint64(b[16:], 7)
	binary.LittleEndian.PutUint64(b[24:], 999)
	b[40] = byte(guard.OpExec)
	return b
}

// Histories of instances that are gone are kept as long as they are among the
// newest; one of an instance that lives is kept in any case.
func TestOldHistoriesGo(t *testing.T) {
	n := &Node{slog: slog.New(slog.DiscardHandler), actors: map[string]*actor{"lives": {}}}
	n.guests = &guests{n: n, histories: t.TempDir()}
	for i, name := range []string{"lives.jsonl", "begins.jsonl", "old.jsonl", "old.jsonl.1", "newer.jsonl", "newest.jsonl", "other"} {
		path := filepath.Join(n.guests.histories, name)
		at := time.Unix(int64(i)*1000, 0)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.guests.forgetHistories(2, "begins"); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(n.guests.histories + "/*")
	if err != nil {
		t.Fatal(err)
	}
	for i := range left {
		left[i] = filepath.Base(left[i])
	}
	if want := []string{"begins.jsonl", "lives.jsonl", "newer.jsonl", "newest.jsonl", "other"}; !slices.Equal(left, want) {
		t.Errorf("%q are left, want %q", left, want)
	}
}

// What the Guard told is kept, given out and counted, with the node's own word
// for where it was; what is no record, or no instance, is refused.
func TestEventsAreKept(t *testing.T) {
	var log bytes.Buffer
	n := &Node{slog: slog.New(slog.NewTextHandler(&log, nil)), actors: map[string]*actor{}}
	n.conf.Name = "n1"
	n.guests = &guests{n: n, histories: t.TempDir()}
	s := &sandbox{g: n.guests, id: "web-1"}
	instance := wire.Instance{ID: "web-1", Namespace: "bank", Workload: "web", Digest: "sha256:aa", Spec: spec.Workload{Application: "shop", Image: "bank/web"}}
	if err := s.openTrail(instance); err != nil {
		t.Fatal(err)
	}
	s.policy = guard.Compiled{Digest: "d", Rules: []guard.Rule{{ID: 1, Policy: "built in", Text: "nothing", Severity: spec.SeverityWarning}}}
	s.record(told())
	s.record([]byte("no record"))
	if !strings.Contains(log.String(), "event of web-1") {
		t.Errorf("the log says %q; want the bytes that are no record named", &log)
	}
	s.tally(map[guard.Op]guard.Tally{guard.OpExec: {Happened: 1004, Sent: 1, Merged: 998, Lost: 5}})
	s.tally(map[guard.Op]guard.Tally{guard.OpExec: {Happened: 1004, Sent: 1, Merged: 998, Lost: 5}})
	if err := s.closeTrail(); err != nil {
		t.Fatal(err)
	}
	var got []trail.Record
	answer := ask(n, "web-1")
	if err := trail.Scan(answer.Body, func(r trail.Record) error { got = append(got, r); return nil }); err != nil {
		t.Fatal(err)
	}
	want := trail.Sandbox{ID: "web-1", Image: "bank/web", ImageDigest: "sha256:aa", Node: "n1", Namespace: "bank", Workload: "web", Application: "shop"}
	if len(got) != 2 || got[0].Count != 999 || got[0].Policy != "built in" || got[0].Sandbox != want || got[1].Verdict != trail.VerdictLost || got[1].Count != 5 {
		t.Errorf("%+v; want the repetition, and one loss of 5", got)
	}
	for _, id := range []string{"", "web-2", "../web-1", "a/../web-1"} {
		if code := ask(n, id).StatusCode; code != http.StatusNotFound {
			t.Errorf("events of %q: status %d; want a refusal", id, code)
		}
	}
	var metrics bytes.Buffer
	n.metrics.WriteTo(&metrics)
	if line := `hauberk_guard_acts_total{workload="bank/web",op="exec",verdict="denied"} 999`; !strings.Contains(metrics.String(), line) {
		t.Errorf("no %s in\n%s", line, &metrics)
	}
}

func ask(n *Node, id string) *http.Response {
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, "/v1/events", nil)
	r.Form = map[string][]string{"instance": {id}}
	n.events(w, r)
	return w.Result()
}
