package control

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// decision is what should change about the instances of one workload.
type decision struct {
	create  int
	remove  []key
	running int
	// wait is how long until another look is due because of back-off; 0 means
	// nothing is waited for.
	wait time.Duration
	// reason and message say why the workload is not complete, if it is not.
	reason  string
	message string
}

// launchHash names everything about a workload that a running instance cannot
// take over live: a change of it replaces the instance.
func launchHash(s spec.Workload, digest string) string {
	s.GuardPolicies = nil // live
	s.Replicas = nil
	s.OnContain = ""
	for n := range s.Ports {
		s.Ports = slices.Clone(s.Ports)
		s.Ports[n].Publish = 0 // live
	}
	data, err := json.Marshal(struct {
		Spec   spec.Workload
		Digest string
	}{s, digest})
	if err != nil {
		return "" // plain values always marshal
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

// retry counts the failures of a workload's instances, and keeps what the last
// one died of: the instance itself is removed at once.
type retry struct {
	failures        int
	last            time.Time
	reason, message string
}

// failed is the retry after one more failure.
func (r retry) failed(ik key, i instance, now time.Time) retry {
	return retry{r.failures + 1, now, orElse(i.status.Reason, string(i.status.Phase)), fmt.Sprintf("%s: %s", ik.Name, i.status.Message)}
}

// after is when the next instance may be created: one second after the first
// failure, doubling to a minute.
func (r retry) after() time.Time {
	if r.failures == 0 {
		return time.Time{}
	}
	return r.last.Add(min(time.Second<<min(r.failures-1, 6), time.Minute))
}

// decide compares a workload's instances with what it asks for. A new
// instance is started before an outdated one is removed.
func (w world) decide(k key, digest string, r retry, now time.Time) decision {
	wl := w.workloads[k]
	want := 1
	if wl.spec.Replicas != nil {
		want = int(*wl.spec.Replicas)
	}
	hash := launchHash(wl.spec, digest)
	var current, outdated, running []key
	var d decision
	held, died := 0, r
	for _, ik := range sortedKeys(w.instances) {
		i := w.instances[ik]
		switch {
		case ik.Namespace != k.Namespace || i.workload != k.Name || i.deleting:
		case i.final():
			d.remove = append(d.remove, ik)
			died = died.failed(ik, i, now)
		case i.status.Phase == wire.PhaseContained || slices.Contains(w.epoch.Instances, ik.Name):
			if wl.spec.OnContain != "Replace" {
				held++
			}
		case i.specHash != hash:
			outdated = append(outdated, ik)
		default:
			current = append(current, ik)
			if i.status.Phase == wire.PhaseRunning {
				running = append(running, ik)
			}
		}
	}
	d.running = len(running)
	if d.running < want-held && died.failures > 0 {
		d.reason, d.message = died.reason, fmt.Sprintf("%s; failures so far: %d", died.message, died.failures)
	}
	switch missing := want - held - len(current); {
	case missing > 0 && now.Before(r.after()):
		d.wait = r.after().Sub(now)
	case missing > 0:
		d.create = missing
	case missing < 0:
		d.remove = append(d.remove, current[:min(-missing, len(current))]...)
	}
	if len(running) >= want-held {
		d.remove = append(d.remove, outdated...)
	}
	if held > 0 {
		d.reason, d.message = "Contained", fmt.Sprintf("%d of %d instances are contained and held; read `hauberk incidents`, then delete the instance to replace it", held, want)
	}
	return d
}

// place chooses the ready node with the fewest instances.
func (w world) place() (string, error) {
	count := map[string]int{}
	for _, i := range w.instances {
		count[i.node]++
	}
	best := ""
	for name, n := range w.nodes {
		if n.ready && (best == "" || count[name] < count[best] || count[name] == count[best] && name < best) {
			best = name
		}
	}
	if best == "" {
		return "", fmt.Errorf("no node is ready: %d known; start hauberk-node", len(w.nodes))
	}
	return best, nil
}

func orElse(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
