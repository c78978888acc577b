package route

import (
	"regexp"
	"strings"
	"testing"

	"hauberk.dev/mesh/http1"
)

// asked is a request for a path, with its fields.
func asked(t testing.TB, method, target string, fields ...string) *Request {
	t.Helper()
	head := method + " " + target + " HTTP/1.1\r\nHost: shop.example.com:8080\r\n"
	for _, f := range fields {
		head += f + "\r\n"
	}
	m := &http1.Message{}
	if err := m.Request([]byte(head + "\r\n")); err != nil {
		t.Fatal(err)
	}
	path, err := http1.AppendPath(nil, m.Method, m.Target, false)
	if err != nil {
		t.Fatal(err)
	}
	_, _, query := http1.SplitTarget(m.Target)
	return &Request{Message: m, Scheme: "https", Remote: []byte("192.0.2.1"), Path: path, Query: query}
}

func TestMatches(t *testing.T) {
	one := "1"
	for _, c := range []struct {
		name  string
		match Match
		r     *Request
		want  bool
	}{
		{"anything", Match{}, asked(t, "GET", "/"), true},
		{"exact", Match{Exact: "/a"}, asked(t, "GET", "/a?x"), true},
		{"exact, below", Match{Exact: "/a"}, asked(t, "GET", "/a/"), false},
		{"prefix itself", Match{Prefix: "/api"}, asked(t, "GET", "/api"), true},
		{"prefix, below", Match{Prefix: "/api"}, asked(t, "GET", "/api/x"), true},
		{"prefix, within a segment", Match{Prefix: "/api"}, asked(t, "GET", "/apix"), false},
		{"prefix of a slash", Match{Prefix: "/"}, asked(t, "GET", "/x"), true},
		{"prefix, encoded", Match{Prefix: "/api"}, asked(t, "GET", "/%61pi/x"), true},
		{"pattern", Match{Pattern: regexp.MustCompile(`^/item/([0-9]+)$`)}, asked(t, "GET", "/item/12"), true},
		{"pattern, not", Match{Pattern: regexp.MustCompile(`^/item/([0-9]+)$`)}, asked(t, "GET", "/item/x"), false},
		{"method", Match{Methods: []string{"POST", "PUT"}}, asked(t, "PUT", "/"), true},
		{"method, not", Match{Methods: []string{"POST"}}, asked(t, "GET", "/"), false},
		{"GET is for HEAD too", Match{Methods: []string{"GET"}}, asked(t, "HEAD", "/"), true},
		{"HEAD is not for GET", Match{Methods: []string{"HEAD"}}, asked(t, "GET", "/"), false},
		{"methods are what they are", Match{Methods: []string{"GET"}}, asked(t, "get", "/"), false},
		{"field", Match{Fields: []Value{{Name: "X-V", Equal: &one}}}, asked(t, "GET", "/", "x-v: 1"), true},
		{"field, other", Match{Fields: []Value{{Name: "X-V", Equal: &one}}}, asked(t, "GET", "/", "x-v: 2"), false},
		{"field, absent", Match{Fields: []Value{{Name: "X-V"}}}, asked(t, "GET", "/"), false},
		{"field, there", Match{Fields: []Value{{Name: "X-V"}}}, asked(t, "GET", "/", "X-V:"), true},
		{"field, pattern", Match{Fields: []Value{{Name: "X-V", Pattern: regexp.MustCompile("^[0-9]$")}}}, asked(t, "GET", "/", "X-V: 7"), true},
		{"query", Match{Query: []Value{{Name: "a b", Equal: &one}}}, asked(t, "GET", "/?x=y&a+b=%31"), true},
		{"query, the first counts", Match{Query: []Value{{Name: "a", Equal: &one}}}, asked(t, "GET", "/?a=2&a=1"), false},
		{"query, absent", Match{Query: []Value{{Name: "a"}}}, asked(t, "GET", "/?b"), false},
		{"query, without a value", Match{Query: []Value{{Name: "a"}}}, asked(t, "GET", "/?a"), true},
		{"query, badly encoded", Match{Query: []Value{{Name: "%zz"}}}, asked(t, "GET", "/?%zz=1"), true},
		{"all of it", Match{Prefix: "/a", Methods: []string{"GET"}, Query: []Value{{Name: "a"}}}, asked(t, "GET", "/a/b"), false},
	} {
		if got := c.match.Matches(c.r); got != c.want {
			t.Errorf("%s: %t, want %t", c.name, got, c.want)
		}
	}
}

func TestFirstRuleDecides(t *testing.T) {
	h := &Host[string]{Rules: []Rule[string]{{Match{Prefix: "/a/b"}, "inner"}, {Match{Prefix: "/a"}, "outer"}}}
	for target, want := range map[string]string{"/a/b/c": "inner", "/a/c": "outer"} {
		if got := h.Find(asked(t, "GET", target)); got == nil || *got != want {
			t.Errorf("%s: %v, want %s", target, got, want)
		}
	}
	if got := h.Find(asked(t, "GET", "/b")); got != nil {
		t.Errorf("/b: %s", *got)
	}
}

func TestHosts(t *testing.T) {
	var table Table[string]
	hosts := map[string]*Host[string]{}
	for _, name := range []string{"example.com", "*.example.com", "*.a.example.com", "a.example.com", "*"} {
		hosts[name] = &Host[string]{}
		if err := table.Add(name, hosts[name]); err != nil {
			t.Fatal(err)
		}
	}
	for field, want := range map[string]string{
		"example.com": "example.com", "EXAMPLE.com:80": "example.com", "example.com.": "example.com", "b.example.com": "*.example.com",
		"a.example.com": "a.example.com", "b.a.example.com": "*.a.example.com", "c.b.a.example.com": "*.a.example.com",
		"notexample.com": "*", "": "*", "[2001:db8::1]:80": "*", strings.Repeat("a.", 200) + "example.com": "*",
	} {
		if got := table.Host([]byte(field)); got != hosts[want] {
			t.Errorf("%q is not under %q", field, want)
		}
	}
	for _, name := range []string{"Example.com", "*.EXAMPLE.com", "*"} {
		if err := table.Add(name, &Host[string]{}); err == nil || !strings.Contains(err.Error(), "is taken") {
			t.Errorf("%q a second time: %v", name, err)
		}
	}
	for _, name := range []string{"", "*.", "a.*", "a b", "a:80", "http://a", "a.", strings.Repeat("a", 254)} {
		if err := CheckName(name); err == nil {
			t.Errorf("%q is taken for a name", name)
		}
	}
}

func TestTemplates(t *testing.T) {
	r := asked(t, "GET", "/api/a%20b%3Fc?q=1")
	if m := (Match{Prefix: "/api"}); !m.Matches(r) {
		t.Fatal("no match")
	}
	item := asked(t, "GET", "/item/12/x")
	if m := (Match{Pattern: regexp.MustCompile(`^/item/([0-9]+)/(y)?`)}); !m.Matches(item) {
		t.Fatal("no match")
	}
	for _, c := range []struct {
		text string
		r    *Request
		want string
	}{
		{"/v2$rest$query", r, "/v2/a%20b%3Fc?q=1"},
		{"${scheme}://$host$uri", r, "https://shop.example.com/api/a%20b%3Fc?q=1"},
		{"$path", r, "/api/a%20b%3Fc"},
		{"$remote costs $$5", r, "192.0.2.1 costs $5"},
		{"/items/$1/$2$3", item, "/items/12/"},
		{"", r, ""},
	} {
		tp, err := ParseTemplate(c.text)
		if err != nil {
			t.Errorf("%q: %v", c.text, err)
			continue
		}
		if got := string(tp.Append(nil, c.r)); got != c.want {
			t.Errorf("%q gives %q, want %q", c.text, got, c.want)
		}
	}
	for _, text := range []string{"$", "$nothing", "${host", "$0", "$HOST"} {
		if _, err := ParseTemplate(text); err == nil {
			t.Errorf("%q is taken for a template", text)
		}
	}
}

// FuzzTemplate: what a client says of itself ends no line and adds no space to
// what is made of it.
func FuzzTemplate(f *testing.F) {
	f.Add("/a%0d%0ab", "q=%20")
	f.Add("/%e4/x%25", "a=b&c")
	f.Fuzz(func(t *testing.T, path, query string) {
		m := &http1.Message{}
		if m.Request([]byte("GET "+path+"?"+query+" HTTP/1.1\r\nHost: a\r\n\r\n")) != nil {
			return
		}
		read, err := http1.AppendPath(nil, m.Method, m.Target, true)
		if err != nil {
			return
		}
		_, _, q := http1.SplitTarget(m.Target)
		r := &Request{Message: m, Scheme: "http", Path: read, Query: q}
		if match := (Match{Pattern: regexp.MustCompile("^/(.*)$")}); !match.Matches(r) {
			return
		}
		for _, text := range []string{"$path", "/$1", "$uri", "$query", "$rest"} {
			tp, err := ParseTemplate(text)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range tp.Append(nil, r) {
				if c <= ' ' || c == 0x7f {
					t.Fatalf("%s of %q gives %q", text, m.Target, tp.Append(nil, r))
				}
			}
		}
	})
}
