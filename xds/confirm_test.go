package xds_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"golang.org/x/net/http2"

	"hauberk.dev/plan"
	"hauberk.dev/xds"
	"hauberk.dev/xds/envoy"
	"hauberk.dev/xds/xdstest"
)

// acked counts the answers of a kind that refuse nothing.
func (w *world) acked(kind envoy.Kind) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.requests {
		if r.TypeUrl == kind.URL() && r.ResponseNonce != "" && r.ErrorDetail == nil {
			n++
		}
	}
	return n
}

// judge is a proxy that can refuse, or be away.
type judge struct {
	mu    sync.Mutex
	fault func(*plan.Proxy) error
	last  plan.Proxy
}

func (j *judge) apply(_ context.Context, p *plan.Proxy) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.fault != nil {
		if err := j.fault(p); err != nil {
			return err
		}
	}
	j.last = *p
	return nil
}

func (j *judge) set(fault func(*plan.Proxy) error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.fault = fault
}

func (j *judge) clusters() (names []string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, c := range j.last.Clusters {
		names = append(names, c.Name)
	}
	return names
}

func (j *judge) options(o *xds.Options) {
	o.Apply, o.Confirm, o.ApplyAgain = j.apply, true, 5*time.Millisecond
}

func refusing(name string) func(*plan.Proxy) error {
	return func(p *plan.Proxy) error {
		if slices.ContainsFunc(p.Clusters, func(c plan.Cluster) bool { return c.Name == name && len(c.Upstreams) > 0 }) {
			return &xds.Refusal{Kind: envoy.Clusters, Name: name, Why: "the proxy has no such thing"}
		}
		return nil
	}
}

func static(name string, port uint32) *cluster.Cluster {
	c := xdstest.Cluster(name)
	c.ClusterDiscoveryType, c.EdsClusterConfig = nil, nil
	c.LoadAssignment = xdstest.Endpoints(name, port)
	return c
}

// TestConfirmNamed proves that what the proxy refuses of a response is the reason
// of its NACK, that the rest of the response is in force, and that the state from
// before stays under the name that was refused.
func TestConfirmNamed(t *testing.T) {
	w, j := newWorld(t), &judge{}
	p := w.run(j.options)
	w.set("1", static("a", 1))
	xdstest.Until(t, "the first cluster", func() bool { return slices.Equal(j.clusters(), []string{"a"}) })
	j.set(refusing("bad"))
	w.set("2", static("a", 2), static("bad", 3), static("c", 4))
	xdstest.Until(t, "the NACK", func() bool { return len(w.refusals()) == 1 })
	if got := w.refusals()[0]; got != `clusters "bad": the proxy has no such thing` {
		t.Errorf("NACK says %q", got)
	}
	if got := j.clusters(); !slices.Equal(got, []string{"a", "c"}) {
		t.Errorf("in force are %q", got)
	}
	if s := p.Status(); len(s.Refused) != 1 || s.Nacks != 1 || s.Resources["clusters"] != 2 {
		t.Errorf("status is %+v", s)
	}
	j.set(nil)
	w.set("3", static("a", 2), static("bad", 5), static("c", 4))
	xdstest.Until(t, "the mended one", func() bool { return slices.Equal(j.clusters(), []string{"a", "bad", "c"}) })
	xdstest.Until(t, "no refusal to be left", func() bool { return len(p.Status().Refused) == 0 })
}

// TestConfirmUndoesAll proves that a response whose culprit nobody knows is as if
// it had never come, endpoints included that only what it replaced spoke of.
func TestConfirmUndoesAll(t *testing.T) {
	w, j := newWorld(t), &judge{}
	p := w.run(j.options)
	w.set("1", xdstest.Cluster("a"), xdstest.Endpoints("a", 1), xdstest.Listener(t, "l", 80, "r"), routes("r", "a"))
	xdstest.Until(t, "everything", func() bool { return p.Status().Digest == w.digest() })
	before := p.Status().Digest
	j.set(func(p *plan.Proxy) error {
		for _, c := range p.Clusters {
			if c.Name == "a" && slices.ContainsFunc(c.Upstreams, func(u plan.Upstream) bool { return u.Address.Port() == 9 }) {
				return &xds.Refusal{Why: "something is wrong"}
			}
		}
		return nil
	})
	w.set("2", static("a", 9), static("b", 2), xdstest.Endpoints("a", 1), xdstest.Listener(t, "l", 80, "r"), routes("r", "a"))
	xdstest.Until(t, "the NACK", func() bool { return slices.Contains(w.refusals(), "something is wrong") })
	if s := p.Status(); s.Digest != before || s.Resources["clusters"] != 1 || s.Resources["endpoints"] != 1 {
		t.Errorf("status is %+v, want digest %s", s, before)
	}
	j.set(nil)
	w.set("3", xdstest.Cluster("a"), xdstest.Endpoints("a", 1, 2), xdstest.Listener(t, "l", 80, "r"), routes("r", "a"))
	xdstest.Until(t, "the next version", func() bool { return p.Status().Digest == w.digest() })
	if got := p.Status(); len(got.Refused) != 0 {
		t.Errorf("refused is %q", got.Refused)
	}
}

// TestConfirmWaits proves that nothing is acknowledged while the proxy is away.
func TestConfirmWaits(t *testing.T) {
	w, j := newWorld(t), &judge{}
	var tries atomic.Int32
	j.set(func(p *plan.Proxy) error { tries.Add(1); return errors.New("the proxy is away") })
	p := w.run(j.options)
	w.set("1", static("a", 1), xdstest.Listener(t, "l", 80, "r"), routes("r", "a"))
	xdstest.Until(t, "some tries", func() bool { return tries.Load() > 5 })
	if w.acked(envoy.Listeners) != 0 {
		t.Error("listeners are acknowledged, and not in force")
	}
	if s := p.Status(); s.ApplyError != "the proxy is away" || s.Nacks > 0 {
		t.Errorf("status is %+v", s)
	}
	w.stop() // the stream ends meanwhile, and the next one is answered
	xdstest.Until(t, "the client to notice", func() bool { return !p.Status().Connected })
	j.set(nil)
	w.start()
	xdstest.Until(t, "all to be in force", func() bool { return p.Status().Digest == w.digest() })
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.last.Listeners) != 1 {
		t.Errorf("applied is %+v", j.last)
	}
}

// TestNoStreamAllowed proves that a server that lets no stream begin is left and
// asked again.
func TestNoStreamAllowed(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				if _, err := c.Read(make([]byte, len(http2.ClientPreface))); err != nil {
					return
				}
				f := http2.NewFramer(c, c)
				f.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 0})
				for {
					if _, err := f.ReadFrame(); err != nil {
						return
					}
				}
			})
		}
	})
	defer serving.Wait()
	defer ln.Close()
	w := &world{t: t, socket: socket}
	p := w.run(func(o *xds.Options) { o.OpenTimeout = 20 * time.Millisecond })
	defer p.stop()
	xdstest.Until(t, "the reason, more than once", func() bool {
		s := p.Status()
		return s.Attempts > 1 && strings.Contains(s.Error, "lets none begin within 20ms")
	})
}
