package mesh

import (
	"net"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/internal/netns"
)

// agree waits until all connections that the kernel has in the namespaces of
// some sandboxes are the proxy's own, by its own word over the link.
func agree(t *testing.T, w *world, boxes ...*box) {
	t.Helper()
	for _, b := range boxes {
		watch, _, err := b.ns.Watch(netns.Guest{Address: b.Address, MAC: net.HardwareAddr{2, 0, 0, 0, 0, b.Address.As4()[3]}})
		if err != nil {
			t.Fatal(err)
		}
		var all, strange []api.Connection
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			there, err := watch.Connections()
			if err != nil {
				t.Fatal(err)
			}
			all = all[:0]
			for _, c := range there {
				all = append(all, api.Connection{Local: c.Local, Remote: c.Remote})
			}
			if len(all) == 0 {
				break
			}
			// One may have begun or ended just now.
			if strange, err = w.link.Carried(t.Context(), b.Instance, all); err != nil {
				t.Fatal(err)
			}
			if len(strange) == 0 {
				break
			}
		}
		if len(strange) > 0 {
			t.Fatalf("%s: the proxy does not know %v of %v", b.Instance, strange, all)
		}
	}
}

// TestCarried takes connections in as they are accepted and made, and forgets
// them after they were closed.
func TestCarried(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var k carried
	taking := k.by(ln)
	at := func(c net.Conn) api.Connection {
		return api.Connection{Local: addrPort(c.LocalAddr()), Remote: addrPort(c.RemoteAddr())}
	}
	both := func() (far net.Conn, near net.Conn) {
		t.Helper()
		far, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		near, err = taking.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return far, near
	}
	far, near := both()
	defer far.Close()
	defer near.Close()
	if s := k.strange([]api.Connection{at(near), at(far)}); len(s) != 1 || s[0] != at(far) {
		t.Errorf("strange: %v; one end was accepted, the other not made here", s)
	}
	k.add(far.(*net.TCPConn))
	if s := k.strange([]api.Connection{at(near), at(far)}); len(s) != 0 {
		t.Errorf("strange: %v", s)
	}
	for range carriedSweep {
		f, n := both()
		f.Close()
		last := at(n)
		n.Close()
		if s := k.strange([]api.Connection{last}); len(s) != 1 {
			t.Fatalf("what was closed is carried on: %v", last)
		}
	}
	if len(k.all) >= carriedSweep/2 {
		t.Errorf("%d are kept, of which 2 are open", len(k.all))
	}
	if s := k.strange([]api.Connection{at(near), at(far)}); len(s) != 0 {
		t.Errorf("forgotten while open: %v", s)
	}
}
