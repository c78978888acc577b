package mesh

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
)

// What was counted is the same in the next process, and each event is told once.
func TestCountsOutlive(t *testing.T) {
	old := New(Options{})
	c := old.observer.countsOf("api.bank")
	c.connections.Add(3)
	c.callbacks.Add(2)
	c.count("http", 404, "", 0, 3*time.Millisecond)
	c.count("grpc", 200, "7", 1, 2*time.Second)
	old.events.add(api.Event{Kind: api.EventAccessDenied, Reason: "one"})
	for range maxEvents {
		old.events.add(api.Event{Kind: api.EventAccessDenied, Reason: "more"})
	}
	want := old.Metrics()
	s := old.counts()
	if _, ok := old.events.first(); ok {
		t.Error("an event that was handed over is still to be told here")
	}
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var got countsState
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	next := New(Options{})
	next.events.add(api.Event{Reason: "later"})
	b2 := &builder{p: next}
	if err := b2.counts(&got, true); err != nil {
		t.Fatal(err)
	}
	for _, f := range b2.start {
		f()
	}
	if next.Metrics() != want {
		t.Errorf("counts:\n%s\nwant:\n%s", next.Metrics(), want)
	}
	ev, ok := next.events.first()
	if !ok || ev.Reason != "one" || ev.Lost != 1 {
		t.Errorf("the first event is %+v", ev)
	}
	// What another version counts and this one does not is left out, and nothing else.
	for range 20 { // in whatever order
		var s serviceCountsState
		if err := json.Unmarshal([]byte(`{"requests":{"nosuch.0.0":1,"http.2.0":5,"6.1.0":4,"http.99.0":1,"a":1},"took":[3]}`), &s); err != nil {
			t.Fatal(err)
		}
		c := &serviceCounts{}
		err := c.restore(s)
		if err == nil || !strings.Contains(err.Error(), "nosuch") || !strings.Contains(err.Error(), "http.99.0") {
			t.Errorf("said: %v", err)
		}
		if got := c.state(); len(got.Requests) != 2 || got.Requests["http.2.0"] != 5 || got.Requests["redis.1.0"] != 4 || got.Took[0] != 3 {
			t.Errorf("%+v", got)
		}
	}
	for _, bad := range []string{`{"services":{"x":{"requests":{"9.0.0":1}}}}`, `{"services":{"x":{"requests":{"a":1}}}}`} {
		var s countsState
		if err := json.Unmarshal([]byte(bad), &s); err != nil {
			t.Fatal(err)
		}
		if next.restore(&s) == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}
