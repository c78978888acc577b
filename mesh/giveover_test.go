package mesh

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// A proxy that took over ends when it gives over in turn, with all that its plan
// has begun in it.
func TestGiveOverTwice(t *testing.T) {
	dir := t.TempDir()
	analyser, err := net.Listen("unix", filepath.Join(dir, "m"))
	if err != nil {
		t.Fatal(err)
	}
	defer analyser.Close()
	go func() {
		for {
			c, err := analyser.Accept()
			if err != nil {
				return
			}
			go io.Copy(io.Discard, c)
		}
	}()
	listen := func(path string) *net.UnixListener {
		ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	run := func(p *Proxy, nodes, door *net.UnixListener) <-chan error {
		done, given := make(chan error, 1), make(chan error, 1)
		go func() { given <- p.GiveOver(ctx, door) }()
		go func() { done <- errors.Join(p.Run(ctx, nodes), <-given) }()
		return done
	}
	ended := func(what string, done <-chan error) {
		t.Helper()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s does not end", what)
		}
	}
	done := run(New(Options{}), listen(meshSocket(dir)), listen(doorSocket(dir)))
	l, err := link.Dial(ctx, meshSocket(dir), link.Handlers{
		Sign:    func(context.Context, string, []byte) ([][]byte, []byte, error) { return nil, nil, errNoNode },
		Sockets: func(string, int) ([]*os.File, error) { return nil, errNoNode },
		Event:   func(api.Event) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.SetPlan(ctx, plan.Mesh{Generation: 1, TrustDomain: domain, Services: []plan.Service{{Name: "api", Namespace: "bank", Address: netip.MustParseAddr("10.99.0.1"),
		Identity: spiffe("api"), Ports: httpPort, Allow: anyone(), Inspect: &plan.Inspect{Mirror: "unix:" + filepath.Join(dir, "m")}}}}); err != nil {
		t.Fatal(err)
	}
	l.Close()
	for _, what := range []string{"the first", "one that took over"} {
		next := New(Options{})
		nodes, door, err := next.TakeOver(ctx, doorSocket(dir))
		if err != nil {
			t.Fatal(err)
		}
		ended(what, done)
		done = run(next, nodes, door)
	}
	stop()
	ended("the last", done)
}
