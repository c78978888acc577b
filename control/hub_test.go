package control

import (
	"bufio"
	"context"
	"io"
	"testing"
	"time"

	wire "hauberk.dev/api/node"
)

func TestHubRefusesForeignHellos(t *testing.T) {
	h := newHub(time.Now, func() {})
	for name, in := range map[string]wire.Hello{
		"other version": {Version: wire.Version + 1, Node: "n1"},
		"other name":    {Version: wire.Version, Node: "n2"},
	} {
		if err := h.hello("n1", in); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if nodes, _, _ := h.snapshot(); len(nodes) != 0 {
		t.Errorf("a refused node is known: %v", nodes)
	}
}

func TestNodeIsLostWhenSilent(t *testing.T) {
	now := time.Now()
	h := newHub(func() time.Time { return now }, func() {})
	if err := h.hello("n1", wire.Hello{Version: wire.Version, Node: "n1"}); err != nil {
		t.Fatal(err)
	}
	if nodes, _, _ := h.snapshot(); !nodes["n1"].ready {
		t.Error("not ready after hello")
	}
	now = now.Add(lostAfter)
	if nodes, _, _ := h.snapshot(); nodes["n1"].ready {
		t.Error("still ready after a long silence")
	}
	h.status("n1", wire.Status{})
	if nodes, _, _ := h.snapshot(); !nodes["n1"].ready {
		t.Error("not ready after it spoke again")
	}
}

func TestOnlyNewsIsTold(t *testing.T) {
	told := 0
	h := newHub(time.Now, func() { told++ })
	s := wire.Status{Instances: []wire.InstanceStatus{{ID: "a", Phase: wire.PhaseRunning}}}
	h.status("n1", s)
	s.Instances[0].Guard.Sequence = 9
	h.status("n1", s)
	if told != 1 {
		t.Errorf("a heartbeat was told as news: %d", told)
	}
	s.Instances = []wire.InstanceStatus{{ID: "a", Phase: wire.PhaseExited}}
	h.status("n1", s)
	if told != 2 {
		t.Errorf("the end of an instance was not told: %d", told)
	}
}

func TestWatchSendsEachOrderOnce(t *testing.T) {
	h := newHub(time.Now, func() {})
	h.order("n1", []byte(`{"a":1}`))
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.watch(ctx, "n1", w, func() error { return nil }) }()
	lines := bufio.NewScanner(r)
	next := func() string {
		for lines.Scan() {
			if lines.Text() != "" {
				return lines.Text()
			}
		}
		return ""
	}
	if got := next(); got != `{"a":1}` {
		t.Errorf("first order %q", got)
	}
	h.order("n1", []byte(`{"a":1}`)) // unchanged: must not be sent again
	h.order("n1", []byte(`{"a":2}`))
	if got := next(); got != `{"a":2}` {
		t.Errorf("second order %q", got)
	}
	cancel()
	go io.Copy(io.Discard, r) // a last beat may still be written
	if err := <-done; err == nil {
		t.Error("the watch ended without saying why")
	}
}
