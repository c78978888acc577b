package guard

import (
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"testing"
)

// swapTimes is how often a policy is swapped under fire: 250, or what
// HAUBERK_TEST_SWAPS says.
func swapTimes(t *testing.T) int {
	t.Helper()
	text := os.Getenv("HAUBERK_TEST_SWAPS")
	if text == "" {
		return 250
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 10 {
		t.Fatalf("HAUBERK_TEST_SWAPS=%q: want a number, 10 or more", text)
	}
	return n
}

// While a policy is swapped again and again, eight loops do what it forbids.
// None gets through, and each try is counted: once with the events taken away,
// once with rings that nobody drains (B16, B20).
func TestSwapLeavesNoGap(t *testing.T) {
	files := imageFiles()
	files[".strict"] = compileForTest(t, 1, strict()).Blob
	// Generations only rise, so the second run begins above the first's.
	again := compileForTest(t, 1_000_000, strict()).Blob
	if got := binary.LittleEndian.Uint64(again[8:]); got != 1_000_000 {
		t.Fatalf("generation %d stands elsewhere in a blob", got)
	}
	files[".again"] = again
	n := swapTimes(t)
	o := boot(t, true, files, "policy .strict",
		fmt.Sprintf("swap .strict %d drain underfire /shm/stop", n), "status",
		fmt.Sprintf("swap .again %d leave underfire=2 /shm/stop", n), "status")
	if len(o.status) != 2 {
		t.Fatalf("%d statuses, want 2", len(o.status))
	}
	var before Status
	for i, name := range []string{"underfire", "underfire=2"} {
		var runs, opens uint64
		if _, err := fmt.Sscanf(o.ran[name], "exit 10 refused: %d runs %d opens", &runs, &opens); err != nil || runs < 10 || opens < 10 {
			t.Errorf("%s: %q (%v); want every one of many tries refused", name, o.ran[name], err)
		}
		st := o.status[i]
		if got := st.Tallies[OpExec].Happened - before.Tallies[OpExec].Happened; got != runs {
			t.Errorf("%s: %d runs were refused, %d told", name, runs, got)
		}
		if got := st.Tallies[OpWrite].Happened - before.Tallies[OpWrite].Happened; got != opens {
			t.Errorf("%s: %d opens were refused, %d told", name, opens, got)
		}
		t.Logf("%d swaps, %d runs and %d opens refused; %+v, %+v", n, runs, opens, st.Tallies[OpExec], st.Tallies[OpWrite])
		before = st
	}
}
