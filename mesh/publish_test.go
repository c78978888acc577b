package mesh

import (
	"context"
	"net"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/link"
)

// TestPublishWhileServing gives the proxy the same listener again and again, as
// each change of a plan does, while somebody connects to it now and then. The
// descriptor is shared with the node: were it to turn blocking for a moment,
// the proxy would hang in accept, and with it whoever closes the listener.
func TestPublishWhileServing(t *testing.T) {
	w := newWorld(t)
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
	publish := func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		port := link.Published{PublishedPort: api.PublishedPort{Service: "web", Namespace: "bank", Port: 80}, Listener: f}
		if err := w.link.SetPublish(ctx, []link.Published{port}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 300 {
		dialled := make(chan struct{})
		go func() {
			defer close(dialled)
			time.Sleep(time.Duration(i%50) * time.Microsecond)
			c, err := net.Dial("tcp", ln.Addr().String())
			if err == nil { // else reset already: nobody is behind the port
				c.Close()
			}
		}()
		publish()
		<-dialled
		publish() // nobody connects now: only this can wake what hangs
	}
}
