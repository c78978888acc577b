package dns

import (
	"context"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

var server = &Server{
	Namespace: func() string { return "bank" },
	Lookup: func(service, namespace string) (netip.Addr, bool) {
		a, ok := map[string]string{"web.bank": "10.99.0.1", "web.shop": "10.99.0.2"}[service+"."+namespace]
		if !ok {
			return netip.Addr{}, false
		}
		return netip.MustParseAddr(a), true
	},
}

func ask(t testing.TB, name string, kind dnsmessage.Type, class dnsmessage.Class) dnsmessage.Message {
	t.Helper()
	n, err := dnsmessage.NewName(name)
	if err != nil {
		t.Fatal(err)
	}
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: 7, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: n, Type: kind, Class: class}}}
	raw, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	var m dnsmessage.Message
	if err := m.Unpack(server.Answer(raw)); err != nil {
		t.Fatal(err)
	}
	if m.ID != 7 || !m.Response || len(m.Questions) != 1 || m.Questions[0].Name != n {
		t.Errorf("%s: header %+v", name, m.Header)
	}
	return m
}

func TestAnswer(t *testing.T) {
	const in = dnsmessage.ClassINET
	for _, c := range []struct {
		name  string
		kind  dnsmessage.Type
		class dnsmessage.Class
		code  dnsmessage.RCode
		want  string
	}{
		{"web.", dnsmessage.TypeA, in, 0, "10.99.0.1"},
		{"WeB.", dnsmessage.TypeA, in, 0, "10.99.0.1"},
		{"web.shop.", dnsmessage.TypeA, in, 0, "10.99.0.2"},
		{"web.shop.svc.", dnsmessage.TypeA, in, 0, "10.99.0.2"},
		{"web.shop.svc.cluster.local.", dnsmessage.TypeA, in, 0, "10.99.0.2"},
		{"web.shop.svc.cluster.local.", dnsmessage.TypeALL, in, 0, "10.99.0.2"},
		{"web.bank.", dnsmessage.TypeAAAA, in, 0, ""},
		{"web.bank.", dnsmessage.TypeTXT, in, 0, ""},
		{"web.svc.cluster.local.", dnsmessage.TypeA, in, dnsmessage.RCodeNameError, ""},
		{"x.web.shop.svc.cluster.local.", dnsmessage.TypeA, in, dnsmessage.RCodeNameError, ""},
		{"db.", dnsmessage.TypeA, in, dnsmessage.RCodeNameError, ""},
		{"example.com.", dnsmessage.TypeA, in, dnsmessage.RCodeNameError, ""},
		{"web.bank.evil.com.", dnsmessage.TypeA, in, dnsmessage.RCodeNameError, ""},
		{".", dnsmessage.TypeA, in, dnsmessage.RCodeNameError, ""},
		{"web.", dnsmessage.TypeA, dnsmessage.ClassCHAOS, dnsmessage.RCodeRefused, ""},
	} {
		m := ask(t, c.name, c.kind, c.class)
		got := ""
		for _, a := range m.Answers {
			got += netip.AddrFrom4(a.Body.(*dnsmessage.AResource).A).String()
		}
		if m.RCode != c.code || got != c.want {
			t.Errorf("%s %s: %s %q, want %s %q", c.name, c.kind, m.RCode, got, c.code, c.want)
		}
	}
	for _, raw := range [][]byte{nil, {1}, make([]byte, 11), {0, 1, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0}} {
		if got := server.Answer(raw); got != nil {
			t.Errorf("%x was answered", raw)
		}
	}
}

// Go's own resolver understands the answers, over UDP and TCP.
func TestResolver(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go server.ServeUDP(pc)
	go server.ServeTCP(ln)
	defer pc.Close()
	defer ln.Close()
	for network, address := range map[string]string{"udp": pc.LocalAddr().String(), "tcp": ln.Addr().String()} {
		r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		}}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		got, err := r.LookupHost(ctx, "web.shop.svc.cluster.local.")
		if err != nil || len(got) != 1 || got[0] != "10.99.0.2" {
			t.Errorf("%s: %v, %v", network, got, err)
		}
		if got, err := r.LookupHost(ctx, "example.com."); err == nil {
			t.Errorf("%s: example.com is %v", network, got)
		}
	}
}

// failing fails once.
type failing struct {
	net.Listener
	failed bool
}

func (f *failing) Accept() (net.Conn, error) {
	if !f.failed {
		f.failed = true
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}
	}
	return f.Listener.Accept()
}

// Queries over TCP are answered after an accept that failed, until the listener is
// closed.
func TestTCPOutlivesFaults(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &failing{Listener: ln}
	done := make(chan error, 1)
	go func() { done <- server.ServeTCP(f) }()
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
	}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if got, err := r.LookupHost(ctx, "web.shop.svc.cluster.local."); err != nil || len(got) != 1 || got[0] != "10.99.0.2" {
		t.Errorf("%v, %v", got, err)
	}
	ln.Close()
	if err := <-done; err != nil || !f.failed {
		t.Errorf("failed %v; ended %v", f.failed, err)
	}
}

func FuzzAnswer(f *testing.F) {
	for _, name := range []string{"web.", "a.b.c.d."} {
		q := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: 1, Class: 1}}}
		raw, _ := q.Pack()
		f.Add(raw)
	}
	f.Add([]byte{0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1})
	f.Fuzz(func(t *testing.T, raw []byte) {
		reply := server.Answer(raw)
		if reply == nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(reply); err != nil || !m.Response || len(reply) > 512 {
			t.Fatalf("answer of %d bytes %x: %v", len(reply), reply, err)
		}
	})
}
