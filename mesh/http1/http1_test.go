package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
)

const host = "Host: a\r\n"

func TestRefused(t *testing.T) {
	for name, in := range map[string]string{
		"bare LF":                "GET / HTTP/1.1\nHost: a\n\n",
		"bare LF in a field":     "GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
		"bare CR":                "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
		"leading empty line":     "\r\nGET / HTTP/1.1\r\n" + host + "\r\n",
		"folded":                 "GET / HTTP/1.1\r\n" + host + "X: y\r\n z\r\n\r\n",
		"first field folded":     "GET / HTTP/1.1\r\n X: y\r\n" + host + "\r\n",
		"space before colon":     "POST / HTTP/1.1\r\n" + host + "Content-Length : 5\r\n\r\n",
		"space in name":          "GET / HTTP/1.1\r\n" + host + "X Y: z\r\n\r\n",
		"no colon":               "GET / HTTP/1.1\r\n" + host + "X\r\n\r\n",
		"NUL":                    "GET / HTTP/1.1\r\n" + host + "X: \x00\r\n\r\n",
		"two lengths":            "POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
		"two equal lengths":      "POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\nContent-Length: 5\r\n\r\n",
		"list of lengths":        "POST / HTTP/1.1\r\n" + host + "Content-Length: 5, 5\r\n\r\n",
		"signed length":          "POST / HTTP/1.1\r\n" + host + "Content-Length: +5\r\n\r\n",
		"negative length":        "POST / HTTP/1.1\r\n" + host + "Content-Length: -1\r\n\r\n",
		"empty length":           "POST / HTTP/1.1\r\n" + host + "Content-Length:\r\n\r\n",
		"hex length":             "POST / HTTP/1.1\r\n" + host + "Content-Length: 0x5\r\n\r\n",
		"overflowing length":     "POST / HTTP/1.1\r\n" + host + "Content-Length: 99999999999999999999\r\n\r\n",
		"CL and TE":              "POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
		"TE and CL":              "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
		"TE not chunked":         "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip\r\n\r\n",
		"TE xchunked":            "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n",
		"TE list":                "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip, chunked\r\n\r\n",
		"TE twice":               "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
		"TE with vertical tab":   "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: \x0bchunked\r\n\r\n",
		"TE in 1.0":              "POST / HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n",
		"no host":                "GET / HTTP/1.1\r\n\r\n",
		"two hosts":              "GET / HTTP/1.1\r\n" + host + host + "\r\n",
		"host with a path":       "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
		"version 2":              "PRI * HTTP/2.0\r\n\r\n",
		"version 1.2":            "GET / HTTP/1.2\r\n" + host + "\r\n",
		"version 0.9":            "GET /\r\n\r\n",
		"lower-case version":     "GET / http/1.1\r\n" + host + "\r\n",
		"two spaces":             "GET  / HTTP/1.1\r\n" + host + "\r\n",
		"tab in request line":    "GET\t/ HTTP/1.1\r\n" + host + "\r\n",
		"bad method":             "G(T / HTTP/1.1\r\n" + host + "\r\n",
		"fragment":               "GET /#x HTTP/1.1\r\n" + host + "\r\n",
		"non-ASCII target":       "GET /\xff HTTP/1.1\r\n" + host + "\r\n",
		"too many fields":        "GET / HTTP/1.1\r\n" + host + strings.Repeat("a: b\r\n", MaxFields) + "\r\n",
		"too large":              "GET / HTTP/1.1\r\n" + host + "a: " + strings.Repeat("b", MaxHead) + "\r\n\r\n",
		"endless line":           strings.Repeat("a", MaxHead+1),
		"target too long":        "GET /" + strings.Repeat("a", maxTarget) + " HTTP/1.1\r\n" + host + "\r\n",
		"TLS instead of HTTP":    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
		"colon alone":            "GET / HTTP/1.1\r\n" + host + ": x\r\n\r\n",
		"continuation of target": "GET /a\r\n b HTTP/1.1\r\n" + host + "\r\n",
	} {
		h, err := NewReader(strings.NewReader(in)).Request()
		var syntax *SyntaxError
		if !errors.As(err, &syntax) {
			t.Errorf("%s: %+v, %v", name, h, err)
		}
	}
}

func TestRequest(t *testing.T) {
	for in, want := range map[string]Head{
		"GET /a?b HTTP/1.1\r\nhOsT: x:8080\r\n\r\n":                                                   {Method: "GET", Target: "/a?b", Host: "x:8080", Minor: 1},
		"GET / HTTP/1.0\r\n\r\n":                                                                      {Method: "GET", Target: "/", Close: true},
		"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n":                                            {Method: "GET", Target: "/"},
		"POST / HTTP/1.1\r\n" + host + "Content-Length:   05 \r\n\r\n":                                {Method: "POST", Target: "/", Host: "a", Minor: 1, Framing: Length, Length: 5},
		"POST / HTTP/1.1\r\n" + host + "transfer-encoding: Chunked\r\nConnection: x, CLOSE\r\n\r\n":   {Method: "POST", Target: "/", Host: "a", Minor: 1, Framing: Chunked, Close: true},
		"GET / HTTP/1.1\r\n" + host + "Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\r\n": {Method: "GET", Target: "/", Host: "a", Minor: 1, Upgrade: true},
		"PUT / HTTP/1.1\r\n" + host + "Expect: 100-continue\r\nContent-Length: 1\r\n\r\n":             {Method: "PUT", Target: "/", Host: "a", Minor: 1, Expect: true, Framing: Length, Length: 1},
	} {
		h, err := NewReader(strings.NewReader(in)).Request()
		if err != nil {
			t.Errorf("%q: %v", in, err)
			continue
		}
		if string(h.Raw) != in {
			t.Errorf("%q: passed on as %q", in, h.Raw)
		}
		got := *h
		got.Raw = nil
		if got.Method != want.Method || got.Target != want.Target || got.Host != want.Host || got.Minor != want.Minor || got.Framing != want.Framing ||
			got.Length != want.Length || got.Close != want.Close || got.Upgrade != want.Upgrade || got.Expect != want.Expect {
			t.Errorf("%q:\n got %+v\nwant %+v", in, got, want)
		}
	}
	if _, err := NewReader(strings.NewReader("")).Request(); err != io.EOF {
		t.Errorf("nothing: %v", err)
	}
	if _, err := NewReader(strings.NewReader("GET / HTT")).Request(); err != io.ErrUnexpectedEOF {
		t.Errorf("cut short: %v", err)
	}
}

func TestResponse(t *testing.T) {
	for _, c := range []struct {
		method, in string
		framing    Framing
		close      bool
	}{
		{"GET", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", Length, false},
		{"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", NoBody, false},
		{"GET", "HTTP/1.1 204\r\n\r\n", NoBody, false},
		{"GET", "HTTP/1.1 304 Not Modified\r\n\r\n", NoBody, false},
		{"GET", "HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n", NoBody, true},
		{"GET", "HTTP/1.0 204\r\n\r\n", NoBody, true},
		{"GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", NoBody, false},
		{"GET", "HTTP/1.1 100 Continue\r\n\r\n", NoBody, false},
		{"GET", "HTTP/1.1 200 OK\r\n\r\n", UntilClose, true},
		{"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", Chunked, false},
	} {
		h, err := NewReader(strings.NewReader(c.in)).Response(c.method)
		if err != nil || h.Framing != c.framing || h.Close != c.close {
			t.Errorf("%s %q: %+v, %v", c.method, c.in, h, err)
		}
	}
	for _, in := range []string{"HTTP/1.1 20 OK\r\n\r\n", "HTTP/1.1 099 X\r\n\r\n", "HTTP/2 200 OK\r\n\r\n", "HTTP/1.1 200 \x01\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"} {
		if _, err := NewReader(strings.NewReader(in)).Response("GET"); err == nil {
			t.Errorf("%q accepted", in)
		}
	}
}

func TestPath(t *testing.T) {
	for in, want := range map[string]string{
		"/":               "/",
		"/a/b":            "/a/b",
		"/a/":             "/a/",
		"/a?x=/../b;c%2f": "/a",
		"/%61dmin":        "/admin",
		"/a%20b":          "/a b",
		"http://h/x?y":    "/x",
		"HTTP://h":        "/",
		"http://h?x":      "/",
		"/a/..%00":        "!",
		"/a/../b":         "!",
		"/a/%2e%2e/b":     "!",
		"/a/.":            "!",
		"//a":             "!",
		"/a//b":           "!",
		"/a%2fb":          "!",
		"/a%252fb":        "!",
		"/a%5cb":          "!",
		`/a\b`:            "!",
		"/a;x=1":          "!",
		"/a%":             "!",
		"/a%2":            "!",
		"/a%zz":           "!",
		"a":               "!",
		"h:443":           "!",
		"ftp://x/y":       "!",
		"*":               "!",
	} {
		got, err := Path("GET", in)
		if err != nil {
			got = "!"
		}
		if got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if p, err := Path("OPTIONS", "*"); p != "*" || err != nil {
		t.Error(p, err)
	}
}

func TestChunks(t *testing.T) {
	const head = "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n"
	for in, good := range map[string]bool{
		"0\r\n\r\n":               true,
		"5\r\nhello\r\n0\r\n\r\n": true,
		"5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\n\r\n": true,
		"0\r\nX-Sum: 1\r\n\r\n":                          true,
		"0\r\nContent-Length: 1\r\n\r\n":                 false,
		"0\r\n folded\r\n\r\n":                           false,
		"5\nhello\r\n0\r\n\r\n":                          false,
		"5\r\nhelloo\r\n0\r\n\r\n":                       false,
		"5\r\nhello0\r\n\r\n":                            false,
		"0x5\r\nhello\r\n0\r\n\r\n":                      false,
		"-5\r\nhello\r\n0\r\n\r\n":                       false,
		" 5\r\nhello\r\n0\r\n\r\n":                       false,
		"5 \r\nhello\r\n0\r\n\r\n":                       false,
		"fffffffffffffffff\r\n":                          false,
		"5;\x00\r\nhello\r\n0\r\n\r\n":                   false,
		"5;a\rb\r\nhello\r\n0\r\n\r\n":                   false,
		"\r\n":                                           false,
		"5\r\nhel":                                       false,
	} {
		r := NewReader(strings.NewReader(head + in + "NEXT"))
		h, err := r.Request()
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		err = r.Forward(&out, h)
		if good != (err == nil) {
			t.Errorf("%q: %v", in, err)
		}
		if good {
			if out.String() != head+in {
				t.Errorf("%q: passed on as %q", in, out.String())
			}
			if rest, _ := io.ReadAll(r.R); string(rest) != "NEXT" {
				t.Errorf("%q: left %q", in, rest)
			}
		}
	}
}

// What is passed on must be one request to net/http too, with the same method,
// target and body, and leave the same bytes for the next.
func FuzzHTTP1Head(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	f.Add([]byte("POST /x?y HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\nrest"))
	f.Add([]byte("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"))
	f.Add([]byte("GET http://b/../x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"))
	f.Add([]byte("OPTIONS * HTTP/1.1\r\nHost: a:80\r\nX: \ty \r\n\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := NewReader(bytes.NewReader(in))
		h, err := r.Request()
		if err != nil {
			NewReader(bytes.NewReader(in)).Response("GET")
			return
		}
		if path, err := Path(h.Method, h.Target); err == nil && path != "*" && path[0] != '/' {
			t.Fatalf("path %q of %q", path, h.Target)
		}
		var out bytes.Buffer
		if err := r.Forward(&out, h); err != nil {
			return
		}
		ours, _ := io.ReadAll(r.R)
		theirs := bufio.NewReader(bytes.NewReader(append(out.Bytes(), ours...)))
		req, err := http.ReadRequest(theirs)
		if err != nil {
			return // it refuses more than we do; it then serves nothing
		}
		if req.Method != h.Method || req.RequestURI != h.Target {
			t.Fatalf("read as %s %q here, %s %q by net/http", h.Method, h.Target, req.Method, req.RequestURI)
		}
		if _, err := io.Copy(io.Discard, req.Body); err != nil {
			return
		}
		if rest, _ := io.ReadAll(theirs); !bytes.Equal(rest, ours) {
			t.Fatalf("the next message begins at %q here, at %q by net/http", ours, rest)
		}
	})
}
