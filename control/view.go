package control

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"path/filepath"
	"slices"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/contain"
	"hauberk.dev/internal/version"
)

// status is the health of the chain, link by link.
func (c *Control) status() admin.Status {
	c.mu.Lock()
	w := c.world
	c.mu.Unlock()
	nodes, _, seen := c.hub.snapshot()
	head := c.log.Checkpoint()
	s := admin.Status{
		Version: version.String(), TrustDomain: c.conf.TrustDomain, StartedAt: c.started,
		API: c.api.URL(), Kubeconfig: c.kubeconfigPath(),
		Ledger: admin.Ledger{Size: head.Size, Root: base64.StdEncoding.EncodeToString(head.Root[:])},
	}
	for name, n := range nodes {
		count := 0
		for _, i := range w.instances {
			if i.node == name && i.status.Phase == wire.PhaseRunning {
				count++
			}
		}
		s.Nodes = append(s.Nodes, admin.Node{Name: name, Ready: n.ready, Accelerator: n.hello.Accelerator,
			GuardOff: n.hello.Measurement.GuardOff, LastSeen: seen[name], Instances: count, Spares: n.spares.Machines, SparesMiB: n.spares.MiB})
	}
	slices.SortFunc(s.Nodes, func(a, b admin.Node) int { return cmp.Compare(a.Name, b.Name) })
	s.Links = c.links(w, nodes)
	for _, sw := range c.rollouts.State().Switches {
		s.Degraded = append(s.Degraded, shownSwitch(sw))
	}
	return s
}

// links says of each link of the chain whether it holds. A link that nothing
// adopts is absent, never ok.
func (c *Control) links(w world, nodes map[string]nodeState) []admin.Link {
	count := func(phase wire.Phase) (n int) {
		for _, i := range w.instances {
			if i.status.Phase == phase {
				n++
			}
		}
		return n
	}
	ready, guardOff, withoutGuard := 0, 0, 0
	for _, n := range nodes {
		if n.ready {
			ready++
		}
		if n.hello.Measurement.GuardOff {
			guardOff++
		}
	}
	for _, i := range w.instances {
		if i.status.Phase == wire.PhaseRunning && (i.status.Guard.Programs == 0 || !nodes[i.node].ready) {
			withoutGuard++
		}
	}
	running, contained := count(wire.PhaseRunning), count(wire.PhaseContained)
	link := func(name string, adopted, holds bool, detail string) admin.Link {
		state := "ok"
		switch {
		case !adopted:
			state = "absent"
		case !holds:
			state = "broken"
		}
		return admin.Link{Name: name, State: state, Detail: detail}
	}
	unresolved := 0
	for _, i := range c.book.Incidents() {
		if i.State() == contain.Containing {
			unresolved++
		}
	}
	return []admin.Link{
		link("own", len(w.applications) > 0, true, fmt.Sprintf("%d applications", len(w.applications))),
		link("release", len(w.releases) > 0, true, fmt.Sprintf("%d release policies", len(w.releases))),
		link("launch", len(nodes) > 0, ready > 0, fmt.Sprintf("%d of %d nodes ready, %d instances running", ready, len(nodes), running)),
		link("node attestation", false, false, "no TPM quote is asked of nodes yet"),
		link("boot", len(nodes) > 0, guardOff == 0, fmt.Sprintf("guest measured by hauberk-node; %d nodes boot without the Guard", guardOff)),
		link("guard", running > 0, withoutGuard == 0, fmt.Sprintf("%d running instances whose Guard is not attached or not heard; %d switches lower policies", withoutGuard, len(c.rollouts.State().Switches))),
		link("identity", running > 0, true, "certificates of minutes, against a live ticket and a Guard heartbeat"),
		link("talk", len(w.access) > 0, true, fmt.Sprintf("%d access policies; nobody may call where there is none", len(w.access))),
		link("enclave", false, false, "no sandbox class with a TEE is adopted"),
		link("break", true, unresolved == 0, fmt.Sprintf("epoch %d, %d instances contained, %d incidents not fully receipted", c.book.Epoch().Number, contained, unresolved)),
	}
}

func (c *Control) kubeconfigPath() string { return filepath.Join(c.conf.Run, "kubeconfig") }

// instances lists every instance, of one namespace or of all.
func (c *Control) instances(namespace string) []admin.Instance {
	c.mu.Lock()
	w := c.world
	c.mu.Unlock()
	out := []admin.Instance{}
	for _, k := range sortedKeys(w.instances) {
		i := w.instances[k]
		if namespace != "" && k.Namespace != namespace {
			continue
		}
		g := i.status.Guard
		guard := fmt.Sprintf("generation %d, %d programs, %d lost", g.Generation, g.Programs, g.Lost)
		if g.Programs == 0 {
			guard = "absent"
		}
		phase := cmp.Or(i.status.Phase, wire.PhasePending)
		if _, revoked := c.book.Revoked(k.Name, "", "", ""); revoked && phase == wire.PhaseRunning {
			phase = wire.PhaseContained // revoked already, its node is about to say so
		}
		var degraded []string
		for _, sw := range c.rollouts.State().Over(w.subject(k, i, w.workloads[key{k.Namespace, i.workload}]), false) {
			degraded = append(degraded, sw.String())
		}
		out = append(out, admin.Instance{
			Name: k.Name, Namespace: k.Namespace, Workload: i.workload, Application: i.application, Node: i.node,
			Phase: string(phase), Reason: i.status.Reason, Message: i.status.Message,
			Address: i.address.String(), Image: i.spec.Image, Digest: i.digest, Identity: i.identity, Serial: i.status.Serial,
			StartedAt: i.status.StartedAt, ReadyMillis: i.status.ReadyMillis, Guard: guard, ExitCode: i.status.ExitCode, Degraded: degraded,
		})
	}
	return out
}

// incidents lists every incident, newest last.
func (c *Control) incidents(namespace string) []admin.Incident {
	out := []admin.Incident{}
	for _, i := range c.book.Incidents() {
		if namespace != "" && i.Namespace != namespace {
			continue
		}
		a := admin.Incident{
			Name: i.Name, Namespace: i.Namespace, Instance: i.Spec.Instance, Workload: i.Spec.Workload,
			Cause: i.Spec.Cause, Rule: i.Spec.Rule, Detail: i.Spec.Detail, Epoch: i.Epoch, State: string(i.State()),
			Observed: observed(i), ContainedMillis: i.Elapsed().Milliseconds(), Receipts: []admin.Receipt{},
		}
		for _, r := range i.Receipts {
			a.Receipts = append(a.Receipts, admin.Receipt{Point: r.Point, Node: r.Node, Act: r.Act, At: r.At})
		}
		out = append(out, a)
	}
	return out
}
