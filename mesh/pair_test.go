package mesh

import (
	"context"
	"net/netip"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/plan"
)

// links counts the ends of links that a proxy has: of pairs, and of TCP.
func links(p *Proxy) (pairs, tcp int) {
	for _, e := range p.registry.all() {
		switch {
		case e.link == nil:
		case e.link.raw.TCP() == nil:
			pairs++
		default:
			tcp++
		}
	}
	return pairs, tcp
}

// pairWorld is two workloads of one node, of which one may call the other.
func pairWorld(t *testing.T, listen string) (w *world, web, bank *box) {
	t.Helper()
	w = newWorldAt(t, Options{}, false, listen)
	web = w.add("web", nil, nil, nil)
	bank = w.add("bank", tcpPort, anyone(), nil)
	w.apply()
	go serveEcho(bank.listen(t, 9000))
	return w, web, bank
}

// A hop within a node is a pair of sockets, both ends of it a link like any other,
// if the gateway's address is the listener's own and not otherwise.
func TestPair(t *testing.T) {
	for listen, want := range map[string][2]int{"127.0.0.1:0": {2, 0}, everywhere: {0, 2}} {
		w, web, _ := pairWorld(t, listen)
		if err := web.call("10.99.0.2:9000", "hello"); err != nil {
			t.Fatal(err)
		}
		if pairs, tcp := links(w.proxy); pairs != want[0] || tcp != want[1] {
			t.Errorf("listening at %s: %d ends of pairs, %d of TCP", listen, pairs, tcp)
		}
	}
}

// What a plan says of a gateway makes a pair only where it is exactly the address
// of the listener the node has given, and while it is open.
func TestPairOnlyWithItself(t *testing.T) {
	w, _, _ := pairWorld(t, "127.0.0.1:0")
	own := w.gateway
	for _, other := range []netip.AddrPort{
		{}, netip.AddrPortFrom(own.Addr(), own.Port()+1), netip.AddrPortFrom(own.Addr(), 0),
		netip.AddrPortFrom(own.Addr().Next(), own.Port()), netip.AddrPortFrom(netip.IPv4Unspecified(), own.Port()),
		netip.AddrPortFrom(netip.IPv6Loopback(), own.Port()),
	} {
		if c := w.proxy.reachItself(other); c != nil {
			t.Errorf("%s, which is not %s, leads here", other, own)
			c.Close()
		}
	}
	load, err := w.proxy.hold()
	if err != nil {
		t.Fatal(err)
	}
	if w.proxy.reachItself(own) != nil {
		t.Error("who has taken the listener away is still there")
	}
	if err := w.proxy.back(load); err != nil {
		t.Fatal(err)
	}
	c := w.proxy.reachItself(own)
	if c == nil {
		t.Fatal("the own address does not lead here")
	}
	c.Close()
}

// A pair counts as a stranger at the door until it has proved who it is: there are
// as many at once as by TCP, each has as much time, and each is told of by an event
// with the proxy's address.
func TestPairAtTheDoor(t *testing.T) {
	w, web, _ := pairWorld(t, "127.0.0.1:0")
	for range maxHandshakes {
		w.proxy.shakes <- struct{}{}
	}
	if err := web.call("10.99.0.2:9000", "hello"); err == nil {
		t.Error("one more is let in")
	}
	ev := w.awaitEvent(api.EventLimit, "256 handshakes at once")
	if source := netip.AddrPortFrom(w.gateway.Addr(), 0).String(); ev.Source != source {
		t.Errorf("the event names %q; want %q", ev.Source, source)
	}
	for range maxHandshakes {
		<-w.proxy.shakes
	}
	if err := web.call("10.99.0.2:9000", "hello"); err != nil {
		t.Error(err)
	}
	began := time.Now()
	c := w.proxy.reachItself(w.gateway) // and says nothing
	defer c.Close()
	c.SetDeadline(time.Now().Add(4 * handshakeTimeout))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || time.Since(began) > 2*handshakeTimeout {
		t.Errorf("who says nothing hears %d bytes and %v after %v", n, err, time.Since(began))
	}
	w.awaitEvent(api.EventPeerRefused, "")
	load, err := w.proxy.hold() // and is not waited for any more
	if err == nil {
		err = w.proxy.back(load)
	}
	if err != nil {
		t.Error(err)
	}
}

// Both ends of a revoked pair are closed, by the certificate as by the instance, and
// nothing of them is left.
func TestPairCut(t *testing.T) {
	for name, epoch := range map[string]func(web, bank *box, serial string) plan.Epoch{
		"caller": func(web, _ *box, _ string) plan.Epoch {
			return plan.Epoch{Number: 1, Instances: []string{web.Instance}}
		},
		"called": func(_, bank *box, _ string) plan.Epoch {
			return plan.Epoch{Number: 1, Instances: []string{bank.Instance}}
		},
		"identity": func(web, _ *box, _ string) plan.Epoch {
			return plan.Epoch{Number: 1, Identities: []string{web.Identity}}
		},
		"certificate": func(_, _ *box, serial string) plan.Epoch { return plan.Epoch{Number: 1, Serials: []string{serial}} },
	} {
		t.Run(name, func(t *testing.T) {
			w, web, bank := pairWorld(t, "127.0.0.1:0")
			c := web.mustDial(t, "10.99.0.2:9000")
			if err := roundTrip(c, "up"); err != nil {
				t.Fatal(err)
			}
			stats, err := w.link.Stats(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			receipt, err := w.link.Cut(context.Background(), epoch(web, bank, stats.Sandboxes[web.Instance].Serial))
			if err != nil || receipt.Connections != 2 {
				t.Errorf("receipt %+v, %v", receipt, err)
			}
			if err := roundTrip(c, "down"); err == nil {
				t.Error("a cut connection carries bytes")
			}
			for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
				pairs, tcp := links(w.proxy)
				if pairs+tcp == 0 {
					return
				}
				if time.Now().After(end) {
					t.Fatalf("%d ends of pairs and %d of TCP are left", pairs, tcp)
				}
			}
		})
	}
}

// A process that knows no pairs is given TCP in their place, over which everything
// goes on; if it dies, here too.
func TestPairForAnOlderVersion(t *testing.T) {
	w, web, _ := pairWorld(t, "127.0.0.1:0")
	c := web.mustDial(t, "10.99.0.2:9000")
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	load, err := w.proxy.holdAs(firstOfPairs - 1)
	if err != nil {
		t.Fatal(err)
	}
	if load.Version != firstOfPairs-1 {
		t.Errorf("version %d; want %d", load.Version, firstOfPairs-1)
	}
	if err := w.proxy.back(load); err != nil {
		t.Fatal(err)
	}
	if pairs, tcp := links(w.proxy); pairs != 0 || tcp != 2 {
		t.Errorf("%d ends of pairs, %d of TCP", pairs, tcp)
	}
	if err := roundTrip(c, "after"); err != nil {
		t.Error(err)
	}
}
