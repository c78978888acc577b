package main

import "testing"

// TestH2spec runs all cases, the strict ones too. Each that fails is printed.
func TestH2spec(t *testing.T) {
	ok, err := run("", true)
	if err != nil || !ok {
		t.Errorf("cases have failed, see above: %v", err)
	}
}
