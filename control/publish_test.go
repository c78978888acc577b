package control

import "testing"

// TestPublishedWorldStands: whoever answers a question reads a world while the
// next decisions are written into the one it came from.
func TestPublishedWorldStands(t *testing.T) {
	k := key{"bank", "web"}
	w := world{instances: map[key]instance{}, workloads: map[key]workload{}}
	c := &Control{}
	c.publish(w)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 1000 {
			w.instances[k], w.workloads[k] = instance{}, workload{}
			delete(w.instances, k)
			delete(w.workloads, k)
		}
		w.instances[k], w.workloads[k] = instance{}, workload{}
	}()
	for range 1000 {
		for range c.world.instances {
			t.Fatal("an instance that was not published")
		}
		for range c.world.workloads {
			t.Fatal("a workload that was not published")
		}
	}
	<-done
	if len(c.world.instances)+len(c.world.workloads) != 0 {
		t.Error("what was published has changed")
	}
}
