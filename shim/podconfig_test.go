package shim

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/anypb"
)

// field appends a field of a message: a number, a string, bytes or messages.
func field(b []byte, n protowire.Number, v any) []byte {
	switch v := v.(type) {
	case int:
		return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), uint64(v))
	case string:
		return within(b, n, []byte(v))
	case []byte:
		return within(b, n, v)
	}
	panic("no such field")
}

// podConfigOf is a PodSandboxConfig with all that is read.
func podConfigOf() []byte {
	dns := field(field(field(field(nil, 1, "10.0.0.10"), 1, "10.0.0.11"), 2, "example.org"), 3, "ndots:5")
	resources := field(field(field(nil, 1, 100000), 2, 150000), 4, 200<<20)
	linux := field(field(field(nil, 1, "/kubepods"), 3, field(field(nil, 1, "net.ipv4.ip_unprivileged_port_start"), 2, "0")), 5, resources)
	b := field(nil, 1, field(field(field(nil, 1, "web"), 2, "1234-uid"), 3, "default"))
	b = field(field(b, 2, "web-0"), 4, dns)
	b = field(b, 7, field(field(nil, 1, "note"), 2, "x"))
	return field(field(b, 8, linux), 99, 7)
}

func TestPodConfig(t *testing.T) {
	q := sandboxCall{id: "pod", bundle: "/b", netns: "/run/netns/x", options: &anypb.Any{TypeUrl: podConfigURL, Value: podConfigOf()}}
	w, err := q.wish()
	if err != nil {
		t.Fatal(err)
	}
	if w.id != "pod" || w.uid != "1234-uid" || w.hostname != "web-0" || w.netns != "/run/netns/x" || w.size.MemoryMiB < 200 || w.size.MemoryMiB > 400 {
		t.Errorf("%+v", w)
	}
	if len(w.sysctls) != 1 || w.sysctls[0].Name != "net.ipv4.ip_unprivileged_port_start" || w.sysctls[0].Value != "0" {
		t.Errorf("sysctls %v", w.sysctls)
	}
	files := map[string]string{}
	for _, f := range w.files {
		files[f.Path] = string(f.Data)
	}
	if want := "search example.org\nnameserver 10.0.0.10\nnameserver 10.0.0.11\noptions ndots:5\n"; files["/etc/resolv.conf"] != want || files["/etc/hostname"] != "web-0\n" {
		t.Errorf("files %q", files)
	}
	if w, err := (sandboxCall{id: "pod"}).wish(); err != nil || w.hostname != "pod" || w.size.MemoryMiB == 0 {
		t.Errorf("without options: %+v, %v", w, err)
	}
}

func TestPodConfigRefused(t *testing.T) {
	host := func(n protowire.Number) []byte { return field(nil, 8, field(nil, 2, field(nil, 1, field(nil, n, 2)))) }
	for want, o := range map[string]*anypb.Any{
		"network namespace": {TypeUrl: podConfigURL, Value: host(1)},
		"PID namespace":     {TypeUrl: podConfigURL, Value: host(2)},
		"IPC namespace":     {TypeUrl: podConfigURL, Value: host(3)},
		"it is no message":  {TypeUrl: podConfigURL, Value: []byte{0xff}},
		"type":              {TypeUrl: "other"},
		"kernel.panic":      {TypeUrl: podConfigURL, Value: field(nil, 8, field(nil, 3, field(field(nil, 1, "kernel.panic"), 2, "1")))},
		"dns_config":        {TypeUrl: podConfigURL, Value: field(nil, 4, field(nil, 1, "10.0.0.1\nnameserver 6.6.6.6"))},
	} {
		if _, err := (sandboxCall{id: "pod", options: o}).wish(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func FuzzPodConfig(f *testing.F) {
	f.Add(podConfigOf())
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := parsePodConfig(&anypb.Any{TypeUrl: podConfigURL, Value: raw})
		if err != nil {
			return
		}
		for _, file := range c.files("x") {
			if len(file.Data) > 2*len(raw)+4096 {
				t.Errorf("%s has %d bytes of %d", file.Path, len(file.Data), len(raw))
			}
		}
		_, _ = c.config("pod") // must not panic
	})
}
