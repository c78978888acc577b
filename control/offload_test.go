package control

import (
	"testing"
	"time"

	wire "hauberk.dev/api/node"
)

func TestLoadIsTooMuchOnlyTwiceInARow(t *testing.T) {
	at := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	var l load
	beat := func(records uint64, agent int) string {
		at = at.Add(3 * time.Second)
		var why string
		l, why = l.next(wire.GuardHeartbeat{At: at, AuditSequence: records / 2, AuditLost: records - records/2, AgentKiB: agent})
		return why
	}
	for n, step := range []struct {
		records uint64
		agent   int
		over    bool
	}{
		{1 << 40, 0, false},        // the first says nothing of a rate
		{1<<40 + 3*2001, 0, false}, // once
		{1<<40 + 3*2002, 0, false}, // calm again
		{1<<40 + 3*9000, 0, false}, // once
		{1<<40 + 3*19000, 0, true}, // twice
		{5, 0, false},              // began anew
		{6, agentCeiling, false},   // as much as it may
		{7, agentCeiling + 1, false},
		{8, agentCeiling + 1, true},
	} {
		if why := beat(step.records, step.agent); (why != "") != step.over {
			t.Errorf("step %d: %q", n, why)
		}
	}
	if _, why := l.next(wire.GuardHeartbeat{At: at, AgentKiB: 1 << 30}); why != "" {
		t.Errorf("the same heartbeat counts twice: %s", why)
	}
}
