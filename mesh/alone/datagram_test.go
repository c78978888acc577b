package alone

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// again is how long a client of these tests waits before it sends once more.
const again = 200 * time.Millisecond

// echoServer is a server that answers each datagram with its name and the datagram.
type echoServer struct {
	conn  *net.UDPConn
	name  string
	asked atomic.Uint64
	from  atomic.Pointer[netip.AddrPort] // of the datagram before
}

func newEcho(t testing.TB, address, name string) *echoServer {
	t.Helper()
	c, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	e := &echoServer{conn: c.(*net.UDPConn), name: name}
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, maxDatagram)
		at := copy(b, name)
		var last netip.AddrPort
		for {
			n, from, err := e.conn.ReadFromUDPAddrPort(b[at:])
			if err != nil {
				return
			}
			e.asked.Add(1)
			if from != last {
				last = from
				known := from
				e.from.Store(&known)
			}
			e.conn.WriteToUDPAddrPort(b[:at+n], from)
		}
	}()
	return e
}

func (e *echoServer) address() string { return e.conn.LocalAddr().String() }

// udpText is a configuration of one listener of UDP.
func udpText(listener, upstream string, servers ...string) string {
	return "version: 1\nlisteners: [{name: udp, address: '127.0.0.1:0', protocol: udp, upstream: up" + listener + "}]\n" +
		strings.Replace(upstreamOf(servers...), "- name: up\n", "- name: up\n"+upstream, 1)
}

func (p *Proxy) udp() *datagrams {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.listeners {
		if l.udp != nil {
			return l.udp
		}
	}
	return nil
}

func dialUDP(t testing.TB, own, address string) *net.UDPConn {
	t.Helper()
	var d net.Dialer
	if own != "" {
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.MustParseAddrPort(own))
	}
	c, err := d.Dial("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

// askUDP sends text until an answer to it comes, as a client of UDP must.
func askUDP(t testing.TB, c *net.UDPConn, text string) string {
	t.Helper()
	b := make([]byte, maxDatagram)
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if _, err := c.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(again))
		for {
			n, err := c.Read(b)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if answer := string(b[:n]); strings.HasSuffix(answer, text) { // else one to what was sent before
				return answer
			}
		}
	}
	t.Fatalf("no answer to a datagram of %d bytes", len(text))
	return ""
}

// eventually waits for what is to become true.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("in vain: ", what)
		}
	}
}

// Many clients at once each get the answers to what they sent, of any size.
func TestDatagrams(t *testing.T) {
	a, b := newEcho(t, "127.0.0.1:0", "a"), newEcho(t, "127.0.0.1:0", "b")
	p := serve(t, udpText("", "  balance: round-robin\n", a.address(), b.address()))
	var wg sync.WaitGroup
	for i := range 40 {
		c := dialUDP(t, "", p.Address("udp").String())
		large := 9000
		if i%8 == 0 { // not all at once: the queues of the kernel are short
			large = 60_000
		}
		wg.Go(func() {
			first := ""
			for j, size := range []int{0, 1, 1200, 4000, large} {
				text := strings.Repeat("x", size)
				if size > 0 {
					text = fmt.Sprintf("%d %d %s", i, j, text)
				}
				answer := askUDP(t, c, text)
				if server := answer[:1]; first == "" {
					first = server
				} else if server != first {
					t.Errorf("client %d went from %s to %s", i, first, server)
				}
			}
		})
	}
	wg.Wait()
	if a.asked.Load() < 20*5 || b.asked.Load() < 20*5 {
		t.Errorf("a was asked %d times, b %d times", a.asked.Load(), b.asked.Load())
	}
	if n := p.udp().begun.Load(); n != 40 {
		t.Errorf("%d sessions of 40 clients", n)
	}
	metrics := string(p.metrics())
	for _, want := range []string{`hauberk_proxy_udp_sessions{listener="udp"} 40`, `hauberk_proxy_udp_sessions_total{listener="udp"} 40`,
		`hauberk_proxy_udp_dropped_total{listener="udp"} 0`, `hauberk_proxy_upstream_active{upstream="up",endpoint="` + a.address() + `"} 20`} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("no %s", want)
		}
	}
}

// By the hash of its address a client finds the same endpoint from every port.
func TestDatagramsByAddress(t *testing.T) {
	for _, balance := range []string{"maglev", "ring-hash"} {
		var servers []string
		for i := range 3 {
			servers = append(servers, newEcho(t, "127.0.0.1:0", fmt.Sprint(i)).address())
		}
		p := serve(t, udpText("", "  balance: "+balance+"\n", servers...))
		seen := map[string]bool{}
		for host := range 16 {
			own := fmt.Sprintf("127.0.0.%d:0", host+10)
			first := askUDP(t, dialUDP(t, own, p.Address("udp").String()), "x")
			for range 3 {
				if got := askUDP(t, dialUDP(t, own, p.Address("udp").String()), "x"); got != first {
					t.Errorf("%s: %s asked %s, then %s", balance, own, first, got)
				}
			}
			seen[first] = true
		}
		if len(seen) < 2 {
			t.Errorf("%s: 16 clients found one server", balance)
		}
	}
}

// A session whose endpoint has died goes on at another.
func TestDatagramsEndpointDies(t *testing.T) {
	a, b := newEcho(t, "127.0.0.1:0", "a"), newEcho(t, "127.0.0.1:0", "b")
	p := serve(t, udpText("", "  outlier: {unreachable: 100, ejection: 1h}\n", a.address(), b.address()))
	c := dialUDP(t, "", p.Address("udp").String())
	first := askUDP(t, c, "x")
	dead := map[string]*echoServer{"ax": a, "bx": b}[first]
	dead.conn.Close()
	if second := askUDP(t, c, "y"); second[0] == first[0] {
		t.Errorf("the dead answer: %q", second)
	}
	if n := p.udp().moved.Load(); n != 1 {
		t.Errorf("%d sessions moved", n)
	}
	for range 4 {
		askUDP(t, dialUDP(t, "", p.Address("udp").String()), "z")
	}
	// With both dead nothing is answered; with one back it is.
	a.conn.Close()
	b.conn.Close()
	if _, err := c.Write([]byte("lost")); err != nil {
		t.Fatal(err)
	}
	newEcho(t, dead.address(), "new")
	if got := askUDP(t, c, "w"); got != "neww" {
		t.Errorf("%q", got)
	}
}

// An endpoint that cannot be reached is left out, and those at it leave.
func TestDatagramsOutlier(t *testing.T) {
	a, b := newEcho(t, "127.0.0.1:0", "a"), newEcho(t, "127.0.0.1:0", "b")
	p := serve(t, udpText("", "  balance: round-robin\n  outlier: {ejection: 1h}\n", a.address(), b.address()))
	one, two := dialUDP(t, "", p.Address("udp").String()), dialUDP(t, "", p.Address("udp").String())
	three := dialUDP(t, "", p.Address("udp").String())
	at := askUDP(t, one, "x")[0]
	askUDP(t, two, "x")
	if askUDP(t, three, "x")[0] != at {
		t.Fatal("not by turns")
	}
	dead := a
	if at == 'b' {
		dead = b
	}
	dead.conn.Close()
	if askUDP(t, one, "y")[0] == at {
		t.Error("the dead answer")
	}
	if want := fmt.Sprintf("hauberk_proxy_upstream_up{upstream=\"up\",endpoint=%q} 0\n", dead.address()); !strings.Contains(string(p.metrics()), want) {
		t.Errorf("no %s", want)
	}
	p.udp().sweep()
	if n := p.udp().open.Load(); n != 2 {
		t.Errorf("%d sessions at the one that is well", n)
	}
	if askUDP(t, three, "y")[0] == at {
		t.Error("the dead answer")
	}
}

// Over the bound the session that was quiet for the longest makes room.
func TestDatagramsBound(t *testing.T) {
	e := newEcho(t, "127.0.0.1:0", "e")
	p := serve(t, udpText(", sessions: 3", "", e.address()))
	var clients []*net.UDPConn
	for range 3 {
		clients = append(clients, dialUDP(t, "", p.Address("udp").String()))
		askUDP(t, clients[len(clients)-1], "x")
	}
	askUDP(t, clients[0], "y") // now the second is the quietest
	askUDP(t, dialUDP(t, "", p.Address("udp").String()), "x")
	d := p.udp()
	if d.open.Load() != 3 || d.displaced.Load() != 1 {
		t.Errorf("%d sessions, %d displaced", d.open.Load(), d.displaced.Load())
	}
	begun := d.begun.Load()
	askUDP(t, clients[0], "z")
	askUDP(t, clients[2], "z")
	if n := d.begun.Load(); n != begun {
		t.Errorf("%d sessions instead of %d: one that was not the quietest has ended", n, begun)
	}
	askUDP(t, clients[1], "z") // its new session takes the room of another
	if n := d.begun.Load(); n != begun+1 || d.open.Load() != 3 || d.displaced.Load() != 2 {
		t.Errorf("%d sessions instead of %d, %d open, %d displaced", n, begun+1, d.open.Load(), d.displaced.Load())
	}
}

// A session ends when nothing has come either way.
func TestDatagramsIdle(t *testing.T) {
	e := newEcho(t, "127.0.0.1:0", "e")
	p := serve(t, udpText(", idle: 50ms", "  connections: 1\n", e.address()))
	c := dialUDP(t, "", p.Address("udp").String())
	askUDP(t, c, "x")
	eventually(t, "no session is left", func() bool { return p.udp().open.Load() == 0 })
	for _, h := range p.world.Load().upstreams["up"].set.Hosts() {
		if h.Active() != 0 || !h.Up() {
			t.Errorf("%d active, up %t", h.Active(), h.Up())
		}
	}
	askUDP(t, c, "y") // which is a session again, by the one connection there may be
}

// Nobody but the endpoint can answer a client.
func TestDatagramsNoReflection(t *testing.T) {
	e := newEcho(t, "127.0.0.1:0", "e")
	p := serve(t, udpText("", "", e.address()))
	c := dialUDP(t, "", p.Address("udp").String())
	askUDP(t, c, "x")
	stranger, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	for range 10 {
		if _, err := stranger.WriteTo([]byte("stranger"), net.UDPAddrFromAddrPort(*e.from.Load())); err != nil {
			t.Fatal(err)
		}
	}
	if got := askUDP(t, c, "y"); got != "ey" {
		t.Errorf("%q", got)
	}
	if d := p.udp(); d.sent.Load() > e.asked.Load() {
		t.Errorf("%d answers to %d datagrams", d.sent.Load(), e.asked.Load())
	}
}

// A reload keeps sessions, but those at endpoints that are no more.
func TestDatagramsReload(t *testing.T) {
	a, b := newEcho(t, "127.0.0.1:0", "a"), newEcho(t, "127.0.0.1:0", "b")
	p := serve(t, udpText("", "", a.address()))
	reload := func(text string) {
		t.Helper()
		c, err := Parse("proxy.yaml", t.TempDir(), []byte(text))
		if err == nil {
			err = p.Reload(c)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	c := dialUDP(t, "", p.Address("udp").String())
	askUDP(t, c, "x")
	before := *a.from.Load()
	reload(udpText(", idle: 30s", "", a.address(), b.address()))
	if got := askUDP(t, c, "y"); got != "ay" || *a.from.Load() != before {
		t.Errorf("%q from %s, before %s", got, a.from.Load(), before)
	}
	reload(udpText("", "", b.address()))
	if got := askUDP(t, c, "z"); got != "bz" {
		t.Errorf("%q", got)
	}
	d := p.udp()
	reload("version: 1\nlisteners: [{name: tcp, address: '127.0.0.1:0', protocol: tcp, upstream: up}]\n" + upstreamOf(b.address()))
	eventually(t, "the listener and its sessions are gone", func() bool { return d.open.Load() == 0 })
	if p.udp() != nil {
		t.Error("a listener of UDP is left")
	}
}

// A socket for every address of the machine answers from the one that was asked.
func TestDatagramsEveryAddress(t *testing.T) {
	e := newEcho(t, "127.0.0.1:0", "e")
	p := serve(t, strings.Replace(udpText("", "", e.address()), "'127.0.0.1:0'", "'0.0.0.0:0'", 1))
	port := p.Address("udp").(*net.UDPAddr).Port
	for _, host := range []string{"127.0.0.1", "127.0.0.2", "127.1.2.3"} {
		c := dialUDP(t, "127.0.0.1:0", fmt.Sprintf("%s:%d", host, port)) // connected: it hears no other
		if got := askUDP(t, c, "x"); got != "ex" {
			t.Errorf("%s: %q", host, got)
		}
	}
}

// A stub resolver asks twice from the same port: each question has its answer, and
// then the session ends.
func TestDatagramsDNS(t *testing.T) {
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go serveDNS(server)
	p := serve(t, udpText(", responses: 1", "", server.LocalAddr().String()))
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", p.Address("udp").String())
	}}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for range 20 {
		got, err := r.LookupNetIP(ctx, "ip4", "shop.example.com.")
		if err != nil || len(got) != 1 || got[0].Unmap() != netip.MustParseAddr("192.0.2.7") {
			t.Fatal(got, err)
		}
	}
	d := p.udp()
	eventually(t, "sessions end with their answer", func() bool { return d.open.Load() == 0 })
	// Two questions before the first answer are two answers.
	c := dialUDP(t, "", p.Address("udp").String())
	c.SetDeadline(time.Now().Add(patience))
	for _, id := range []uint16{1, 2} {
		c.Write(question(t, id))
	}
	b := make([]byte, 512)
	for range 2 {
		if _, err := c.Read(b); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the session ends with its answers", func() bool { return d.open.Load() == 0 })
}

func question(t testing.TB, id uint16) []byte {
	t.Helper()
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: id}, Questions: []dnsmessage.Question{
		{Name: dnsmessage.MustNewName("shop.example.com."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// serveDNS answers questions for addresses.
func serveDNS(c net.PacketConn) {
	b := make([]byte, 4096)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(b[:n]) != nil {
			continue
		}
		m.Response, m.Additionals = true, nil
		for _, q := range m.Questions {
			if q.Type == dnsmessage.TypeA {
				m.Answers = append(m.Answers, dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1},
					Body: &dnsmessage.AResource{A: [4]byte{192, 0, 2, 7}}})
			}
		}
		if answer, err := m.Pack(); err == nil {
			c.WriteTo(answer, from)
		}
	}
}

// An endpoint that owes answers and gives none is left out.
func TestDatagramsUnanswered(t *testing.T) {
	mute, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	e := newEcho(t, "127.0.0.1:0", "e")
	p := serve(t, udpText(", responses: 1, idle: 3s", "  balance: round-robin\n  outlier: {failures: 1, ejection: 1h}\n", mute.LocalAddr().String(), e.address()))
	all := []*net.UDPConn{dialUDP(t, "", p.Address("udp").String()), dialUDP(t, "", p.Address("udp").String())}
	for _, c := range all { // once each: what is sent again would keep a session
		if _, err := c.Write([]byte("first")); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the mute one is left out", func() bool {
		return strings.Contains(string(p.metrics()), fmt.Sprintf("hauberk_proxy_upstream_up{upstream=\"up\",endpoint=%q} 0\n", mute.LocalAddr()))
	})
	for _, c := range all {
		if got := askUDP(t, c, "x"); got != "ex" {
			t.Errorf("%q", got)
		}
	}
}

func TestDatagramsNoAllocation(t *testing.T) {
	e := newEcho(t, "127.0.0.1:0", "e")
	p := serve(t, udpText("", "", e.address()))
	c := dialUDP(t, "", p.Address("udp").String())
	askUDP(t, c, "warm")
	c.SetDeadline(time.Now().Add(patience))
	text, b := []byte("hello"), make([]byte, 64)
	once := func() {
		if _, err := c.Write(text); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(b); err != nil || !bytes.HasSuffix(b[:n], text) {
			t.Fatal(n, err)
		}
	}
	most := 0.0
	if raced {
		most = 4 // the blocks that the pool forgets
	}
	if n := testing.AllocsPerRun(2000, once); n > most {
		t.Errorf("%v allocations per datagram and its answer", n)
	}
}

// What does not go with datagrams is refused with its field, value and fix.
func TestDatagramFaults(t *testing.T) {
	_, err := Parse("proxy.yaml", t.TempDir(), []byte(`version: 1
listeners:
- {name: a, address: '127.0.0.1:53', protocol: udp, upstream: up, connections: 7, http2: off, proxy_protocol_from: [10.0.0.0/8], responses: -1, sessions: 1000000}
- {name: b, address: '127.0.0.1:53', protocol: tcp, upstream: up, idle: 1s, sessions: 3, responses: 1}
- {name: c, address: '127.0.0.1:53', protocol: udp}
- {name: d, address: '127.0.0.1:54', protocol: udp, upstream: calls, tls: {}, calls: [{upstream: calls}], names: [{names: [x], upstream: up}]}
upstreams:
- {name: up, endpoints: [{address: 'server.example.com:53'}, {address: '127.0.0.1:53'}], proxy_protocol: v2, tls: {name: x}}
- {name: calls, protocol: bolt, endpoints: [{address: '127.0.0.1:1'}]}
`))
	var f *Faults
	if !errors.As(err, &f) {
		t.Fatal(err)
	}
	for _, want := range []string{
		`listeners[0].connections: goes with listeners of connections; use sessions`,
		`listeners[0].http2: goes with protocol http`,
		`listeners[0].proxy_protocol_from: goes with listeners of connections`,
		`listeners[0].responses: -1 is out of range; use 1 for`,
		`listeners[0].sessions: 1000000 is out of range; use 1 to 100000`,
		`listeners[1].idle: goes with protocol udp`,
		`listeners[1].sessions: goes with protocol udp`,
		`listeners[1].responses: goes with protocol udp`,
		`listeners[2].address: "127.0.0.1:53" is served by another listener`,
		`listeners[2].upstream: no upstream ""`,
		`listeners[3].upstream: "calls" speaks bolt`,
		`listeners[3].tls: datagrams are passed on as they are`,
		`listeners[3].calls: goes with`,
		`listeners[3].names: goes with protocol sni`,
		`upstreams[0].tls: listener "a" passes datagrams on as they are; leave it out`,
		`upstreams[0].proxy_protocol: listener "a" is of protocol udp`,
		`upstreams[0].endpoints[0].address: "server.example.com:53" has no IP address`,
		`upstreams[0].endpoints[1].address: "127.0.0.1:53" is listener "a" itself`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "listeners[1].address") {
		t.Errorf("UDP and TCP do not go beside each other: %v", err)
	}
}

func FuzzDestination(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, maxControl))
	f.Add([]byte{28, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) { destination(b) })
}
