package node

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// TestPublishTooMany has a plan publish more ports than can be handed to the
// proxy: one that is too much is refused by name, and keeps back neither the others
// nor the plan. It is opened once there is room.
func TestPublishTooMany(t *testing.T) {
	m := newMeshPart(newFakeNode(t))
	defer m.close()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	last := uint16(free.Addr().(*net.TCPAddr).Port)
	free.Close()
	p := plan.Mesh{Services: []plan.Service{{Name: "late", Namespace: "bank"}}}
	for port := uint16(1); len(m.published) < api.MaxFiles; port++ {
		if port == last {
			continue
		}
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		m.published[port] = link.Published{Listener: null}
		p.Services = append(p.Services, plan.Service{Name: fmt.Sprint("s", port), Namespace: "bank", Ports: []plan.Port{{Port: 80, Publish: port}, {Port: 81}}})
	}
	p.Services[0].Ports = []plan.Port{{Port: 80, Publish: last}}
	all, err := m.publishLocked(&p)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("publish bank/late: port %d: a node has at most 128: take away", last)) || len(all) != api.MaxFiles {
		t.Errorf("%d published, %v", len(all), err)
	}
	p.Services = p.Services[:api.MaxFiles]
	if all, err = m.publishLocked(&p); err != nil || len(all) != api.MaxFiles || m.published[last].Service != "late" {
		t.Errorf("%d published, %+v, %v", len(all), m.published[last], err)
	}
}
