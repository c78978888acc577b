package alone

import (
	"errors"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"testing"

	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
)

// Every fault of a file is told at once, with its line, its field and what to
// write.
func TestFaultsOfAFile(t *testing.T) {
	text := `version: 2
listeners:
- name: web
  address: nowhere
  colour: blue
  connections: many
- name: web
  address: :80
  protocol: quic
limits: {head: 1MB, idle_timeout: 5}
hosts:
- names: []
  routes:
  - {path: /a, prefix: /b, upstream: none, respond: {status: 99}}
  - {regex: "(", redirect: {to: "$2"}}
  - {prefix: x, static: {root: /does/not/exist}, request_headers: {set: {Host: x, "a b": c}}}
  - rewrite: $nope
upstreams:
- {name: up, endpoints: [], balance: sometimes}
`
	faults := func(text string) string {
		_, err := Parse("proxy.yaml", t.TempDir(), []byte(text))
		var f *Faults
		if !errors.As(err, &f) {
			t.Fatalf("%v", err)
		}
		return err.Error()
	}
	got := faults(text)
	for _, want := range []string{
		`proxy.yaml:5: listeners[0].colour: no such field; listeners[0] takes name, address, `,
		`proxy.yaml:6: listeners[0].connections: "many" is no whole number`,
		`proxy.yaml:10: limits.head: "1MB" is no size above zero; write for example 512, 16KiB or 10MiB`,
		`proxy.yaml:10: limits.idle_timeout: "5" is no duration above zero; write for example 30s or 5m`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	// What can be read is then judged.
	text = regexp.MustCompile(`(?m)^  (colour|connections).*\n|^limits.*\n`).ReplaceAllString(text, "")
	got = faults(text)
	for _, want := range []string{
		`proxy.yaml:1: version: 2 is not known; write version: 1`,
		`proxy.yaml:4: listeners[0].address: "nowhere" is no address; write for example`,
		`proxy.yaml:5: listeners[1].name: "web" is taken`,
		`proxy.yaml:7: listeners[1].protocol: "quic" is not known; use http, tcp, udp, sni`,
		`proxy.yaml:9: hosts[0].names: is empty`,
		`proxy.yaml:11: hosts[0].routes[0]: more than one of path, prefix and regex; use one`,
		`proxy.yaml:11: hosts[0].routes[0]: 2 actions; use exactly one of`,
		`proxy.yaml:11: hosts[0].routes[0].upstream: no upstream "none"; declare it under upstreams`,
		`proxy.yaml:11: hosts[0].routes[0].respond.status: 99 is out of range`,
		`proxy.yaml:12: hosts[0].routes[1].regex: `,
		`proxy.yaml:12: hosts[0].routes[1].redirect.to: $2, but the regex of the route has 0 groups`,
		`proxy.yaml:13: hosts[0].routes[2].prefix: "x" does not begin with /`,
		`proxy.yaml:13: hosts[0].routes[2].static.root: `,
		`Host is the proxy's own to write`,
		`"a b" is no field name`,
		`$nope is not known`,
		`proxy.yaml:16: upstreams[0].endpoints: is empty`,
		`proxy.yaml:16: upstreams[0].balance: "sometimes" is not known; use `,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	// An address is one socket, also where the system picks the port.
	twice := "version: 1\nlisteners: [{name: a, address: '127.0.0.1:0'}, {name: b, address: '127.0.0.1:0'}]\nhosts: [{names: [h], routes: [{respond: {status: 200}}]}]\n"
	if got := faults(twice); !strings.Contains(got, `"127.0.0.1:0" is served by another listener`) {
		t.Errorf("%s", got)
	}
	with := "traces: {collector: {address: x, tls: {ca: /none}}, sample: 1001}\n" + one("  - {upstream: up, hedge: {tries: 9, percentile: x}}\n  - {respond: {status: 200}, hedge: {after: 1s}}", upstreamOf("127.0.0.1:1"))
	for what, text := range map[string]string{`"x" is no number`: with, "9 tries at once": strings.Replace(with, "percentile: x", "percentile: 99", 1)} {
		if got := faults(text); !strings.Contains(got, what) {
			t.Errorf("no %q in\n%s", what, got)
		}
	}
	got = faults(strings.Replace(with, "tries: 9, percentile: x", "tries: 9, after: 1s", 1))
	for _, want := range []string{`traces.sample: 1001 is out of range`, `traces.collector.address: "x" is no address`, `traces.collector.tls.ca: open /none`, `routes[0].hedge: hedge: 9 tries`, `routes[1].hedge: goes with upstream or split`} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	// What would be taken and not be done.
	idle := "limits: {head: 17KiB}\n" + one("  - {upstream: up, cache: {}, transcode: {descriptors: /none}}", upstreamOf("127.0.0.1:1"))
	got = faults(idle)
	for _, want := range []string{"limits.head: 17408 bytes is out of range; use 1KiB to 16KiB", "routes[0].cache: goes with upstream or split, without transcode"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	for _, text := range []string{"", "a: b: c", "version: 1\n---\nversion: 1\n", "version: &a 1\nadmin: *a\n", "- 1", "version: 1\nversion: 1\n"} {
		faults(text)
	}
}

// TestExample takes the whole example of the documentation at its word.
func TestExample(t *testing.T) {
	doc, err := os.ReadFile("../../docs/proxy.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok1 := strings.Cut(string(doc), "```yaml\n")
	text, _, ok2 := strings.Cut(text, "```")
	if !ok1 || !ok2 {
		t.Fatal("docs/proxy.md has no example")
	}
	dir := t.TempDir()
	certify(t, dir, "shop", "shop.example.com")
	certify(t, dir, "internal-ca", "ca")
	certify(t, dir, "clients", "ca")
	certify(t, dir, "collector-ca", "ca")
	certify(t, dir, "proxy", "proxy.example")
	if err := os.Mkdir(dir+"/site", 0o755); err != nil {
		t.Fatal(err)
	}
	set, err := proto.Marshal(&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{
		protodesc.ToFileDescriptorProto(health.File_grpc_health_v1_health_proto)}})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"/shop.pb", "/bank.pb"} {
		if err := os.WriteFile(dir+name, set, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c, err := Parse("proxy.yaml", dir, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if c.Listeners[1].TLS.Certificates[0].Chain != dir+"/shop.pem" {
		t.Errorf("%+v", c.Listeners[1].TLS)
	}
	w, err := newWorld(c, nil, newStats(), newIdentities(c.Identities, slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	w.close(nil)
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(one("  - {prefix: /, respond: {status: 200}}")))
	f.Add([]byte("version: 1\nlisteners:\n- {name: a, address: ':1', protocol: sni, names: [{names: [x], upstream: u}]}\nupstreams: [{name: u, endpoints: [{address: 'a:1'}]}]"))
	f.Add([]byte("version: 1\nlisteners: [{name: a, address: ':1', protocol: bolt, calls: [{split: [], transcode: {to: json, bolt: {methods: [{name: m}]}}}]}]"))
	f.Add([]byte("{version: 1, limits: {head: 1KiB}, hosts: [{names: ['*.a'], routes: [{regex: '(a)', redirect: {to: '$1'}}]}]}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse("f", "/nonexistent", b)
		if (c == nil) == (err == nil) {
			t.Fatal(c, err)
		}
	})
}
