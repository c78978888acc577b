package mesh

import (
	"errors"
	"strings"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// asks makes requests of a service over one connection.
func asks(t *testing.T, web *box, target string, times int) {
	t.Helper()
	c := web.mustDial(t, "10.99.0.2:8080")
	defer c.Close()
	for range times {
		if status, _, _, err := request1(t, c, get(target)); status != 200 || err != nil {
			t.Fatalf("%s: %d, %v", target, status, err)
		}
	}
}

// analysed is what the proxy says of the service that is looked at.
func (w *world) analysed() api.Analysis {
	w.t.Helper()
	s, err := w.link.Stats(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return s.Analysis["bank/api"]
}

// takeLearnt asks for what was learnt, as a node does that keeps it.
func (w *world) takeLearnt() {
	w.t.Helper()
	b, err := w.link.Learnt(w.t.Context(), "bank/api")
	if err != nil || len(b) == 0 {
		w.t.Fatalf("%d bytes were learnt: %v", len(b), err)
	}
	w.learnt = map[string][]byte{"bank/api": b}
}

// again has another proxy, which knows nothing, take the place of one that is gone.
func (w *world) again() {
	w.t.Helper()
	w.link.Close()
	w.stopProxy()
	w.startProxy()
	w.connect()
}

func (w *world) found() (all []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.events {
		if e.Kind == api.EventFinding {
			all = append(all, e.Rule)
		}
	}
	return all
}

// What was learnt outlives the proxy: one that judges goes on judging, from the
// first request on, and says since when it learns. Without that it would learn anew.
func TestLearntOutlivesTheProxy(t *testing.T) {
	for _, kept := range []bool{true, false} {
		w, web, _ := watched(t, plan.Inspect{Observe: 1, Learn: 20})
		asks(t, web, "/items", 25)
		before := w.analysed()
		if before.Learnt != 25 || time.Since(before.Since) > time.Hour {
			t.Fatalf("learnt %+v", before)
		}
		if kept {
			w.takeLearnt()
		}
		w.again()
		asks(t, web, "/admin", 1)
		now := w.analysed()
		if !kept {
			if found := w.found(); len(found) > 0 || now.Learnt != 1 || !now.Since.After(before.Since) {
				t.Errorf("one that learns has found %q; %+v", found, now)
			}
			continue
		}
		w.awaitEvent(api.EventFinding, "new-route")
		if now.Learnt != 26 || !now.Since.Equal(before.Since) {
			t.Errorf("goes on as %+v from %+v", now, before)
		}
		if m := w.proxy.Metrics(); !strings.Contains(m, `hauberk_mesh_learnt_requests{service="bank/api"} 26`) {
			t.Errorf("metrics:\n%s", m)
		}
	}
}

// One that learns goes on learning where it was, and judges when it has learnt.
func TestLearningOutlivesTheProxy(t *testing.T) {
	w, web, _ := watched(t, plan.Inspect{Observe: 1, Learn: 20})
	asks(t, web, "/items", 10)
	w.takeLearnt()
	w.again()
	asks(t, web, "/other", 9)
	if found := w.found(); len(found) > 0 {
		t.Fatalf("one that learns has found %q", found)
	}
	asks(t, web, "/items", 1)
	asks(t, web, "/third", 1)
	w.awaitEvent(api.EventFinding, "new-route")
}

// What a node has kept takes the place of what was learnt for less long, and of
// nothing else; what is no schema, or of a workload that is not looked at, of nothing.
func TestRelearn(t *testing.T) {
	w, web, _ := watched(t, plan.Inspect{Observe: 1, Learn: 20})
	asks(t, web, "/items", 25)
	w.takeLearnt()
	old := w.analysed()
	give := func(b []byte) error { return w.link.Relearn(t.Context(), "bank/api", b) }
	asks(t, web, "/items", 5)
	if err := give(w.learnt["bank/api"]); err != nil || w.analysed().Learnt != 30 {
		t.Errorf("what is as old was taken: %+v, %v", w.analysed(), err)
	}
	var refused *link.RefusedError
	for _, bad := range []string{"{", `{"version":99}`} {
		if err := give([]byte(bad)); !errors.As(err, &refused) || !errors.Is(err, link.ErrUseless) || w.analysed().Learnt != 30 {
			t.Errorf("%q was taken: %v", bad, err)
		}
	}
	kept := w.learnt
	w.learnt = nil
	w.again()
	asks(t, web, "/else", 3)
	if err := give(kept["bank/api"]); err != nil || w.analysed().Learnt != 25 || !w.analysed().Since.Equal(old.Since) {
		t.Errorf("what was learnt for longer was not taken: %+v, %v", w.analysed(), err)
	}
	asks(t, web, "/else", 1)
	w.awaitEvent(api.EventFinding, "new-route")

	// Not looked at any more, and again: that is another.
	i := w.service("api").Inspect
	w.service("api").Inspect = nil
	w.plan.Generation++
	w.apply()
	if b, err := w.link.Learnt(t.Context(), "bank/api"); err != nil || b != nil {
		t.Errorf("of what is not looked at %d bytes are known, %v", len(b), err)
	}
	if err := give(kept["bank/api"]); err != nil {
		t.Error(err)
	}
	w.apply() // which does not name it
	w.service("api").Inspect = i
	w.plan.Generation++
	w.apply()
	if now := w.analysed(); now.Learnt != 0 || !now.Since.After(old.Since) {
		t.Errorf("one that is looked at anew knows %+v", now)
	}
}
