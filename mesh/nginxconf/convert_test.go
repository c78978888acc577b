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
    location /c { proxy_pass http://u; proxy_cache zone; }
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
