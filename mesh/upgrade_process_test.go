package mesh

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"hauberk.dev/internal/unixsock"
	"hauberk.dev/mesh/handover"
	"hauberk.dev/test/succession"
)

func TestMain(m *testing.M) { succession.Main(m, playProxy) }

func meshSocket(dir string) string { return filepath.Join(dir, "mesh.sock") }
func doorSocket(dir string) string { return filepath.Join(dir, "next.sock") }

// playProxy does what hauberk-mesh does.
func playProxy(ctx context.Context, part succession.Part) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	p := New(Options{Log: log, Connections: 4096})
	if part.Dies > 0 {
		return dieOnTheWay(ctx, p, part)
	}
	var nodes, door *net.UnixListener
	var err error
	if !part.First {
		nodes, door, err = p.TakeOver(ctx, doorSocket(part.Dir))
	} else if nodes, err = unixsock.Listen(meshSocket(part.Dir)); err == nil {
		door, err = unixsock.Listen(doorSocket(part.Dir))
	}
	if err != nil {
		return err
	}
	fmt.Println("serving")
	given := make(chan error, 1)
	go func() { given <- p.GiveOver(ctx, door) }()
	return errors.Join(p.Run(ctx, nodes), <-given)
}

// dieOnTheWay takes over and is killed some time after it has begun to ask, but before
// it has answered.
func dieOnTheWay(ctx context.Context, p *Proxy, part succession.Part) error {
	p.mu.Lock()
	p.ctx = ctx
	p.mu.Unlock()
	part.Doom()
	return handover.Take(ctx, doorSocket(part.Dir), func(l *handover.Load) (func(), error) {
		_, err := p.build(l, true)
		fmt.Fprintln(os.Stderr, "built", len(l.Items), err)
		select {} // until it is killed
	})
}

// toldTook logs how long the hand-overs took, by the words of those who gave.
func toldTook(t testing.TB, log string) {
	var all []time.Duration
	for _, m := range regexp.MustCompile(`handed over" took=(\S+)`).FindAllStringSubmatch(log, -1) {
		d, err := time.ParseDuration(m[1])
		if err != nil {
			t.Error(err)
		}
		all = append(all, d)
	}
	if len(all) == 0 {
		t.Error("nobody says that he has handed over")
		return
	}
	slices.Sort(all)
	t.Logf("%d hand-overs took %v, median %v, at most %v", len(all), all[0].Round(time.Millisecond), all[len(all)/2].Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond))
}

// Nobody notices that the proxy is replaced, again and again, by another process,
// nor that some of those die before they have its place: no request fails and no
// connection is reset, counted by the callers.
//
// HAUBERK_TEST_UPGRADES=1000 has 1,000 connections and 20 upgrades, instead of
// fewer that take seconds.
func TestUpgrade(t *testing.T) {
	n, guests, upgrades, deaths := 10*len(protocols), 4*len(protocols), 4, 2
	if v := os.Getenv("HAUBERK_TEST_UPGRADES"); v != "" {
		all, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		n, upgrades, deaths = all, 15, 5
	}
	w, bank, web := callWorldOf(t, n+guests, true)
	c := newCallers(t, w, bank, web, n, guests)
	c.progress(1)
	t.Logf("%d connections, %d requests and streams under way", c.open.Load(), c.flight.Load())
	turns := make([]bool, upgrades+deaths)
	for i := range deaths {
		turns[i] = true
	}
	rand.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
	for i, dies := range turns {
		began := time.Now()
		if dies {
			w.line.Fail(60 * time.Millisecond)
		} else {
			w.line.Next()
			w.reconnect()
		}
		t.Logf("%d: dies %v, %v; %d connections, %d under way", i+1, dies, time.Since(began).Round(time.Millisecond), c.open.Load(), c.flight.Load())
		c.progress(1)
	}
	stats, err := w.link.Stats(t.Context())
	if err != nil || stats.Sandboxes["bank-1"].Total < uint64(n+guests) {
		t.Errorf("%d connections counted of %d, %v: counts have not gone along", stats.Sandboxes["bank-1"].Total, n+guests, err)
	}
	if failed, resets := c.end(); failed != 0 || resets != 0 {
		t.Errorf("%d requests failed, %d connections were reset", failed, resets)
	}
	toldTook(t, w.line.Log())
}
