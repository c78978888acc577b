package http1

import (
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
)

// pieces of heads and bodies in which readers have been found to differ. What
// mutation of bytes finds in days, their combinations show at once.
var pieces = struct{ methods, targets, versions, hosts, fields, bodies []string }{
	methods:  []string{"GET", "POST", "HEAD", "OPTIONS", "CONNECT", "TRACE", "PRI", "get", "M-SEARCH", "CONNECt"},
	targets:  []string{"/", "*", "a", "a:443", "a:", "a:0", "a:99999", "/a:443", "//a/b", "///", "/?http://b/", "?", "?x", "/:443,b:443", "http://a", "http://a/", "HTTP://a/x", "https://a:443/", "http://a:/", "http://a?x", "http://a/?x", "http://u@a/", "http://a:b@c/", "http://a%41/", "http://a%c3%a9/", "http://[::1]/", "http://[::1%25e]/", "http://[::1]:80", "[::1]:443", "http:a", "http:/a", "http://", "ftp://a/", "a://b", "/%2f", "/%", "/a%zz", "/a;b", "/a//b", "/..", "\\", "/\\", "/a|b", "/\"", "/<>", "/{}", "/^`", "*a", "**", "http://*/", "http://a.:80/", "http://A/", "http://a,b/", "http://a;b/", "http://!$&'()*+;=/", "http://-._~/", "http://127.1/", "http://0x7f.1/", "http://[::ffff:1.2.3.4]/", "http://[v1.a]/", "http://a:080/", "HTTP://A:1/#", "/#x", "http://a\\b/"},
	versions: []string{"HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "http/1.1", "HTTP/1.1 ", "HTTP/01.1"},
	hosts:    []string{"Host: a\r\n", "Host: a:443\r\n", "host:a\r\n", "Host:\r\n", "", "Host: A\r\n", "Host: a:\r\n", "Host: a:80\r\n", "Host: [::1]\r\n", "Host: [::1]:443\r\n", "Host: b\r\n", "Host: a%41\r\n", "Host: a%c3%a9\r\n", "Host: a \r\n", "Host: a.\r\n", "Host: a:080\r\n", "Host: *\r\n", "Host: a/b\r\n", "Host: a,b\r\n", "Host: 127.1\r\n", "Host: !$&'()*+;=\r\n", "Host: [::1%25e]\r\n", "Host: /:443,b:443\r\n", "Host: http://a\r\n"},
	fields: []string{"", "Content-Length: 3\r\n", "Content-Length: 03\r\n", "Content-Length: 0\r\n", "Content-Length: 3, 3\r\n", "Content-Length: 3\r\nContent-Length: 3\r\n", "Content-Length: 3 \r\n", "Content-Length:\t3\r\n",
		"Transfer-Encoding: chunked\r\n", "Transfer-Encoding: Chunked\r\n", "Transfer-Encoding: chunked \r\n", "Transfer-Encoding: gzip, chunked\r\n", "Transfer-Encoding: chunked, gzip\r\n", "Transfer-Encoding: identity\r\n", "Transfer-Encoding:\r\n", "TE: trailers\r\n",
		"Connection: close\r\n", "Connection: keep-alive\r\n", "Connection: close, keep-alive\r\n", "Connection: Upgrade\r\nUpgrade: websocket\r\n", "Connection: upgrade\r\n", "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAAA\r\n", "Connection: Transfer-Encoding\r\n", "Connection: Host\r\n", "Connection: \r\n", "Proxy-Connection: close\r\n", "Keep-Alive: timeout=1\r\n",
		"Expect: 100-continue\r\n", "Expect: 100-Continue\r\n", "Expect: x\r\n", "Trailer: X\r\n", "Trailer: Content-Length\r\n", "Pragma: no-cache\r\n", "Content-Type: a\r\n", "X: \xff\r\n", "X:\r\n", "X_Y: 1\r\n", "Content-Encoding: gzip\r\n"},
	bodies: []string{"", "abc", "0\r\n\r\n", "3\r\nabc\r\n0\r\n\r\n", "3;x=\"y\"\r\nabc\r\n0\r\n\r\n", "3 ;x\r\nabc\r\n0\r\n\r\n", "3\r\nabc\r\n0\r\nX: y\r\n\r\n", "03\r\nabc\r\n00\r\n\r\n", "3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", "3\r\nabc\r\n0;\r\n\r\n", "3\r\nabc\r\n0\r\nX : y\r\n\r\n", "3\r\nabc\r\n0\r\n:\r\n\r\n", "3\r\nabc\r\n0\r\nX\r\n\r\n", "3;\x00\r\nabc\r\n0\r\n\r\n", "3;\xff\r\nabc\r\n0\r\n\r\n", "3\t\r\nabc\r\n0\r\n\r\n"},
}

func pick(r *rand.Rand, of []string) string { return of[r.IntN(len(of))] }

// combination is one to three requests made of pieces.
func combination(r *rand.Rand) []byte {
	var b strings.Builder
	for range 1 + r.IntN(3) {
		b.WriteString(pick(r, pieces.methods) + " " + pick(r, pieces.targets) + " " + pick(r, pieces.versions) + "\r\n" + pick(r, pieces.hosts))
		for range r.IntN(3) {
			b.WriteString(pick(r, pieces.fields))
		}
		b.WriteString("\r\n" + pick(r, pieces.bodies))
	}
	return []byte(b.String())
}

// combinations is how many are tried: HAUBERK_TEST_COMBINATIONS, or as many as
// that.
func combinations(t *testing.T, otherwise int) int {
	text := os.Getenv("HAUBERK_TEST_COMBINATIONS")
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("HAUBERK_TEST_COMBINATIONS %q is not a number", text)
	}
	return n
}

// TestCombinations: whatever is let through is the same to net/http and to nginx,
// or refused by them. The same combinations each time.
func TestCombinations(t *testing.T) {
	r, agreed := rand.New(rand.NewPCG(9112, 9110)), 0
	for range combinations(t, 200_000) {
		in := combination(r)
		all, end := read(in)
		agreed += sameAsNetHTTP(t, in, all, end)
	}
	if agreed < 1000 {
		t.Errorf("net/http has read %d requests alike: too few to have compared anything", agreed)
	}
}

func TestCombinationsBesideNginx(t *testing.T) {
	n := startNginx(t)
	r, agreed := rand.New(rand.NewPCG(9112, 9110)), 0
	for range combinations(t, 100_000) {
		in := combination(r)
		if all, end := read(in); len(all) > 0 {
			agreed += n.same(t, in, all, end)
		}
	}
	if agreed < 500 {
		t.Errorf("nginx has read %d requests alike: too few to have compared anything", agreed)
	}
}

var responsePieces = struct{ lines, fields, bodies []string }{
	lines:  []string{"HTTP/1.1 200 OK\r\n", "HTTP/1.1 200\r\n", "HTTP/1.1 200 \r\n", "HTTP/1.0 200 OK\r\n", "HTTP/1.1 204 No Content\r\n", "HTTP/1.1 304 Not Modified\r\n", "HTTP/1.1 100 Continue\r\n", "HTTP/1.1 101 Switching Protocols\r\n", "HTTP/1.1 103 Early Hints\r\n", "HTTP/1.1 199 x\r\n", "HTTP/1.1 999 x\r\n", "HTTP/1.1 099 x\r\n", "HTTP/1.1 205 Reset\r\n", "HTTP/1.1 206 Partial\r\n", "HTTP/1.1 200OK\r\n", "HTTP/1.1  200 OK\r\n", "HTTP/1.2 200 OK\r\n", "HTTP/2.0 200 OK\r\n", "HTTP/1.1 200 \xff\r\n", "HTTP/1.1 2000 OK\r\n", "HTTP/1.1 +20 OK\r\n"},
	fields: append([]string{"", "", "Content-Length: 2\r\n", "Content-Length: 6\r\n", "Connection: Upgrade\r\nUpgrade: x\r\n", "Content-Range: bytes 0-1/2\r\n", "Content-Length: +2\r\n", "Content-Length:\r\n"}, pieces.fields...),
	bodies: append([]string{"ok", "okok", "HTTP/1.1 200 OK\r\n\r\n"}, pieces.bodies...),
}

// TestResponseCombinations: what is passed on of a server's bytes is the same to
// net/http, or refused by it.
func TestResponseCombinations(t *testing.T) {
	r, agreed := rand.New(rand.NewPCG(9112, 9110)), 0
	for range combinations(t, 200_000) {
		var b strings.Builder
		for range 1 + r.IntN(3) {
			b.WriteString(pick(r, responsePieces.lines))
			for range r.IntN(3) {
				b.WriteString(pick(r, responsePieces.fields))
			}
			b.WriteString("\r\n" + pick(r, responsePieces.bodies))
		}
		method := pick(r, []string{"GET", "HEAD"})
		all, _ := readResponses(method, []byte(b.String()))
		agreed += sameResponses(t, method, []byte(b.String()), all)
	}
	if agreed < 1000 {
		t.Errorf("net/http has read %d responses alike: too few to have compared anything", agreed)
	}
}
