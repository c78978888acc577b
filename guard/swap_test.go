package guard

import (
	"encoding/binary"
	"fmt"
	"testing"

	"hauberk.dev/api/spec"
)

// swapTimes is how often a policy is swapped under fire: 100, or what
// HAUBERK_TEST_SWAPS says.
func swapTimes(t *testing.T) int { return sizeOf(t, "HAUBERK_TEST_SWAPS", 100) }

// While two policies that forbid the same by other rules take turns, eight loops
// do what both forbid: of programs, files, the network and calls. None gets
// through, and each try is counted: once with the events taken away, once with
// rings that nobody drains (B16, B20).
func TestSwapLeavesNoGap(t *testing.T) {
	files := imageFiles()
	files[".strict"] = compileForTest(t, 1, strict()).Blob
	files[".other"] = compileForTest(t, 1, other()).Blob
	// Generations only rise, so the second run begins above the first's.
	again := compileForTest(t, 1_000_000, strict()).Blob
	if got := binary.LittleEndian.Uint64(again[8:]); got != 1_000_000 {
		t.Fatalf("generation %d stands elsewhere in a blob", got)
	}
	files[".again"] = again
	n := swapTimes(t)
	o := boot(t, true, files, "policy .strict",
		fmt.Sprintf("swap .strict,.other %d drain underfire /shm/stop", n), "status",
		fmt.Sprintf("swap .again,.other %d leave underfire=2 /shm/stop", n), "status")
	if len(o.status) != 2 {
		t.Fatalf("%d statuses, want 2", len(o.status))
	}
	var before Status
	for i, name := range []string{"underfire", "underfire=2"} {
		var tries [4]uint64
		if _, err := fmt.Sscanf(o.ran[name], "exit 10 refused: %d runs %d opens %d connections %d sockets", &tries[0], &tries[1], &tries[2], &tries[3]); err != nil {
			t.Errorf("%s: %q (%v); want every one of many tries refused", name, o.ran[name], err)
		}
		st := o.status[i]
		for j, op := range []Op{OpExec, OpWrite, OpEgress, OpRawSocket} {
			if got := st.Tallies[op].Happened - before.Tallies[op].Happened; got != tries[j] || got < 10 {
				t.Errorf("%s: operation %d: %d were refused, %d told; want the same, and many", name, op, tries[j], got)
			}
			t.Logf("%s: %d swaps, operation %d: %d refused; %+v", name, n, op, tries[j], st.Tallies[op])
		}
		before = st
	}
}

// other forbids what strict does, by rules of other numbers, lists and objects.
func other() spec.GuardPolicy {
	p := strict()
	p.Exec = &spec.GuardExec{Origin: "image", AnonymousMemory: "allow", ShellOnSocket: "allow"}
	p.Files = []spec.GuardFile{{Path: "/srv/vault", Deny: "rw"}, {Path: "/etc", Deny: "w"}, {Path: "/etc/app/2", Allow: "w"}}
	p.Net = &spec.GuardNet{Egress: []spec.GuardEgress{{CIDR: "198.51.100.0/24"}, {CIDR: "192.0.2.0/30", Ports: []int32{80, 8080}}}, Ingress: []spec.GuardIngress{{Ports: []int32{8080}}}}
	p.Sys = &spec.GuardSys{Deny: []spec.GuardOperation{"setns", "rawsocket", "swap"}}
	return p
}
