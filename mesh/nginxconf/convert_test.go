package nginxconf

import (
	"flag"
	"os"
	"strings"
	"testing"

	"hauberk.dev/mesh/alone"
)

var update = flag.Bool("update", false, "rewrite testdata")

func TestConvert(t *testing.T) {
	in, err := os.ReadFile("testdata/shop.conf")
	if err != nil {
		t.Fatal(err)
	}
	got, problems, err := Convert(string(in))
	if err != nil || len(problems) > 0 {
		t.Fatal(problems, err)
	}
	if *update {
		if err := os.WriteFile("testdata/shop.yaml", []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/shop.yaml")
	if err != nil || got != string(want) {
		t.Errorf("%v\n%s", err, got)
	}
	// The proxy takes it.
	dir := t.TempDir()
	if _, err := alone.Parse("shop.yaml", dir, []byte(strings.ReplaceAll(got, "/srv/site", dir))); err != nil {
		t.Error(err)
	}
}

// What is not converted is said by line.
func TestProblems(t *testing.T) {
	const text = `http {
  map $a $b { x y; }
  upstream u { ip_hash; server unix:/s; server a:1 backup; }
  server {
    listen 80 deferred;
    server_name ~^x;
    location ^~ /a/ { return 200; }
    location /a/b { return 200; }
    location ~ (?=x) { return 200; }
    location @named { return 200; }
    location /v { proxy_pass http://$host; }
    location /c { proxy_pass http://u; proxy_store on; }
    location /r { return 444; rewrite ^ /x; }
    location /n { }
  }
}
stream { }
`
	_, problems, err := Convert(text)
	if err != nil {
		t.Fatal(err)
	}
	lines := map[int]bool{}
	for _, p := range problems {
		lines[p.Line] = true
	}
	for _, line := range []int{2, 3, 5, 6, 8, 9, 10, 11, 12, 13, 14, 17} {
		if !lines[line] {
			t.Errorf("nothing said of line %d: %v", line, problems)
		}
	}
	for _, bad := range []string{"http {", "a b", "}", "x \"y;", strings.Repeat("a{", 20), ";"} {
		if y, _, err := Convert(bad); err == nil {
			t.Errorf("%q became %s", bad, y)
		}
	}
}

func FuzzConvert(f *testing.F) {
	in, err := os.ReadFile("testdata/shop.conf")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(in))
	f.Add("http { server { listen 1 ssl; ssl_certificate a; return 302 /$1; location ~ ^/(x)$ { proxy_pass https://b; } } }")
	f.Fuzz(func(t *testing.T, text string) { Convert(text) })
}

// TestConvertTwo converts what came with HTTP/2: gRPC, stored answers, certificates
// of clients.
func TestConvertTwo(t *testing.T) {
	const text = `http {
  upstream calls { server 10.0.0.1:50051; server 10.0.0.2:50051; }
  server {
    listen 80;
    http2 off;
    location /api/ { grpc_pass grpc://calls; }
    location /one/ { grpc_pass 10.0.0.3:50051; }
    location / { proxy_pass http://10.0.0.4:8080; proxy_cache zone; proxy_cache_valid 200 302 10m; proxy_cache_use_stale error timeout updating; proxy_cache_lock on; }
  }
  server {
    listen 81;
    http2 on;
    ssl_client_certificate /ca.pem;
    ssl_verify_client optional;
    location / { proxy_pass http://10.0.0.4:8080; }
  }
}`
	got, problems, err := Convert(text)
	if err != nil || len(problems) > 0 {
		t.Fatal(problems, err)
	}
	for _, want := range []string{"http2: off", "- name: \"calls\"\n  protocol: grpc\n", "- name: \"10.0.0.3:50051\"\n  protocol: grpc\n",
		"cache: {valid: 10m, stale_if_error: 24h, stale_while_revalidate: 24h}"} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is not in\n%s", want, got)
		}
	}
	if strings.Count(got, "http2: off") != 1 {
		t.Errorf("HTTP/2 is off twice:\n%s", got)
	}
	if _, err := alone.Parse("a.yaml", t.TempDir(), []byte(got)); err != nil {
		t.Errorf("%v\n%s", err, got)
	}
	for text, want := range map[string]string{
		"proxy_cache_path /x keys_zone=z:1m; server { return 200; }":                                               "in memory",
		"server { location /a/ { grpc_pass a:1; } location / { proxy_pass http://a:1; } }":                         "same servers",
		"server { listen 443 ssl; ssl_verify_client on; ssl_certificate /a; ssl_certificate_key /b; return 200; }": "without ssl_client_certificate",
		"server { location / { proxy_pass http://a:1; proxy_cache z; proxy_cache_valid 404 1m; } }":                "200, 301 and 302",
		"server { location / { proxy_pass http://a:1; proxy_cache z; proxy_cache_key $cookie_a; } }":               "proxy_cache_key",
		"server { location / { proxy_pass http://a:1; proxy_cache z; proxy_cache_use_stale invalid_header; } }":    "invalid_header",
	} {
		_, problems, err := Convert("http { " + text + " }")
		if err != nil || len(problems) != 1 || !strings.Contains(problems[0].Why, want) {
			t.Errorf("%s: %v, %v", text, problems, err)
		}
	}
	got, problems, err = Convert("http { server { listen 443 ssl; ssl_verify_client on; ssl_client_certificate /ca.pem; ssl_certificate /a; ssl_certificate_key /b; return 200; } }")
	if err != nil || len(problems) > 0 || !strings.Contains(got, "clients: {ca: \"/ca.pem\"}") {
		t.Errorf("%v, %v\n%s", problems, err, got)
	}
}

// An address of both families is one listener, and a demand for TLS 1.3 is kept.
func TestBothFamilies(t *testing.T) {
	got, problems, err := Convert(`http { server { listen 80; listen [::]:80; server_name a; return 204; }
server { listen 443 ssl; listen [::]:443 ssl ipv6only=on; server_name a; ssl_certificate a.pem; ssl_certificate_key a.key; ssl_protocols TLSv1.3; return 204; } }`)
	if err != nil || len(problems) > 0 {
		t.Fatal(problems, err)
	}
	if n := strings.Count(got, "  address: "); n != 2 || strings.Contains(got, "[::]") {
		t.Errorf("%d listeners:\n%s", n, got)
	}
	if !strings.Contains(got, `min_version: "1.3"`) {
		t.Errorf("TLS 1.2 is taken:\n%s", got)
	}
}
