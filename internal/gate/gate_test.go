package gate

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"hauberk.dev/internal/netns"
)

// sandbox is a gate that runs, with the outside played on this machine's
// loopback address: nothing is sent anywhere else.
type sandbox struct {
	testing.TB
	hand *netns.Hand
	gate *Gate

	mu     sync.Mutex
	dialed []string
	denied []string
}

func open(t testing.TB, egress, publish []string, outside string) *sandbox {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces needs root")
	}
	s := &sandbox{TB: t}
	o := Options{Denied: func(what string) { s.mu.Lock(); s.denied = append(s.denied, what); s.mu.Unlock() }}
	for _, text := range egress {
		d, err := ParseDestination(text)
		if err != nil {
			t.Fatal(err)
		}
		o.Egress = append(o.Egress, d)
	}
	for _, text := range publish {
		p, err := ParsePublication(text)
		if err != nil {
			t.Fatal(err)
		}
		o.Publish = append(o.Publish, p)
	}
	dir := t.TempDir()
	var err error
	if s.hand, err = netns.CreateHand(dir, "box", Answers(o.Publish)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.hand.Close(), netns.RemoveHand(dir, "box")); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("left %v, %v", left, err)
		}
	})
	if s.gate, err = Open(s.hand, o); err != nil {
		t.Fatal(err)
	}
	s.gate.dial = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		s.mu.Lock()
		s.dialed = append(s.dialed, to.String())
		s.mu.Unlock()
		var d net.Dialer
		return d.DialContext(ctx, "tcp", outside)
	}
	s.gate.names.lookup = func(_ context.Context, name string) ([]netip.Addr, error) {
		switch name {
		case "api.example.net":
			return []netip.Addr{netip.MustParseAddr("203.0.113.5"), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("169.254.169.254")}, nil
		case "slow.example.net":
			return nil, context.DeadlineExceeded
		}
		return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.gate.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Error("the gate runs on after its end")
		}
	})
	return s
}

// in runs f in the guest's namespace, which here has no guest yet.
func (s *sandbox) in(f func() error) error { return s.hand.Pod.Do(f) }

func (s *sandbox) connect(network, to string) (c net.Conn, err error) {
	err = s.in(func() (err error) {
		d := net.Dialer{Timeout: 3 * time.Second, FallbackDelay: -1}
		c, err = d.Dial(network, to)
		return err
	})
	return c, err
}

// reaches says whether somebody at an address answers.
func (s *sandbox) reaches(to string) bool {
	s.Helper()
	c, err := s.connect("tcp4", to)
	if errors.Is(err, unix.ECONNRESET) { // taken, and reset before the dialer looked
		return false
	}
	if err != nil {
		s.Fatalf("dial %s: %v", to, err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(c)
	if err != nil && !errors.Is(err, unix.ECONNRESET) {
		s.Errorf("read from %s: %v", to, err)
	}
	return string(b) == "outside"
}

// asks asks the name server for a record.
func (s *sandbox) asks(network, name string, kind dnsmessage.Type) (answers []string, code dnsmessage.RCode) {
	s.Helper()
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: 7, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name + "."), Type: kind, Class: dnsmessage.ClassINET}}}
	b, err := q.Pack()
	if err != nil {
		s.Fatal(err)
	}
	c, err := s.connect(network, netns.Gateway.String()+":53")
	if err != nil {
		s.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if network == "tcp4" {
		b = append([]byte{byte(len(b) >> 8), byte(len(b))}, b...)
	}
	if _, err := c.Write(b); err != nil {
		s.Fatal(err)
	}
	reply := make([]byte, 1500)
	n, err := c.Read(reply)
	if err != nil {
		s.Fatal(err)
	}
	if reply = reply[:n]; network == "tcp4" {
		reply = reply[2:]
	}
	var m dnsmessage.Message
	if err := m.Unpack(reply); err != nil || m.ID != 7 {
		s.Fatalf("reply %x: %v", reply, err)
	}
	for _, a := range m.Answers {
		answers = append(answers, netip.AddrFrom4(a.Body.(*dnsmessage.AResource).A).String())
	}
	return answers, m.RCode
}

// outside serves on this machine's loopback address.
func outside(t testing.TB, serve func(c net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { serve(c); c.Close() }()
		}
	}()
	return l.Addr().String()
}

func greet(c net.Conn) { io.WriteString(c, "outside") }

func TestEgress(t *testing.T) {
	at := outside(t, greet)
	for _, tt := range []struct {
		egress  []string
		reached []string
		refused []string
	}{
		{nil, nil, []string{"198.51.100.7:443", "10.0.0.1:22", "169.254.1.1:99", "198.18.0.3:80"}},
		{[]string{"any"}, []string{"198.51.100.7:443", "10.0.0.1:22"}, []string{"169.254.169.254:80", "169.254.1.1:99"}},
		{[]string{"198.51.100.7:443", "192.0.2.0/24"}, []string{"198.51.100.7:443", "192.0.2.77:1"}, []string{"198.51.100.7:80", "198.51.100.8:443", "192.0.3.1:1"}},
		{[]string{"169.254.169.254"}, []string{"169.254.169.254:80"}, []string{"198.51.100.7:443"}},
	} {
		t.Run(fmt.Sprint(tt.egress), func(t *testing.T) {
			s := open(t, tt.egress, nil, at)
			for _, to := range tt.reached {
				if !s.reaches(to) {
					t.Errorf("%s is not reached", to)
				}
			}
			for _, to := range tt.refused {
				if s.reaches(to) {
					t.Errorf("%s is reached", to)
				}
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if !slices.Equal(s.dialed, tt.reached) || !slices.Equal(s.denied, tt.refused) {
				t.Errorf("dialed %q, denied %q", s.dialed, s.denied)
			}
		})
	}
}

func TestNames(t *testing.T) {
	s := open(t, []string{"api.example.net:443", "slow.example.net", "gone.example.net"}, nil, outside(t, greet))
	if s.reaches("203.0.113.5:443") {
		t.Error("an address is reached before its name was asked for")
	}
	for _, network := range []string{"udp4", "tcp4"} {
		// What only this machine can reach is left out.
		if got, code := s.asks(network, "API.example.net", dnsmessage.TypeA); !slices.Equal(got, []string{"203.0.113.5"}) || code != 0 {
			t.Errorf("over %s: %q, %v", network, got, code)
		}
	}
	if got, code := s.asks("udp4", "api.example.net", dnsmessage.TypeAAAA); len(got) != 0 || code != 0 {
		t.Errorf("AAAA: %q, %v", got, code)
	}
	for name, want := range map[string]dnsmessage.RCode{
		"slow.example.net": dnsmessage.RCodeServerFailure, "gone.example.net": dnsmessage.RCodeNameError,
		"secret.attacker.example": dnsmessage.RCodeNameError, "x.api.example.net": dnsmessage.RCodeNameError,
	} {
		if got, code := s.asks("udp4", name, dnsmessage.TypeA); len(got) != 0 || code != want {
			t.Errorf("%s: %q, %v, want %v", name, got, code, want)
		}
	}
	if !s.reaches("203.0.113.5:443") {
		t.Error("the address of a name on the list is not reached")
	}
	if s.reaches("203.0.113.5:80") {
		t.Error("the address is reached at a port that is not on the list")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, want := range []string{"203.0.113.5:443", "203.0.113.5:80", "secret.attacker.example", "x.api.example.net"} {
		if !slices.Contains(s.denied, want) {
			t.Errorf("denied %q, not %s", s.denied, want)
		}
	}
}

// TestNothingElsePasses sends what no list can allow.
func TestNothingElsePasses(t *testing.T) {
	s := open(t, []string{"any"}, nil, outside(t, greet))
	for _, to := range []string{"198.51.100.7:123", "169.254.1.1:5353", "198.18.0.3:53"} {
		c, err := s.connect("udp4", to)
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte("x"))
		c.Close()
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		d, err := s.hand.Gate.Dropped()
		if err != nil {
			t.Fatal(err)
		}
		if len(d.Bypass) == 3 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("dropped %+v, want three datagrams", d)
		}
	}
	if c, err := s.connect("tcp6", "[2001:db8::1]:80"); err == nil {
		c.Close()
		t.Error("the guest speaks IPv6")
	}
}

func TestPublish(t *testing.T) {
	s := open(t, nil, []string{"0:80", "0:80", "0:99", "0:53/udp"}, "")
	published := s.gate.Published()
	if len(published) != 4 || published[0].Host.Port() == 0 || published[0].Host == published[1].Host || !published[0].Host.Addr().IsLoopback() {
		t.Fatalf("published %v", published)
	}
	err := s.in(func() error {
		l, err := net.Listen("tcp4", netns.HandAddress.String()+":80")
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { // says what it heard once that has ended
					h := sha256.New()
					io.Copy(h, c)
					fmt.Fprintf(c, "%x", h.Sum(nil))
					c.Close()
				}()
			}
		}()
		u, err := net.ListenPacket("udp4", netns.HandAddress.String()+":53")
		if err != nil {
			return err
		}
		t.Cleanup(func() { u.Close() })
		go func() {
			buf := make([]byte, 100)
			for {
				n, from, err := u.ReadFrom(buf)
				if err != nil {
					return
				}
				u.WriteTo(append([]byte("heard "), buf[:n]...), from)
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<18) // 4 MiB
	for i := range 2 {
		c, err := net.Dial("tcp", published[i].Host.String())
		if err != nil {
			t.Fatal(err)
		}
		go func() { c.Write(data); c.(*net.TCPConn).CloseWrite() }()
		got, err := io.ReadAll(c)
		c.Close()
		if want := fmt.Sprintf("%x", sha256.Sum256(data)); err != nil || string(got) != want {
			t.Errorf("guest heard %s, %v; want %s", got, err, want)
		}
	}
	c, err := net.Dial("tcp", published[2].Host.String())
	if err == nil {
		c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a port nobody listens on: %v, want a reset", err)
	}
	for i := range 3 {
		u, err := net.Dial("udp", published[3].Host.String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(u, "%d", i)
		u.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 100)
		n, err := u.Read(buf)
		if want := fmt.Sprintf("heard %d", i); err != nil || string(buf[:n]) != want {
			t.Errorf("datagram: %q, %v; want %q", buf[:n], err, want)
		}
		u.Close()
	}
}

// TestEndsWithConnectionsOpen ends a gate while both kinds of connections idle;
// the cleanup of open waits for it.
func TestEndsWithConnectionsOpen(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	s := open(t, []string{"any"}, nil, outside(t, func(net.Conn) { <-hold }))
	for range 20 {
		c, err := s.connect("tcp4", "198.51.100.7:443")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
}

func TestLists(t *testing.T) {
	for text, want := range map[string]string{
		"any": "", "any:443": "", "192.0.2.1": "", "192.0.2.1:443": "", "192.0.2.0/24": "", "10.0.0.0/8:53": "", "2001:db8::1": "", "[2001:db8::1]:443": "",
		"example.net": "", "Example.NET.": "example.net", "*.example.net:443": "", "localhost": "", "::ffff:192.0.2.1": "192.0.2.1",
	} {
		if want == "" {
			want = text
		}
		d, err := ParseDestination(text)
		if err != nil || d.String() != want {
			t.Errorf("%s: %s, %v", text, d, err)
		}
	}
	for _, text := range []string{"", "any:", "1.2.3", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3.4:+1", "192.0.2.1/24", "a b", "-a", "*", "*.", "a..b", "fe80::1%eth0", "http://x"} {
		if d, err := ParseDestination(text); err == nil {
			t.Errorf("destination %q is %+v", text, d)
		}
	}
	for text, want := range map[string]string{
		"8080:80": "127.0.0.1:8080:80", "0.0.0.0:8080:80": "", "0:80/tcp": "127.0.0.1:0:80", "[::1]:53:53/udp": "",
	} {
		if want == "" {
			want = text
		}
		if p, err := ParsePublication(text); err != nil || p.String() != want {
			t.Errorf("%s: %s, %v", text, p, err)
		}
	}
	for _, text := range []string{"", "80", "80:", ":80", "80:0", "80:80/sctp", "80:80/", "::1:80:80", "[1.2.3.4]:80:80", "x:80:80", "70000:80"} {
		if p, err := ParsePublication(text); err == nil {
			t.Errorf("publication %q is %s", text, p)
		}
	}
}

func FuzzLists(f *testing.F) {
	for _, s := range []string{"any", "Any", "any.:80", "192.0.2.0/24:1", "[2001:db8::1]:443", "*.example.net:443", "0.0.0.0:8080:80/udp", "[::1]:53:53"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if d, err := ParseDestination(s); err == nil {
			if again, err := ParseDestination(d.String()); err != nil || again != d {
				t.Errorf("%q is %s, which is %+v, %v", s, d, again, err)
			}
		}
		if p, err := ParsePublication(s); err == nil {
			if again, err := ParsePublication(p.String()); err != nil || again != p {
				t.Errorf("%q is %s, which is %+v, %v", s, p, again, err)
			}
		}
	})
}

// FuzzAnswer answers whatever a guest may ask.
func FuzzAnswer(f *testing.F) {
	for _, name := range []string{"api.example.net.", "other.example.net.", "."} {
		q := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
		b, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	n := &names{known: map[netip.Addr]map[string]time.Time{}, o: Options{Egress: []Destination{{Name: "api.example.net"}}},
		lookup: func(_ context.Context, name string) ([]netip.Addr, error) {
			if name != "api.example.net" {
				return nil, fmt.Errorf("asked for %q", name)
			}
			return []netip.Addr{netip.MustParseAddr("203.0.113.5")}, nil
		}}
	f.Fuzz(func(t *testing.T, query []byte) {
		reply := n.answer(context.Background(), query)
		if reply == nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(reply); err != nil || !m.Response {
			t.Errorf("reply %x to %x: %v", reply, query, err)
		}
		if m.RCode == dnsmessage.RCodeServerFailure {
			t.Errorf("a name that is not on the list was looked up: %x", query)
		}
		if len(n.known) > 1 {
			t.Errorf("known: %v", n.known)
		}
	})
}
