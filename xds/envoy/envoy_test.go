package envoy_test

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"golang.org/x/tools/txtar"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"hauberk.dev/xds/envoy"
)

func blank(kind envoy.Kind) proto.Message {
	return [...]proto.Message{&tls.Secret{}, &cluster.Cluster{}, &endpoint.ClusterLoadAssignment{}, &listener.Listener{}, &route.RouteConfiguration{}}[kind]
}

// body is a resource written as JSON, on the wire.
func body(t testing.TB, kind envoy.Kind, text []byte) (name string, raw []byte) {
	t.Helper()
	m := blank(kind)
	if err := protojson.Unmarshal(text, m); err != nil {
		t.Fatal(err)
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if e, ok := m.(*endpoint.ClusterLoadAssignment); ok {
		return e.ClusterName, raw
	}
	return m.(interface{ GetName() string }).GetName(), raw
}

// each calls f for each case of testdata. An archive is named after its kind;
// a file of it holds a resource, a line "---" and what is made of it: JSON of
// the value, or lines of which each is part of the refusal.
func each(t testing.TB, f func(name string, kind envoy.Kind, in []byte, want string)) {
	t.Helper()
	seen := 0
	for kind := range envoy.Kinds {
		a, err := txtar.ParseFile(filepath.Join("testdata", kind.String()+".txtar"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range a.Files {
			in, want, ok := strings.Cut(string(file.Data), "---\n")
			if !ok {
				t.Fatalf("%s: no line of ---", file.Name)
			}
			seen++
			f(kind.String()+"/"+file.Name, kind, []byte(in), want)
		}
	}
	if seen == 0 {
		t.Fatal("no case")
	}
}

func TestRead(t *testing.T) {
	each(t, func(name string, kind envoy.Kind, in []byte, want string) {
		t.Run(name, func(t *testing.T) {
			own, raw := body(t, kind, in)
			v, err := envoy.Read(kind, own, raw)
			if strings.HasPrefix(want, "{") {
				got, _ := json.Marshal(v)
				if err != nil || string(got) != strings.TrimSpace(want) {
					t.Errorf("got  %s\nwant %s\nerr %v", got, want, err)
				}
				return
			}
			if err == nil {
				t.Fatalf("not refused: %+v", v)
			}
			lines := strings.Split(strings.TrimSpace(want), "\n")
			for _, line := range lines {
				if !strings.Contains(err.Error(), line) {
					t.Errorf("refused with %s\nwant %s", err, line)
				}
			}
		})
	})
}

// FuzzRead proves that no bytes break the reader, and that what it accepts it
// accepts again the same.
func FuzzRead(f *testing.F) {
	each(f, func(_ string, kind envoy.Kind, in []byte, _ string) {
		name, raw := body(f, kind, in)
		f.Add(int(kind), name, raw)
	})
	f.Fuzz(func(t *testing.T, kind int, name string, raw []byte) {
		if kind < 0 || kind >= int(envoy.Kinds) || len(raw) > 1<<16 {
			return
		}
		v, err := envoy.Read(envoy.Kind(kind), name, raw)
		if err != nil {
			if len(err.Error()) > 64<<10 {
				t.Errorf("a refusal of %d bytes", len(err.Error()))
			}
			return
		}
		one, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		again, err := envoy.Read(envoy.Kind(kind), name, raw)
		two, _ := json.Marshal(again)
		if err != nil || string(one) != string(two) {
			t.Errorf("first %s\nthen %s, %v", one, two, err)
		}
	})
}
