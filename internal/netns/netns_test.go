package netns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var guest = Guest{
	Address: netip.MustParseAddr("10.88.0.5"),
	MAC:     net.HardwareAddr{0x02, 0, 0, 0, 0, 5},
}

func needRoot(t testing.TB) {
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces needs root")
	}
}

// pair makes a sandbox's namespace and a second one that plays the guest.
func pair(t testing.TB) (ns, peer *Namespace) {
	needRoot(t)
	dir := t.TempDir()
	for i, name := range []string{"sandbox", "guest"} {
		n, err := Create(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := n.Delete(); err != nil {
				t.Error(err)
			}
		})
		if i == 0 {
			ns = n
		} else {
			peer = n
		}
	}
	if err := ns.Veth(guest, peer); err != nil {
		t.Fatal(err)
	}
	return ns, peer
}

// dialIn connects from inside a namespace; the socket stays there.
func dialIn(ns *Namespace, network, address string) (c net.Conn, err error) {
	err = errors.Join(ns.Do(func() (err error) {
		// A literal address and no fallback: one socket, made on this thread.
		d := net.Dialer{Timeout: 3 * time.Second, FallbackDelay: -1}
		c, err = d.Dial(network, address)
		return err
	}))
	return c, err
}

func TestTransparentTCP(t *testing.T) {
	ns, peer := pair(t)
	f, err := ns.ListenTransparent()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.FileListener(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
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
	for _, to := range []string{"10.99.0.1:80", "8.8.8.8:443", "10.88.0.6:22", "169.254.1.1:15001", "169.254.1.1:99"} {
		c, err := dialIn(peer, "tcp4", to)
		if err != nil {
			t.Errorf("dial %s: %v", to, err)
			continue
		}
		got, err := io.ReadAll(c)
		c.Close()
		if want := "10.88.0.5>" + to; err != nil || string(got) != want {
			t.Errorf("dial %s: listener saw %q, %v; want %q", to, got, err, want)
		}
	}
	if c, err := dialIn(peer, "tcp4", "169.254.1.1:53"); err == nil {
		c.Close()
		t.Error("TCP 53 to the gateway was intercepted; it belongs to the name server")
	}
}

func TestDNSAndDialers(t *testing.T) {
	ns, peer := pair(t)
	udp, tcp, err := ns.ListenDNS()
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	pc, err := net.FilePacketConn(udp)
	udp.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() {
		b := make([]byte, 512)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo(b[:n], from)
		}
	}()
	c, err := dialIn(peer, "udp4", "169.254.1.1:53")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	b := make([]byte, 16)
	if _, err := c.Write([]byte("ask")); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(b); err != nil || string(b[:n]) != "ask" {
		t.Fatalf("name server echoed %q, %v", b[:n], err)
	}

	var ln net.Listener
	if err := peer.Do(func() (err error) { ln, err = net.Listen("tcp4", "10.88.0.5:8080"); return err }); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	files, err := ns.Dialers(3)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		to := &unix.SockaddrInet4{Port: 8080, Addr: guest.Address.As4()}
		fd := int(f.Fd())
		if err := errors.Join(unix.SetNonblock(fd, false), unix.Connect(fd, to)); err != nil {
			t.Fatalf("connect to guest: %v", err)
		}
		in, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if from := in.RemoteAddr().(*net.TCPAddr).IP.String(); from != Gateway.String() {
			t.Errorf("guest sees %s, want the gateway", from)
		}
		in.Close()
		f.Close()
	}
}

func TestDropped(t *testing.T) {
	ns, peer := pair(t)
	send := func(to string, n int) {
		t.Helper()
		c, err := dialIn(peer, "udp4", to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for range n {
			c.Write([]byte("x"))
		}
	}
	send("8.8.8.8:53", 3)
	send("169.254.1.1:123", 2)
	send("10.88.0.6:4000", 1)
	icmp(t, peer, "169.254.1.1")
	spoof(t, peer)

	// The first packets wait for an answer to ARP, so they may arrive late.
	var d Drops
	got := map[string]uint64{}
	for deadline := time.Now().Add(time.Minute); len(got) < 4 && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		var err error
		if d, err = ns.Dropped(); err != nil {
			t.Fatal(err)
		}
		for _, b := range d.Bypass {
			got[fmt.Sprintf("%d %s:%d", b.Protocol, b.Destination, b.Port)] = b.Packets
		}
	}
	for key, n := range map[string]uint64{"17 8.8.8.8:53": 3, "17 169.254.1.1:123": 2, "17 10.88.0.6:4000": 1, "1 169.254.1.1:0": 1} {
		if got[key] != n {
			t.Errorf("dropped %s: %d packets, want %d (all: %v)", key, got[key], n, got)
		}
	}
	// Three frames: foreign hardware address, foreign IPv4 source, forged ARP.
	if d.Spoofed != 3 {
		t.Errorf("spoofed: %d, want 3", d.Spoofed)
	}
	if d.Rest < 1 {
		t.Errorf("rest: %d, want the IPv6 frame", d.Rest)
	}
}

// The set of destinations is bounded: what does not fit is dropped all the same
// and counted together.
func TestDroppedBounded(t *testing.T) {
	ns, peer := pair(t)
	c := raw(t, peer)
	defer unix.Close(c)
	const sent = bypassLimit + 50
	for i := range sent {
		frame := ipv4(guest.MAC, guest.Address.As4(), [4]byte{1, 2, byte(i >> 8), byte(i)}, unix.IPPROTO_UDP)
		if _, err := unix.Write(c, frame); err != nil {
			t.Fatal(err)
		}
	}
	d, err := ns.Dropped()
	if err != nil {
		t.Fatal(err)
	}
	var n uint64
	for _, b := range d.Bypass {
		n += b.Packets
	}
	if len(d.Bypass) > bypassLimit || len(d.Bypass) < bypassLimit/2 || n+d.Rest < sent {
		t.Errorf("%d destinations, %d packets in them, %d beside; sent %d", len(d.Bypass), n, d.Rest, sent)
	}
}

// icmp sends one echo request.
func icmp(t *testing.T, ns *Namespace, to string) {
	t.Helper()
	err := ns.Do(func() error {
		c, err := net.Dial("ip4:icmp", to)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// raw opens a socket that sends whole frames on the guest's link.
func raw(t *testing.T, ns *Namespace) (fd int) {
	t.Helper()
	err := ns.Do(func() (err error) {
		ifi, err := net.InterfaceByName(Device)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: ifi.Index})
	})
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func ipv4(source []byte, from, to [4]byte, proto byte) []byte {
	f := slices.Concat(GatewayMAC, source, []byte{8, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, proto, 0, 0}, from[:], to[:], []byte{0, 9, 0, 9, 0, 8, 0, 0})
	var sum uint32
	for i := 14; i < 34; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(f[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(f[24:], ^uint16(sum))
	return f
}

// spoof sends three frames that lie about the sender, and one of IPv6.
func spoof(t *testing.T, ns *Namespace) {
	t.Helper()
	fd := raw(t, ns)
	defer unix.Close(fd)
	other := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	arp := slices.Concat(GatewayMAC, guest.MAC, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 2}, guest.MAC, []byte{10, 88, 0, 6}, GatewayMAC, []byte{169, 254, 1, 1})
	for _, frame := range [][]byte{
		ipv4(other, guest.Address.As4(), Gateway.As4(), unix.IPPROTO_TCP),
		ipv4(guest.MAC, [4]byte{10, 88, 0, 6}, Gateway.As4(), unix.IPPROTO_TCP),
		arp,
		slices.Concat(GatewayMAC, guest.MAC, []byte{0x86, 0xdd}, make([]byte, 40)),
	} {
		if _, err := unix.Write(fd, frame); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTap(t *testing.T) {
	needRoot(t)
	ns, err := Create(t.TempDir(), "tap")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Delete()
	g := guest
	g.Owner = 12345
	tap, err := ns.Tap(g)
	if err != nil {
		t.Fatal(err)
	}
	err = ns.Do(func() error {
		ifi, err := net.InterfaceByName(Device)
		if err != nil {
			return err
		}
		if ifi.HardwareAddr.String() != GatewayMAC.String() {
			return fmt.Errorf("hardware address %s", ifi.HardwareAddr)
		}
		owner, err := os.ReadFile("/proc/self/task/" + fmt.Sprint(unix.Gettid()) + "/net/dev")
		if err != nil || len(owner) == 0 {
			return fmt.Errorf("read net/dev: %v", err)
		}
		all, err := net.Interfaces()
		if err != nil || len(all) != 2 {
			return fmt.Errorf("links %v, %v; want lo and the tap", all, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if _, err := ns.Tap(g); err == nil {
		t.Error("a second tap was made")
	}
	tap.Close()
	if err := ns.Do(func() error { _, err := net.InterfaceByName(Device); return err }); err == nil {
		t.Error("the tap outlived its descriptor")
	}
}

func TestNothingStays(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	ns, err := Create(dir, "one")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Create(dir, "one"); err == nil {
		t.Error("a namespace was made twice")
	}
	if again, err := Open(dir, "one"); err != nil {
		t.Error(err)
	} else {
		again.Close()
	}
	os.WriteFile(filepath.Join(dir, "two"), nil, 0o600) // a creation cut short
	if _, err := Open(dir, "two"); err == nil {
		t.Error("a plain file was opened as a namespace")
	}
	if names, err := List(dir); err != nil || !slices.Equal(names, []string{"one", "two"}) {
		t.Errorf("list: %v, %v", names, err)
	}
	ns.Close()
	for _, name := range []string{"one", "two", "three"} {
		if err := Remove(dir, name); err != nil {
			t.Error(err)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left in %s: %v, %v", dir, left, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || len(mounts) == 0 || bytes.Contains(mounts, []byte(dir)) {
		t.Errorf("a mount below %s is left (%v)", dir, err)
	}
}

func TestRefusals(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "A", "../x"} {
		if _, err := Create(t.TempDir(), name); err == nil {
			t.Errorf("name %q accepted", name)
		}
		if err := Remove(t.TempDir(), name); err == nil {
			t.Errorf("name %q accepted for removal", name)
		}
	}
	for _, g := range []Guest{
		{},
		{Address: Gateway, MAC: guest.MAC},
		{Address: netip.MustParseAddr("::1"), MAC: guest.MAC},
		{Address: guest.Address, MAC: guest.MAC[:5]},
		{Address: guest.Address, MAC: net.HardwareAddr{1, 0, 0, 0, 0, 0}},
		{Address: guest.Address, MAC: guest.MAC, Owner: -1},
	} {
		if err := g.check(); err == nil {
			t.Errorf("guest %+v accepted", g)
		}
	}
}

// BenchmarkNamespace makes what one sandbox needs: namespace, tap, rules and all
// sockets. Taking it down, mostly the kernel waiting for its readers, is
// reported apart, as no start waits for it.
func BenchmarkNamespace(b *testing.B) {
	needRoot(b)
	dir := b.TempDir()
	var making, tapping, deleting time.Duration
	for i := range b.N {
		begin := time.Now()
		ns, err := Create(dir, fmt.Sprintf("b%d", i))
		if err != nil {
			b.Fatal(err)
		}
		tapping -= time.Since(begin)
		tap, err := ns.Tap(guest)
		if err != nil {
			b.Fatal(err)
		}
		tapping += time.Since(begin)
		l, err1 := ns.ListenTransparent()
		u, c, err2 := ns.ListenDNS()
		d, err3 := ns.Dialers(8)
		if err := errors.Join(err1, err2, err3); err != nil {
			b.Fatal(err)
		}
		making += time.Since(begin)
		begin = time.Now()
		for _, f := range append(d, tap, l, u, c) {
			f.Close()
		}
		if err := ns.Delete(); err != nil {
			b.Fatal(err)
		}
		deleting += time.Since(begin)
	}
	b.ReportMetric(float64(making.Microseconds())/1000/float64(b.N), "ms/make")
	b.ReportMetric(float64(tapping.Microseconds())/1000/float64(b.N), "ms/tap")
	b.ReportMetric(float64(deleting.Microseconds())/1000/float64(b.N), "ms/delete")
}
