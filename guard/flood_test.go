package guard

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/spec"
	"hauberk.dev/vm"
)

// floodSize is how many acts a flood has: 100,000, or what HAUBERK_TEST_FLOOD
// says.
func floodSize(t *testing.T) int { return sizeOf(t, "HAUBERK_TEST_FLOOD", 100_000) }

// floodExecs is how many programs a flood runs: 3,000, for each takes an emulated
// processor some milliseconds, or what HAUBERK_TEST_EXECS says.
func floodExecs(t *testing.T) int { return sizeOf(t, "HAUBERK_TEST_EXECS", 3_000) }

func sizeOf(t *testing.T, variable string, usual int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 10 {
		t.Fatalf("%s=%q: want a number, 10 or more", variable, text)
	}
	return n
}

// account checks that of every operation each act is told, lost, merged or
// held back, and that as many records came as were sent.
func account(t *testing.T, st Status, told []Event) {
	t.Helper()
	records, merged := map[Op]uint64{}, map[Op]uint64{}
	series := map[uint64]uint64{}
	for _, e := range told {
		op := e.Op
		if op == OpRepeated {
			op = Op(e.Detail)
		} else {
			records[op]++
		}
		if e.Series == 0 && op < OpStarted { // there were too many series to count it in one
			merged[op]++
		}
		if e.Series != 0 && e.Count > series[e.Series] {
			merged[op] += e.Count - series[e.Series]
			series[e.Series] = e.Count
		}
	}
	if len(st.Tallies) == 0 {
		t.Error("there are no tallies")
	}
	for op, n := range st.Tallies {
		if n.Sent+n.Merged+n.Lost+n.Held != n.Happened {
			t.Errorf("operation %d: %d sent, %d merged, %d lost and %d held are not the %d that happened", op, n.Sent, n.Merged, n.Lost, n.Held, n.Happened)
		}
		if records[op] != n.Sent {
			t.Errorf("operation %d: %d records came of %d sent", op, records[op], n.Sent)
		}
		if op < OpStarted && merged[op] != n.Sent+n.Merged {
			t.Errorf("operation %d: the records stand for %d acts; %d were sent and %d merged", op, merged[op], n.Sent, n.Merged)
		}
	}
	for op := range records {
		if st.Tallies[op].Happened == 0 {
			t.Errorf("operation %d: it was told of and never happened", op)
		}
	}
}

// A ring that nobody drains loses events, counts each, and never lets a
// forbidden act pass (B16, B17, B18).
func TestFullRingStillRefuses(t *testing.T) {
	files := imageFiles()
	files[".strict"] = compileForTest(t, 1, strict()).Blob
	limited := strict()
	limited.Limits = &spec.GuardLimits{AuditPerSecond: 1}
	files[".limited"] = compileForTest(t, 2, limited).Blob
	o := boot(t, true, files, "policy .strict", "hold denystorm 2000", "hold flood /etc/app 2000 1000", "hold drop /tmp/x", "hold execs 260",
		"status", "drain", "recount", "run drop=2 /tmp/x",
		"policy .limited", "run execs=2 40", "recount", "status")
	for _, a := range []string{"denystorm", "flood", "drop", "drop=2"} {
		if got := o.ran[a]; !strings.HasPrefix(got, "exit 10 ") {
			t.Errorf("%s: %s; want it refused", a, got)
		}
	}
	if len(o.status) != 2 {
		t.Fatalf("%d statuses; want 2", len(o.status))
	}
	st := o.status[0]
	if n := st.Tallies[OpWrite]; n.Happened != 2000 || n.Lost == 0 {
		t.Errorf("writes: %+v; want 2000, and losses among them", n)
	}
	if n := st.Tallies[OpStarted]; n.Happened < 260 || n.Lost == 0 {
		t.Errorf("programs started: %+v; want more than 260, and losses among them", n)
	}
	if st.Lost == 0 || st.AuditLost == 0 {
		t.Errorf("status %+v; want losses of both rings", st)
	}
	if n := o.status[1].Tallies[OpStarted]; n.Held == 0 {
		t.Errorf("programs started: %+v; want some held back by the limit of one in a second", n)
	}
	var told []Event
	for _, events := range o.events {
		told = append(told, events...)
	}
	account(t, o.status[1], told)
	if last := o.events["drop=2"]; len(last) == 0 || last[len(last)-1].Lost == 0 && last[0].Lost == 0 {
		t.Errorf("an event after the loss does not tell of it: %v", last)
	}
}

// flood makes a container do one forbidden thing very often, then many
// different ones, run many programs and try to run one it wrote, while the host
// takes what the agent sends. Nothing passes, everything is accounted for, and
// the agent stays as small as it was.
func (s *sandbox) flood(t *testing.T, ctx context.Context, box *vm.Process) {
	t.Helper()
	before := s.guardStatus(t, ctx)
	used, err := s.c.Stats(ctx)
	if err != nil {
		t.Fatal(err)
	}
	n, programs := floodSize(t), floodExecs(t)
	refused := max(n/10, programs)
	for run, want := range map[string]int{
		fmt.Sprintf("flood /etc/app %d 1", n): 10, fmt.Sprintf("flood=2 /etc/app %d %d", n/10, n/10): 10,
		fmt.Sprintf("execs %d", programs): 0, fmt.Sprintf("execstorm %d", refused): 10,
	} {
		if got := s.run(t, ctx, box, run); got != want {
			t.Errorf("%s: exit %d, want %d", run, got, want)
		}
	}
	after := s.guardStatus(t, ctx)
	if got := after.Tallies[OpWrite].Happened - before.Tallies[OpWrite].Happened; got != uint64(n+n/10) {
		t.Errorf("%d writes were refused, %d counted", n+n/10, got)
	}
	if got := after.Tallies[OpStarted].Happened - before.Tallies[OpStarted].Happened; got != uint64(programs+4) {
		t.Errorf("%d programs were started, %d counted", programs+4, got)
	}
	if got := after.Tallies[OpExec].Happened - before.Tallies[OpExec].Happened; got != uint64(refused) {
		t.Errorf("%d programs were refused, %d counted", refused, got)
	}
	t.Logf("writes: %+v; programs: %+v, refused: %+v", after.Tallies[OpWrite], after.Tallies[OpStarted], after.Tallies[OpExec])
	s.awaitAccount(t, ctx)
	now, err := s.c.Stats(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const most = 512 << 10
	if now.AgentPrivate > used.AgentPrivate+most {
		t.Errorf("the agent grew from %d kB to %d kB", used.AgentPrivate>>10, now.AgentPrivate>>10)
	}
	t.Logf("agent: %d kB private before the flood, %d kB after it", used.AgentPrivate>>10, now.AgentPrivate>>10)
}

// awaitAccount waits until all that was sent has come, and checks the account.
func (s *sandbox) awaitAccount(t *testing.T, ctx context.Context) {
	t.Helper()
	for {
		st := s.guardStatus(t, ctx)
		s.mu.Lock()
		told := append([]Event(nil), s.events...)
		s.mu.Unlock()
		came, sent, acts, series := uint64(0), uint64(0), uint64(0), map[uint64]uint64{}
		for _, e := range told {
			op := e.Op
			if op == OpRepeated {
				op = Op(e.Detail)
			} else {
				came++
			}
			if op >= OpStarted {
				continue
			}
			if e.Series == 0 {
				acts++
			}
			if e.Series != 0 && e.Count > series[e.Series] {
				acts += e.Count - series[e.Series]
				series[e.Series] = e.Count
			}
		}
		merged := uint64(0)
		for op, n := range st.Tallies {
			sent += n.Sent
			if op < OpStarted {
				merged += n.Sent + n.Merged
			}
		}
		if came == sent && acts == merged || ctx.Err() != nil {
			account(t, st, told)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (s *sandbox) guardStatus(t *testing.T, ctx context.Context) Status {
	t.Helper()
	raw, err := s.c.GuardStatus(ctx)
	if err != nil {
		t.Fatal(err)
	}
	st, err := DecodeStatus(raw)
	if err != nil {
		t.Fatal(err)
	}
	return st
}
