package mesh

import (
	"io"
	"slices"
	"strings"
	"testing"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/plan"
)

// What a server asks over the connection of its client passes as it is, is counted,
// and is told of once for a connection; answers and heartbeats are not.
func TestCallbacksAreTold(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("api", []plan.Port{{Port: 12200, Protocol: "bolt"}, {Port: 20880, Protocol: "dubbo"}}, anyone(), nil)
	w.apply()
	boltLn, dubboLn := b.listen(t, 12200), b.listen(t, 20880)
	for _, c := range []struct {
		port  string
		ask   []byte
		reply func(io.ReadWriter) ([]byte, error)
		count string
	}{
		{"12200", boltCall(1, sofaService, "get", false, "\x90"), func(c io.ReadWriter) ([]byte, error) {
			f, err := readBolt(c)
			return slices.Concat(boltCall(7, sofaService, "back", false, "\x90"), beat(8), boltCall(9, sofaService, "back", true, "\x90"), bolt.AppendError(nil, &f, bolt.OK, "done")), err
		}, "2"},
		{"20880", dubboCall(1, "org.bank.Ledger", "", "get"), func(c io.ReadWriter) ([]byte, error) {
			f, err := readDubbo(c)
			return slices.Concat(dubboCall(7, "org.bank.Back", "", "call"), dubbo.AppendError(nil, &f, dubbo.OK, "done")), err
		}, "3"},
	} {
		ln := boltLn
		if c.port == "20880" {
			ln = dubboLn
		}
		client := web.mustDial(t, "10.99.0.2:"+c.port)
		if _, err := client.Write(c.ask); err != nil {
			t.Fatal(err)
		}
		far, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		want, err := c.reply(far)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := far.Write(want); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(client, got); err != nil || string(got) != string(want) {
			t.Errorf("%s: %q, %v; want %q", c.port, got, err, want)
		}
		line := `hauberk_mesh_callbacks_total{service="api.bank"} ` + c.count + "\n"
		until(t, line, func() bool { return strings.Contains(w.proxy.Metrics(), line) })
		client.Close()
		far.Close()
	}
	w.awaitEvent(api.EventFinding, "makes requests over the connection of its client")
	until(t, "one event for each connection", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		n := 0
		for _, e := range w.events {
			if e.Kind == api.EventFinding {
				n++
			}
		}
		return n == 2
	})
}
