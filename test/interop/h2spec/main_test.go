package main

import "testing"

// TestH2spec runs all cases, the strict ones too, against the engine of the mesh
// and against the proxy alone in front of either kind of server. Each that fails
// is printed.
func TestH2spec(t *testing.T) {
	for _, proxy := range []string{"", "http", "http2"} {
		ok, err := run("", proxy, true)
		if err != nil || !ok {
			t.Errorf("alone %q: cases have failed, see above: %v", proxy, err)
		}
	}
}
