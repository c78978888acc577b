package vm

import (
	"encoding/json"
	"strings"
	"testing"
)

func FuzzParseSnapshot(f *testing.F) {
	good, err := json.Marshal(Snapshot{Version: 1, Key: "k", Slots: []Slot{"r0", "w1"}, Networks: 1, Bytes: 1, SHA256: strings.Repeat("0", 64)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"version":1,"slots":["r0","r0"]}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := parseSnapshot(raw)
		if err != nil {
			return
		}
		if s.Bytes <= 0 || s.Networks < 1 || s.Networks > MaxNetworks || len(s.Slots) > MaxDisks {
			t.Errorf("taken: %+v", s)
		}
	})
}
