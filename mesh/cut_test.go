package mesh

import (
	"context"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"hauberk.dev/plan"
)

// TestCutOfMany has 2,000 live connections and revokes callers of 100 of them,
// one after the other: those are cut, each counted at both ends, and the others
// carry bytes on. How long a cut takes is timed at each client of such a connection.
func TestCutOfMany(t *testing.T) {
	const callers, each, rounds = 20, 100, 10
	w := newWorldOf(t, Options{Connections: 2 * callers * each})
	var boxes []*box
	for i := range callers {
		boxes = append(boxes, w.add(fmt.Sprintf("c%d", i), nil, nil, nil))
	}
	server := w.add("server", tcpPort, anyone(), nil)
	w.apply()
	go serveEcho(server.listen(t, 9000))
	to := netAddress(w.service("server"))
	conns := make([][]*net.TCPConn, callers)
	for i, b := range boxes {
		for range each {
			c := b.mustDial(t, to)
			c.SetDeadline(time.Now().Add(5 * time.Minute))
			if err := roundTrip(c, "up"); err != nil {
				t.Fatal(err)
			}
			conns[i] = append(conns[i], c)
		}
	}
	epoch := plan.Epoch{}
	var micros []int64       // by the receipts
	var seen []time.Duration // by the clients
	for i := range rounds {
		epoch.Number++
		epoch.Instances = append(epoch.Instances, boxes[i].Instance)
		began, ended := time.Now(), make(chan time.Duration, each)
		for _, c := range conns[i] {
			go func() {
				c.Read(make([]byte, 1)) // nothing comes but the end
				ended <- time.Since(began)
			}()
		}
		receipt, err := w.link.Cut(context.Background(), epoch)
		if err != nil {
			t.Fatal(err)
		}
		own := receipt.Instances[boxes[i].Instance]
		if receipt.Epoch != epoch.Number || receipt.Connections != 2*each || own != each || receipt.Instances[server.Instance] != each {
			t.Errorf("receipt %+v", receipt)
		}
		micros = append(micros, receipt.Micros)
		for range conns[i] {
			seen = append(seen, <-ended)
		}
		for _, c := range conns[i] {
			if err := roundTrip(c, "down"); err == nil {
				t.Fatal("a cut connection carries bytes")
			}
		}
		for _, list := range conns[i+1:] {
			for _, c := range list {
				if err := roundTrip(c, "still"); err != nil {
					t.Fatalf("a connection of somebody else: %v", err)
				}
			}
		}
	}
	slices.Sort(micros)
	slices.Sort(seen)
	n := len(seen)
	t.Logf("%d of %d connections cut, both ends of each: %d us in the median, %d at most, n=%d; seen by the client of a connection: p50 %v, p99 %v, at most %v, n=%d",
		each, callers*each, micros[rounds/2], micros[rounds-1], rounds, seen[n/2], seen[n*99/100], seen[n-1], n)
}

func netAddress(s *plan.Service) string { return fmt.Sprintf("%s:%d", s.Address, s.Ports[0].Port) }
