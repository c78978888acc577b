package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"hauberk.dev/internal/svidlink"
	"hauberk.dev/internal/unixsock"
	"hauberk.dev/xds"
	"hauberk.dev/xds/envoy"
	"hauberk.dev/xds/xdstest"
)

// reader takes what a keeper hands over, but nothing of the name "bad".
type reader struct {
	mu  sync.Mutex
	has []string // "name key"
}

func (r *reader) take(s *svidlink.Set) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer s.Clear()
	var all []string
	for _, d := range s.Identities {
		if d.Name == "bad" {
			return errors.New("not as it should be")
		}
		all = append(all, d.Name+" "+string(d.Key))
	}
	r.has = all
	return nil
}

func (r *reader) wants(t *testing.T, want ...string) {
	t.Helper()
	xdstest.Until(t, fmt.Sprintf("the proxy to have %q", want), func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return slices.Equal(r.has, want)
	})
}

func secret(name, key string) *envoy.Secret {
	return &envoy.Secret{Name: name, Chain: []byte("chain"), Key: []byte(key)}
}

func workloadSet(key string) *svidlink.Set {
	return &svidlink.Set{Identities: []svidlink.Identity{{Name: "spiffe://a.test/own", Chain: []byte("chain"), Key: []byte(key)}}}
}

// TestRefusedSecrets has the proxy, or the hand-over itself, refuse secrets: what
// the proxy had stays, and what the Workload API says goes on arriving.
func TestRefusedSecrets(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	k := &keeper{log: slog.New(slog.DiscardHandler)}
	path := socketOf(t)
	ln, err := unixsock.ListenStream(path)
	if err != nil {
		t.Fatal(err)
	}
	var r reader
	var running sync.WaitGroup
	running.Go(func() { k.hub.Serve(ctx, ln, k.log) })
	running.Go(func() { svidlink.Follow(ctx, path, r.take, func(error) {}) })
	t.Cleanup(func() { cancel(); running.Wait(); k.clear() })

	k.takeWorkload(workloadSet("w1"))
	r.wants(t, "spiffe://a.test/own w1")
	many := make([]*envoy.Secret, 1025)
	for i := range many {
		many[i] = secret(fmt.Sprint("s", i), "k")
	}
	refused := func(why string, all ...*envoy.Secret) {
		t.Helper()
		var no *xds.Refusal
		if err := k.takeEnvoy(ctx, all); !errors.As(err, &no) || !strings.Contains(no.Why, why) {
			t.Errorf("want a refusal for %s, got %v", why, err)
		}
	}
	refused("not as it should be", secret("bad", "k"))
	k.takeWorkload(workloadSet("w2"))
	r.wants(t, "spiffe://a.test/own w2")
	if err := k.takeEnvoy(ctx, []*envoy.Secret{secret("web", "k1")}); err != nil {
		t.Fatal(err)
	}
	r.wants(t, "spiffe://a.test/own w2", "web k1")
	refused("not as it should be", secret("web", "k2"), secret("bad", "k"))
	k.takeWorkload(workloadSet("w3"))
	r.wants(t, "spiffe://a.test/own w3", "web k1")
	refused("at most 1024", many...)
	k.takeWorkload(workloadSet("w4"))
	r.wants(t, "spiffe://a.test/own w4", "web k1")
	// One that nobody has answered is not what is given back.
	gone, end := context.WithCancel(ctx)
	end()
	if err := k.takeEnvoy(gone, []*envoy.Secret{secret("bad", "k")}); err == nil {
		t.Error("taken, and nobody has answered")
	}
	refused("not as it should be", secret("bad", "k"))
	r.wants(t, "spiffe://a.test/own w4", "web k1")
	if err := k.takeEnvoy(ctx, []*envoy.Secret{secret("web", "k3")}); err != nil {
		t.Fatal(err)
	}
	r.wants(t, "spiffe://a.test/own w4", "web k3")
}
