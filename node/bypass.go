package node

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/internal/netns"
	"hauberk.dev/plan"
)

// bypassEvery is how often the drop counters of each namespace are read. What
// they count was refused already; this is only how soon it is known.
const bypassEvery = 100 * time.Millisecond

// bypassLoop reports traffic that tried to pass the interception. A frame with
// a foreign source address, or a packet aimed straight at another sandbox,
// whose address no name resolves to, is an attack and contains the sender. Any
// other datagram or protocol may be a mistake and is reported.
func (n *Node) bypassLoop(ctx context.Context) error {
	seen := map[string]reading{}
	tick := time.NewTicker(bypassEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		present := map[string]reading{}
		for id, sandbox := range n.mesh.fenced() {
			before, ok := seen[id]
			if !ok {
				before = reading{drops: sandbox.base}
			}
			now, reports := since(before, sandbox.watch.Made, sandbox.ns.Dropped)
			if a, ok := n.find(id); ok {
				for _, r := range reports {
					n.violation(a, r)
				}
			}
			present[id] = now
		}
		seen = present
	}
}

// reading is what the counters of one namespace said.
type reading struct {
	drops netns.Drops
	made  uint64 // of the rules, with which counters begin anew
}

// since reads counters again and says what is new. A reading that failed, as the
// sandbox is being taken down, or during which the rules were made anew, counts
// for nothing: whose counters it has told is not known.
func since(before reading, made func() uint64, dropped func() (netns.Drops, error)) (reading, []wire.Report) {
	now := reading{made: made()}
	var err error
	if now.drops, err = dropped(); err != nil || now.made%2 != 0 || made() != now.made {
		return before, nil
	}
	if now.made != before.made {
		before.drops = netns.Drops{}
	}
	return now, bypassed(before.drops, now.drops)
}

// bypassed compares two readings and says what is new.
func bypassed(before, now netns.Drops) []wire.Report {
	var out []wire.Report
	if now.Spoofed > before.Spoofed {
		out = append(out, wire.Report{Severity: spec.SeverityCritical, Cause: "bypass", Rule: "source address", Denied: true,
			Detail: fmt.Sprintf("%d frames with an address that is not the sandbox's", now.Spoofed-before.Spoofed)})
	}
	old := map[string]uint64{}
	name := func(d netns.Drop) string { return fmt.Sprintf("%s:%d/%s", d.Destination, d.Port, protocol(d.Protocol)) }
	for _, d := range before.Bypass {
		old[name(d)] = d.Packets
	}
	for _, d := range now.Bypass {
		n := d.Packets - min(d.Packets, old[name(d)])
		if n == 0 {
			continue
		}
		r := wire.Report{Severity: spec.SeverityWarning, Cause: "mesh", Rule: "around the proxy", Denied: true,
			Detail: fmt.Sprintf("%d packets to %s", n, name(d))}
		if d.Protocol != unix.IPPROTO_TCP && plan.Guests.Contains(d.Destination) { // TCP is for the proxy to refuse
			r.Severity, r.Cause = spec.SeverityCritical, "bypass"
		}
		out = append(out, r)
	}
	if now.Rest > before.Rest {
		out = append(out, wire.Report{Severity: spec.SeverityWarning, Cause: "mesh", Rule: "around the proxy", Denied: true,
			Detail: fmt.Sprintf("%d packets that are neither IPv4 nor ARP, or to too many destinations to list", now.Rest-before.Rest)})
	}
	return out
}

func protocol(n uint8) string {
	switch n {
	case 1:
		return "icmp"
	case 6:
		return "tcp"
	case 17:
		return "udp"
	}
	return fmt.Sprintf("protocol %d", n)
}
