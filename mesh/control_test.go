package mesh

import (
	"os"
	"strings"
	"testing"

	"hauberk.dev/plan"
)

// A sandbox that is here keeps what it has when it is added again with sockets that
// are none.
func TestAddedAgainWithoutSockets(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	api := w.add("api", []plan.Port{{Port: 9000, Protocol: "tcp"}}, anyone(), nil)
	w.apply()
	go serveEcho(api.listen(t, 9000))
	c := web.mustDial(t, "10.99.0.2:9000")
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	none, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer none.Close()
	for _, b := range []*box{web, api} {
		other := b.Sandbox
		other.Service = "other"
		if err := w.link.AddSandbox(t.Context(), other, b.files[0], b.files[1], none); err == nil || !strings.Contains(err.Error(), "take listener") {
			t.Errorf("%s: %v", b.Instance, err)
		}
	}
	if err := roundTrip(c, "after"); err != nil {
		t.Errorf("a connection that was there: %v", err)
	}
	if err := web.call("10.99.0.2:9000", "new"); err != nil {
		t.Errorf("a new connection: %v", err)
	}
	// One that was not here is not.
	fresh := api.Sandbox
	fresh.Instance, fresh.Address = "api-2", fresh.Address.Next()
	if err := w.link.AddSandbox(t.Context(), fresh, none, none, none); err == nil {
		t.Error("sockets that are none were taken")
	}
	if s, err := w.link.Stats(t.Context()); err != nil || len(s.Sandboxes) != 2 {
		t.Errorf("%+v, %v", s.Sandboxes, err)
	}
}
