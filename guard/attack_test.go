package guard

import "testing"

func TestLoads(t *testing.T) {
	o := boot(t, true, map[string][]byte{}, "status")
	t.Log(o.console)
}
