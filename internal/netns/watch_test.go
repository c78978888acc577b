package netns

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// proxied answers every intercepted connection with where it was going.
func proxied(t *testing.T, ns *Namespace) {
	t.Helper()
	f, err := ns.ListenTransparent()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.FileListener(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s>%s", c.RemoteAddr().(*net.TCPAddr).IP, c.LocalAddr())
			c.Close()
		}
	}()
}

func mustWatch(t *testing.T, ns *Namespace) *Watch {
	t.Helper()
	w, changes, err := ns.Watch(guest)
	if err != nil || len(changes) > 0 {
		t.Fatalf("watch: %q, %v", changes, err)
	}
	return w
}

// TestLookFindsTampering changes one thing after the other of what holds a
// namespace closed. Each is found and put right, and what the guest dials is
// intercepted as before.
func TestLookFindsTampering(t *testing.T) {
	ns, peer := pair(t)
	proxied(t, ns)
	w := mustWatch(t, ns)
	for want, command := range map[string]string{
		"":                                      "true",
		"table ip hauberk is gone":              "nft delete table ip hauberk",
		"table netdev hauberk is gone":          "nft delete table netdev hauberk",
		"rule of ip hauberk prerouting is gone": "nft flush chain ip hauberk prerouting",
		"rule of ip hauberk prerouting was changed":        "nft insert rule ip hauberk prerouting ip daddr 192.0.2.1 accept",
		"rule of netdev hauberk ingress was changed":       "nft insert rule netdev hauberk ingress accept",
		"rule of ip hauberk forward is gone":               "nft flush chain ip hauberk forward",
		"chain ip hauberk forward was changed":             "nft 'chain ip hauberk forward { policy accept; }'",
		"table ip before is not ours":                      "nft 'table ip before { chain p { type filter hook prerouting priority -200; ip daddr 192.0.2.1 drop; }; }'",
		"table of family 10 out is not ours":               "nft 'table ip6 out { }'",
		"forwarding was changed":                           "sysctl -qw net.ipv4.ip_forward=1 || echo 1 >/proc/sys/net/ipv4/ip_forward",
		"forwarding of tap0 was changed":                   "echo 1 >/proc/sys/net/ipv4/conf/tap0/forwarding",
		"link out is not ours":                             "ip link add out type veth peer name far && ip link set out up",
		"link tap0 was changed":                            "ip link add br0 type bridge && ip link set tap0 master br0",
		"link lo was changed":                              "tc qdisc add dev lo clsact",
		"routing rule 5 for mark 0 to table 7 is not ours": "ip rule add priority 5 table 7",
		"routing rule 10 for mark 1 to table 100 is gone":  "ip rule del priority 10",
		"route of what is intercepted is gone":             "ip route flush table 100",
		"route of what is intercepted was changed":         "ip route add unreachable 192.0.2.0/24 table 100",
	} {
		if out, err := shell(t, ns, "sh", "-c", command); err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
		changes, err := w.Look()
		if err != nil || want != "" && !slices.Contains(changes, want) || want == "" && len(changes) > 0 {
			t.Errorf("%s: found %q, %v; want %q", command, changes, err, want)
		}
		if changes, err := w.Look(); err != nil || len(changes) > 0 {
			t.Errorf("%s: is not put right: %q, %v", command, changes, err)
		}
		asks(t, peer, "192.0.2.1:80", "10.88.0.5>192.0.2.1:80")
	}
}

// TestWatchOfFoundNamespace has another process close anew what one before it
// left, and find what was changed since.
func TestWatchOfFoundNamespace(t *testing.T) {
	ns, peer := pair(t)
	proxied(t, ns)
	again := &Namespace{name: ns.name, path: ns.path, file: ns.file}
	mustWatch(t, again)
	asks(t, peer, "192.0.2.1:80", "10.88.0.5>192.0.2.1:80")
	if out, err := shell(t, ns, "nft", "flush", "chain", "ip", "hauberk", "prerouting"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, changes, err := again.Watch(guest)
	if want := []string{"rule of ip hauberk prerouting is gone"}; err != nil || !slices.Equal(changes, want) {
		t.Errorf("found %q, %v; want %q", changes, err, want)
	}
	asks(t, peer, "192.0.2.1:80", "10.88.0.5>192.0.2.1:80")
}

// TestMade shows that who reads counters can tell that rules were made anew.
func TestMade(t *testing.T) {
	ns, _ := pair(t)
	w := mustWatch(t, ns)
	for _, want := range []uint64{0, 2, 4} {
		if _, err := w.Look(); err != nil || w.Made() != want {
			t.Errorf("%d after nothing was changed, %v; want %d", w.Made(), err, want)
		}
		if out, err := shell(t, ns, "nft", "flush", "chain", "ip", "hauberk", "prerouting"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if changes, err := w.Look(); err != nil || len(changes) == 0 || w.Made() != want+2 {
			t.Errorf("%d after %q, %v; want %d", w.Made(), changes, err, want+2)
		}
	}
}

// TestNoWayOut gives a namespace a link to the outside and a kernel that
// forwards: with the rules nothing passes, and what tried is counted.
func TestNoWayOut(t *testing.T) {
	ns, peer := pair(t)
	if out, err := shell(t, ns, "sh", "-c", "ip link add out type veth peer name far && ip link set out up && ip addr add 192.0.2.1/24 dev out && "+
		"echo 1 >/proc/sys/net/ipv4/ip_forward && nft delete chain ip hauberk prerouting"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if c, err := dialIn(peer, "tcp4", "192.0.2.2:80"); err == nil {
		c.Close()
		t.Error("a connection left the namespace")
	}
	d, err := ns.Dropped()
	if err != nil || !slices.ContainsFunc(d.Bypass, func(b Drop) bool {
		return b.Destination == netip.MustParseAddr("192.0.2.2") && b.Protocol == 6 && b.Port == 80 && b.Packets > 0
	}) {
		t.Errorf("counted %+v, %v", d, err)
	}
}

// TestConnections tells apart what a process holds, and ends one connection of
// two.
func TestConnections(t *testing.T) {
	ns, peer := pair(t)
	w := mustWatch(t, ns)
	if out, err := shell(t, ns, "sh", "-c", "ip addr add 192.0.2.1/32 dev lo && nft flush chain ip hauberk prerouting"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var ln net.Listener
	if err := ns.Do(func() (err error) { ln, err = net.Listen("tcp4", "192.0.2.1:80"); return err }); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var near, far [2]net.Conn
	for i := range near {
		var err error
		if near[i], err = dialIn(peer, "tcp4", "192.0.2.1:80"); err != nil {
			t.Fatal(err)
		}
		defer near[i].Close()
	}
	if all, err := w.Connections(); err != nil || len(all) != 0 {
		t.Fatalf("nobody has accepted any: %v, %v", all, err)
	}
	for range far {
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		i := 0
		if c.RemoteAddr().String() == near[1].LocalAddr().String() {
			i = 1
		}
		far[i] = c
	}
	all, err := w.Connections()
	if err != nil || len(all) != 2 || all[0].Cookie == all[1].Cookie || all[0].Cookie == 0 {
		t.Fatalf("%v, %v", all, err)
	}
	i := slices.IndexFunc(all, func(c Connection) bool { return c.Remote.String() == near[0].LocalAddr().String() })
	if i < 0 || all[i].Local.String() != "192.0.2.1:80" {
		t.Fatalf("%v", all)
	}
	if err := w.Block(all[i]); err != nil {
		t.Fatal(err)
	}
	far[0].SetDeadline(time.Now().Add(time.Minute))
	if _, err := far[0].Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || strings.Contains(err.Error(), "timeout") {
		t.Errorf("the socket lives: %v", err)
	}
	if left, err := w.Connections(); err != nil || len(left) != 1 || left[0] != all[1-i] {
		t.Errorf("left %v, %v", left, err)
	}
	if _, err := near[1].Write([]byte("x")); err != nil {
		t.Error(err)
	}
	far[1].SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadFull(far[1], make([]byte, 1)); err != nil {
		t.Errorf("the other connection: %v", err)
	}
}

// TestBlockWithoutRoom ends the socket of a connection for which the rules have
// no room any more, and says so.
func TestBlockWithoutRoom(t *testing.T) {
	ns, peer := pair(t)
	w := mustWatch(t, ns)
	var ln net.Listener
	if err := peer.Do(func() (err error) { ln, err = net.Listen("tcp4", "10.88.0.5:8080"); return err }); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	near, err := dialIn(ns, "tcp4", "10.88.0.5:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	err = ns.Do(func() error {
		var some []Connection
		for i := range uint16(blockLimit) {
			some = append(some, Connection{Local: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.9"), 1+i)})
		}
		for part := range slices.Chunk(some, 256) {
			if err := blocked(part); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	all, err := w.Connections()
	if err != nil || len(all) != 1 {
		t.Fatalf("%v, %v", all, err)
	}
	if err := w.Block(all[0]); !errors.Is(err, unix.ENFILE) {
		t.Errorf("a full set took it: %v", err)
	}
	near.SetDeadline(time.Now().Add(time.Minute))
	if _, err := near.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the socket lives: %v", err)
	}
}

// BenchmarkLook is what watching one sandbox costs each time.
func BenchmarkLook(b *testing.B) {
	ns, _ := pair(b)
	w, _, err := ns.Watch(guest)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		_, err1 := w.Look()
		_, err2 := w.Connections()
		if err := errors.Join(err1, err2); err != nil {
			b.Fatal(err)
		}
	}
}
