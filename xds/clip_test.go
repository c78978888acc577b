package xds

import "testing"

// TestClip cuts no character in two: protobuf would take the whole message for none.
func TestClip(t *testing.T) {
	for in, want := range map[string]string{"abcd": "abcd", "abcde": "abcd...", "abc\u00e9": "abc...", "\u00e9\xff": "\u00e9\uFFFD"} {
		if got := clip(in, 4); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
