package mesh

import (
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/internal/netns"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// freeze makes a guest deaf: frames for it are no longer for it. Its own
// programs still run, but nobody hears of that, as with one that is paused.
func (b *box) freeze(t *testing.T) {
	t.Helper()
	err := b.guest.Do(func() error {
		l, err := netlink.LinkByName(netns.Device)
		if err != nil {
			return err
		}
		return netlink.LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0, 0xff, 0xff, 0xff})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSilentGuest: who talks to a guest that is frozen is told so in bounded
// time, whether it waits to read or to write, through the mesh or a published
// port; a slow reader in a guest that lives is none of that.
func TestSilentGuest(t *testing.T) {
	const silence = 2 * time.Second
	t.Parallel()
	w := newWorldOf(t, Options{silence: silence})
	a := w.add("a", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	slow := w.add("slow", tcpPort, anyone(), nil)
	web := w.add("web", httpPort, nil, nil)
	w.service("web").Allow = []plan.Rule{{Name: "web/front", From: []string{"anonymous"}}}
	w.apply()
	hold := make(chan struct{})
	holdAll := func(ln net.Listener) {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { <-hold; c.Close() }()
		}
	}
	defer close(hold)
	go holdAll(b.listen(t, 9000))
	go holdAll(slow.listen(t, 9000))
	asked := make(chan struct{}, 1)
	go http.Serve(web.listen(t, 8080), http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked <- struct{}{}; <-hold }))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	defer f.Close()
	if err := w.link.SetPublish(t.Context(), []link.Published{{PublishedPort: api.PublishedPort{Namespace: "bank", Service: "web", Port: 8080}, Listener: f}}); err != nil {
		t.Fatal(err)
	}

	reader, writer, patient := a.mustDial(t, "10.99.0.2:9000"), a.mustDial(t, "10.99.0.2:9000"), a.mustDial(t, "10.99.0.3:9000")
	flood := func(c net.Conn) <-chan error {
		c.SetDeadline(time.Now().Add(20 * time.Second))
		ended := make(chan error, 1)
		go func() {
			for {
				if _, err := c.Write(make([]byte, 64<<10)); err != nil {
					ended <- err
					return
				}
			}
		}()
		return ended
	}
	stuck := flood(patient)
	status := make(chan int, 1)
	go func() {
		resp, err := (&http.Client{Timeout: 20 * time.Second}).Get("http://" + ln.Addr().String() + "/public")
		if err != nil {
			t.Error(err)
			status <- 0
			return
		}
		resp.Body.Close()
		status <- resp.StatusCode
	}()
	<-asked
	time.Sleep(100 * time.Millisecond)
	b.freeze(t)
	web.freeze(t)
	began := time.Now()
	wrote := flood(writer)
	reader.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.ReadAll(reader); !refused(err) {
		t.Errorf("reading from a frozen guest: %v", err)
	}
	if err := <-wrote; !refused(err) {
		t.Errorf("writing to a frozen guest: %v", err)
	}
	if got := <-status; got != 502 {
		t.Errorf("a published port of a frozen guest answers %d, want 502", got)
	}
	if took := time.Since(began); took > 3*silence {
		t.Errorf("it took %v to give up", took)
	}
	select {
	case err := <-stuck:
		t.Errorf("a slow reader that lives was given up: %v", err)
	case <-time.After(silence):
	}
}
