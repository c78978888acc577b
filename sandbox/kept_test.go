package sandbox

import (
	"strings"
	"testing"
)

const goodKept = `{"version":1,"id":"0123456789ab","record":{"version":1,"options":{"name":"n","image":"i","egress":["any"],"remove":true},
"info":{"id":"0123456789ab","name":"n","image":"i","args":["x"],"policy":"baseline","created":"2026-11-22T10:00:00Z","phase":""},"made":true,
"process":{"args":["x"],"env":null,"cwd":"/","uid":0,"gid":0}}}`

// TestKeptOptions gives a restored sandbox what it had, and little else.
func TestKeptOptions(t *testing.T) {
	k, err := parseKept([]byte(goodKept))
	if err != nil {
		t.Fatal(err)
	}
	o, err := k.options(Options{Name: "again", Publish: []string{"80:80"}, Labels: map[string]string{"a": "b"}})
	if err != nil || o.Name != "again" || o.Remove || o.Hostname != k.ID || len(o.Egress) != 0 || len(o.Publish) != 1 || o.Image != "i" || o.Labels["a"] != "b" {
		t.Errorf("%+v, %v", o, err)
	}
	if o, err := k.options(Options{}); err != nil || len(o.Egress) != 1 {
		t.Errorf("with the network it had: %+v, %v", o, err)
	}
	if _, err := k.options(Options{Image: "other", Stdin: true, Memory: 1}); err == nil || !strings.HasPrefix(err.Error(), "Image, Stdin, Memory: ") {
		t.Errorf("changed: %v", err)
	}
	k.Record.Options.Egress = nil
	if _, err := k.options(Options{Egress: []string{"any"}}); err == nil || !strings.Contains(err.Error(), "without a network") {
		t.Errorf("a network it never had: %v", err)
	}
}

func FuzzKept(f *testing.F) {
	f.Add([]byte(goodKept))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if k, err := parseKept(raw); err == nil && (!validID.MatchString(k.ID) || len(k.Record.Process.Args) == 0) {
			t.Errorf("taken: %+v", k)
		}
	})
}
