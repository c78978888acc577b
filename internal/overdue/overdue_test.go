package overdue

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestTell(t *testing.T) {
	for name, took := range map[string]time.Duration{"late": 61 * time.Second, "in time": 59 * time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				told := ""
				stop := Tell(ctx, time.Minute, func(stacks []byte) { told = string(stacks) })
				time.Sleep(time.Hour)
				cancel()
				time.Sleep(took)
				stop()
				stop()
				if late := strings.Contains(told, "TestTell"); late != (took > time.Minute) {
					t.Errorf("told %q", told)
				}
			})
		})
	}
}

func TestStopBeforeEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		stop := Tell(ctx, time.Minute, func([]byte) { t.Error("told of what had ended") })
		stop()
		cancel()
		time.Sleep(time.Hour)
	})
}
