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

// smuggling is what has been used to make two readers of a connection see
// different requests, and what must pass beside it. accepted is how many
// requests are let through before the connection is given up, or ends.
var smuggling = []struct {
	name, in string
	accepted int
}{
	{"plain", get1, 1},
	{"two requests", get1 + get1, 2},
	{"CL.TE", post + "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", 0},
	{"TE.CL", post + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\n" + get1, 0},
	{"CL.CL", post + "Content-Length: 0\r\nContent-Length: 30\r\n\r\n" + get1, 0},
	{"CL equal twice", post + "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc" + get1, 0},
	{"CL list", post + "Content-Length: 3, 3\r\n\r\nabc" + get1, 0},
	{"CL plus", post + "Content-Length: +3\r\n\r\nabc" + get1, 0},
	{"CL minus", post + "Content-Length: -3\r\n\r\nabc" + get1, 0},
	{"CL minus zero", post + "Content-Length: -0\r\n\r\n" + get1, 0},
	{"CL hex", post + "Content-Length: 0x3\r\n\r\nabc" + get1, 0},
	{"CL underscore", post + "Content-Length: 1_0\r\n\r\n0123456789" + get1, 0},
	{"CL leading zeros", post + "Content-Length: 0003\r\n\r\nabc" + get1, 2},
	{"CL octal", post + "Content-Length: 010\r\n\r\n0123456789" + get1, 2},
	{"CL inner space", post + "Content-Length: 1 0\r\n\r\n0123456789" + get1, 0},
	{"CL full width digit", post + "Content-Length: \uff13\r\n\r\nabc" + get1, 0},
	{"CL empty", post + "Content-Length:\r\n\r\n" + get1, 0},
	{"CL overflow", post + "Content-Length: 18446744073709551616\r\n\r\n" + get1, 0},
	{"CL trailing semicolon", post + "Content-Length: 3;\r\n\r\nabc" + get1, 0},
	{"CL in a name with space", post + "Content-Length : 30\r\n\r\n" + get1, 0},
	{"CL in a name with tab", post + "Content-Length\t: 30\r\n\r\n" + get1, 0},
	{"CL behind a bare CR", post + "X: y\rContent-Length: 30\r\n\r\n" + get1, 0},
	{"CL behind a bare LF", post + "X: y\nContent-Length: 30\r\n\r\n" + get1, 0},
	{"CL behind a NUL", post + "X: y\x00Content-Length: 30\r\n\r\n" + get1, 0},
	{"CL folded", post + "X: y\r\n Content-Length: 30\r\n\r\n" + get1, 0},
	{"CL value folded", post + "Content-Length:\r\n 30\r\n\r\n" + get1, 0},
	{"CL with underscore", post + "Content_Length: 30\r\n\r\n" + get1, 2},
	{"CL on GET", "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc" + get1, 2},
	{"CL on HEAD", "HEAD / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc" + get1, 2},
	{"TE on GET", "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + get1, 2},
	{"CL cut short", post + "Content-Length: 30\r\n\r\nabc", 0},
	{"TE capital", post + "TRANSFER-ENCODING: CHUNKED\r\n\r\n0\r\n\r\n" + get1, 2},
	{"TE xchunked", post + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE chunked twice", post + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE chunked, identity", post + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE identity, chunked", post + "Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE identity", post + "Transfer-Encoding: identity\r\n\r\n" + get1, 0},
	{"TE lines", post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE empty then chunked", post + "Transfer-Encoding:\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE comma", post + "Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE leading comma", post + "Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE quoted", post + "Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE parameter", post + "Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE tab", post + "Transfer-Encoding:\tchunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE tab after", post + "Transfer-Encoding: chunked\t\r\n\r\n0\r\n\r\n" + get1, 0},
	{"CL tab", post + "Content-Length:\t3\r\n\r\nabc" + get1, 0},
	{"CL tab after", post + "Content-Length: 3\t\r\n\r\nabc" + get1, 0},
	{"host tab", "GET / HTTP/1.1\r\nHost: a\t\r\n\r\n" + get1, 0},
	{"tab elsewhere", post + "X:\ta\tb\t\r\nContent-Length: 3\r\n\r\nabc" + get1, 2},
	{"TE vertical tab", post + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE no-break space", post + "Transfer-Encoding: \u00a0chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE space before colon", post + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE space before name", "POST / HTTP/1.1\r\nHost: a\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE folded", post + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE in the value of another", post + "X: X\r\n\tTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE in HTTP/1.0", "POST / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"TE and CL in HTTP/1.0", "POST / HTTP/1.0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get1, 0},
	{"chunk size plus", chunks + "+3\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk size minus", chunks + "-3\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk size 0x", chunks + "0x3\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk size underscore", chunks + "1_0\r\n0123456789abcdef\r\n0\r\n\r\n" + get1, 0},
	{"chunk size space after", chunks + "3 \r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk size space before", chunks + " 3\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk size overflow", chunks + "10000000000000003\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk size leading zeros", chunks + "00003\r\nabc\r\n000\r\n\r\n" + get1, 2},
	{"chunk size hex letters", chunks + "A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n" + get1, 2},
	{"chunk size empty", chunks + "\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk size NUL", chunks + "3\x00\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk line LF", chunks + "3\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk line CR", chunks + "3\rXabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk data LF", chunks + "3\r\nabc\n0\r\n\r\n" + get1, 0},
	{"chunk data without end", chunks + "3\r\nabc0\r\n\r\n" + get1, 0},
	{"chunk data too long", chunks + "3\r\nabcXX0\r\n\r\n" + get1, 0},
	{"chunk extension", chunks + "3;a=b\r\nabc\r\n0;x\r\n\r\n" + get1, 2},
	{"chunk extension with a bare CR", chunks + "3;a\rb\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk extension with a bare LF", chunks + "3;\n\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk extension quoted line end", chunks + "3;a=\"\r\n\"\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"chunk extension too long", chunks + "3;" + strings.Repeat("a", maxChunkLine) + "\r\nabc\r\n0\r\n\r\n" + get1, 0},
	{"last chunk LF", chunks + "0\n\n" + get1, 0},
	{"last chunk CR LF LF", chunks + "0\r\n\n" + get1, 0},
	{"last chunk without trailer's end", chunks + "0\r\n" + get1, 0},
	{"trailer", chunks + "3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n" + get1, 2},
	{"trailer Content-Length", chunks + "0\r\nContent-Length: 30\r\n\r\n" + get1, 0},
	{"trailer Transfer-Encoding", chunks + "0\r\nTransfer-Encoding: chunked\r\n\r\n" + get1, 0},
	{"trailer Host", chunks + "0\r\nHost: b\r\n\r\n" + get1, 0},
	{"trailer Connection", chunks + "0\r\nConnection: close\r\n\r\n" + get1, 0},
	{"trailer Authorization", chunks + "0\r\nAuthorization: Basic eA==\r\n\r\n" + get1, 0},
	{"trailer Cookie", chunks + "0\r\ncookie: a=b\r\n\r\n" + get1, 0},
	{"trailer folded", chunks + "0\r\nX: y\r\n z\r\n\r\n" + get1, 0},
	{"trailer bare LF", chunks + "0\r\nX: y\n\r\n" + get1, 0},
	{"trailer NUL", chunks + "0\r\nX: \x00\r\n\r\n" + get1, 0},
	{"bare LF", "GET / HTTP/1.1\nHost: a\n\n" + get1, 0},
	{"LF ends the head", "GET / HTTP/1.1\r\nHost: a\r\n\n" + get1, 0},
	{"CR CR LF", "GET / HTTP/1.1\r\nHost: a\r\r\n\r\n" + get1, 0},
	{"CR in the request line", "GET /\r HTTP/1.1\r\nHost: a\r\n\r\n", 0},
	{"empty lines before", "\r\n\r\n" + get1, 0},
	{"LF before", "\n" + get1, 0},
	{"space before", " " + get1, 0},
	{"no colon", post + "X\r\n\r\n" + get1, 0},
	{"empty name", post + ": 3\r\n\r\n" + get1, 0},
	{"NUL in a name", post + "X\x00: y\r\n\r\n" + get1, 0},
	{"NUL in the target", "GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n", 0},
	{"DEL in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: \x7f\r\n\r\n", 0},
	{"high bytes in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: \xff\xfe\r\n\r\n" + get1, 2},
	{"no host", "GET / HTTP/1.1\r\n\r\n" + get1, 0},
	{"two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + get1, 0},
	{"host list", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n" + get1, 0},
	{"host with user", "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n" + get1, 0},
	{"host with two colons", "GET / HTTP/1.1\r\nHost: a::80\r\n\r\n" + get1, 0},
	{"host with a port that is none", "GET / HTTP/1.1\r\nHost: a:b\r\n\r\n" + get1, 0},
	{"host with bytes after the address", "GET / HTTP/1.1\r\nHost: [::1]a\r\n\r\n" + get1, 0},
	{"host a name in brackets", "GET / HTTP/1.1\r\nHost: [face.bad]\r\n\r\n" + get1, 0},
	{"host IPv4 in brackets", "GET / HTTP/1.1\r\nHost: [127.0.0.1]\r\n\r\n" + get1, 0},
	{"host nothing in brackets", "GET / HTTP/1.1\r\nHost: []\r\n\r\n" + get1, 0},
	{"host no address", "GET / HTTP/1.1\r\nHost: [:::]\r\n\r\n" + get1, 0},
	{"host with a zone", "GET / HTTP/1.1\r\nHost: [fe80::1%25eth0]\r\n\r\n" + get1, 0},
	{"host IPv4 in IPv6", "GET / HTTP/1.1\r\nHost: [::ffff:127.0.0.1]\r\n\r\n" + get1, 2},
	{"host of high bytes", "GET / HTTP/1.1\r\nHost: \u00fc\r\n\r\n" + get1, 0},
	{"host quoted", "GET / HTTP/1.1\r\nHost: \"a\"\r\n\r\n" + get1, 0},
	{"host address", "GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n" + get1, 2},
	{"host empty", "GET / HTTP/1.1\r\nHost:\r\n\r\n" + get1, 2},
	{"host with port", "GET / HTTP/1.1\r\nHost: a:80\r\n\r\n" + get1, 2},
	{"absolute-form", "GET http://a/x?y HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 2},
	{"absolute-form of another host", "GET http://b/x HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 0},
	{"absolute-form of no host", "GET http:///x HTTP/1.1\r\nHost:\r\n\r\n" + get1, 0},
	{"absolute-form in capitals", "GET HTTP://A/x HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 2},
	{"absolute-form in HTTP/1.0", "GET http://b/x HTTP/1.0\r\n\r\n", 1},
	{"opaque target", "GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 0},
	{"CONNECT to two", "CONNECT a:443,b:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 0},
	{"absolute-form with user", "GET http://u@b/x HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 0},
	{"absolute-form of another scheme", "GET ftp://b/x HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 0},
	{"authority-form", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 1},
	{"asterisk-form", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 2},
	{"fragment", "GET /#x HTTP/1.1\r\nHost: a\r\n\r\n", 0},
	{"space in the target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 0},
	{"tabs in the request line", "GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n", 0},
	{"space after the version", "GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 0},
	{"HTTP/0.9", "GET /\r\n" + get1, 0},
	{"HTTP/1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n", 0},
	{"HTTP/1.10", "GET / HTTP/1.10\r\nHost: a\r\n\r\n", 0},
	{"HTTP/1.0", "GET / HTTP/1.0\r\n\r\n" + get1, 1},
	{"HTTP/1.0 kept alive", "GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n" + get1, 2},
	{"lower case method", "get / HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 2},
	{"lower case HEAD", "head / HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 0},
	{"mixed case CONNECT", "Connect /x HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 0},
	{"own method", "FROB-NICATE / HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 2},
	{"CONNECT to another host", "CONNECT a:443 HTTP/1.1\r\nHost: b:443\r\n\r\n", 0},
	{"CONNECT to a path", "CONNECT /:443,b:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 0},
	{"CONNECT to everything", "CONNECT * HTTP/1.1\r\nHost: a\r\n\r\n", 0},
	{"CONNECT without a port", "CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", 0},
	{"CONNECT with an empty port", "CONNECT a: HTTP/1.1\r\nHost: a:\r\n\r\n", 0},
	{"CONNECT to port 0", "CONNECT a:0 HTTP/1.1\r\nHost: a:0\r\n\r\n", 0},
	{"CONNECT to port 65536", "CONNECT a:65536 HTTP/1.1\r\nHost: a:65536\r\n\r\n", 0},
	{"CONNECT to an address", "CONNECT [::1] HTTP/1.1\r\nHost: [::1]\r\n\r\n", 0},
	{"CONNECT to an address and port", "CONNECT [::1]:443 HTTP/1.1\r\nHost: [::1]:443\r\n\r\n", 1},
	{"asterisk of GET", "GET * HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 0},
	{"encoded host", "GET http://a%c3%a9/ HTTP/1.1\r\nHost: a%c3%a9\r\n\r\n" + get1, 0},
	{"TRACE", "TRACE / HTTP/1.1\r\nHost: a\r\n\r\n" + get1, 2},
	{"close", "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + get1, 1},
	{"almost close", "GET / HTTP/1.1\r\nHost: a\r\nConnection: xclose\r\n\r\n" + get1, 2},
	{"Expect", post + "Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc" + get1, 2},
	{"Expect of something else", post + "Expect: 200-ok\r\nContent-Length: 3\r\n\r\nabc" + get1, 2},
	{"Expect without a body", "GET / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n" + get1, 2},
	{"Connection names Content-Length", post + "Connection: Content-Length\r\nContent-Length: 3\r\n\r\nabc" + get1, 2},
	{"Connection names Transfer-Encoding", post + "Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get1, 2},
	{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0},
	{"response in place of a request", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 0},
	{"body that is a request", post + "Content-Length: 28\r\n\r\n" + get1 + get1, 2},
	{"chunk that is a request", chunks + "1c\r\n" + get1 + "\r\n0\r\n\r\n" + get1, 2},
}

const (
	get1   = "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n" // 28 bytes
	post   = "POST / HTTP/1.1\r\nHost: a\r\n"
	chunks = post + "Transfer-Encoding: chunked\r\n\r\n"
)

// seen is a request as somebody reads it.
type seen struct{ method, target, host, body string }

// read takes a connection apart as an exchange of the mesh does. Its error is
// io.EOF if the bytes end between two requests.
func read(in []byte) (all []seen, err error) {
	r := NewReader(bytes.NewReader(in))
	for {
		h, err := r.Request()
		if err != nil {
			return all, err
		}
		s := seen{method: h.Method, target: h.Target, host: h.Host}
		if authority, _, _ := SplitTarget([]byte(h.Target)); len(authority) > 0 {
			s.host = string(authority)
		}
		if h.Method == "CONNECT" {
			s.host = h.Target
		}
		framing, length, last := h.Framing, h.Length, h.Close || h.Upgrade && h.Framing == NoBody || h.Method == "CONNECT"
		var framed bytes.Buffer
		out := bufio.NewWriter(&framed)
		if err := r.ForwardBody(out, h); err != nil {
			return all, err
		}
		out.Flush()
		body, rest, err := unframe(framed.Bytes(), framing, length, framed.Len())
		if err != nil || len(rest) > 0 {
			return all, errors.Join(errors.New("a body passed on does not read back"), err)
		}
		s.body = string(body)
		if all = append(all, s); last {
			return all, errLast
		}
	}
}

var errLast = errors.New("nothing more is read")

// sameAsNetHTTP reads the same bytes by net/http: it must see no other request
// than those, up to where it refuses.
func sameAsNetHTTP(t *testing.T, in []byte, all []seen, end error) (agreed int) {
	t.Helper()
	r := bufio.NewReader(bytes.NewReader(in))
	for i, want := range all {
		req, err := http.ReadRequest(r)
		if err != nil {
			return i
		}
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return i
		}
		if got := (seen{req.Method, req.RequestURI, req.Host, string(body)}); got != want {
			t.Fatalf("request %d of %q:\nhere     %q\nnet/http %q", i, in, want, got)
		}
	}
	if req, err := http.ReadRequest(r); err == nil && end == io.EOF {
		t.Fatalf("net/http sees another request in %q: %s %s", in, req.Method, req.RequestURI)
	}
	return len(all)
}

func TestSmuggling(t *testing.T) {
	agreed := 0
	for _, c := range smuggling {
		all, err := read([]byte(c.in))
		if len(all) != c.accepted {
			t.Errorf("%s: %d requests, %v; want %d", c.name, len(all), err, c.accepted)
		}
		var syntax *SyntaxError
		if c.accepted == 0 && !errors.As(err, &syntax) && err != io.ErrUnexpectedEOF {
			t.Errorf("%s: refused by %v", c.name, err)
		}
		agreed += sameAsNetHTTP(t, []byte(c.in), all, err)
	}
	if agreed < 40 {
		t.Errorf("net/http has read %d requests alike: too few to have compared anything", agreed)
	}
}

// FuzzBesideNetHTTP: whatever is let through is the same to net/http, or refused
// by it.
func FuzzBesideNetHTTP(f *testing.F) {
	for _, c := range smuggling {
		f.Add([]byte(c.in))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		all, err := read(in)
		sameAsNetHTTP(t, in, all, err)
	})
}

// responses are what a server may send. accepted counts as in smuggling, interim
// ones too.
var responses = []struct {
	name, method, in string
	accepted         int
}{
	{"length", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc" + ok, 2},
	{"chunked", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + ok, 2},
	{"until the end", "GET", "HTTP/1.1 200 OK\r\n\r\n" + ok, 1},
	{"HEAD with a length", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + ok, 2},
	{"HEAD chunked", "HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + ok, 2},
	{"204 with a length", "GET", "HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n" + ok, 2},
	{"304 with a length", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n" + ok, 2},
	{"interim", "GET", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + ok, 3},
	{"CL and TE", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 0},
	{"two lengths", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 0},
	{"cut short", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nabc", 0},
	{"chunks cut short", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", 0},
	{"bare LF", "GET", "HTTP/1.1 200 OK\nContent-Length: 3\n\nabc", 0},
	{"folded", "GET", "HTTP/1.1 200 OK\r\nX: y\r\n z\r\nContent-Length: 0\r\n\r\n", 0},
	{"space before colon", "GET", "HTTP/1.1 200 OK\r\nContent-Length : 3\r\n\r\nabc", 0},
	{"TE in 1.0", "GET", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 0},
	{"no reason", "GET", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n" + ok, 2},
	{"status 2000", "GET", "HTTP/1.1 2000 OK\r\n\r\n", 0},
	{"trailer", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n\r\n" + ok, 2},
	{"no status line", "GET", "hello\r\n\r\n", 0},
}

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

// answered is a response as somebody reads it.
type answered struct {
	status int
	body   string
}

// readResponses takes what a server sends apart: all answer requests of method.
func readResponses(method string, in []byte) (all []answered, err error) {
	r := NewReader(bytes.NewReader(in))
	for {
		if _, err := r.R.Peek(1); err != nil {
			return all, err
		}
		h, err := r.Response(method)
		if err != nil {
			return all, err
		}
		framing, length, last := h.Framing, h.Length, h.Close && h.Status >= 200 || h.Status == 101
		a := answered{status: h.Status}
		var framed bytes.Buffer
		out := bufio.NewWriter(&framed)
		if err := r.ForwardBody(out, h); err != nil {
			return all, err
		}
		out.Flush()
		body, rest, err := unframe(framed.Bytes(), framing, length, framed.Len())
		if err == io.ErrUnexpectedEOF || err != nil || len(rest) > 0 {
			return all, errors.Join(errors.New("a body passed on does not read back"), err)
		}
		a.body = string(body)
		if all = append(all, a); last {
			return all, errLast
		}
	}
}

func sameResponses(t *testing.T, method string, in []byte, all []answered) (agreed int) {
	t.Helper()
	r := bufio.NewReader(bytes.NewReader(in))
	for i, want := range all {
		resp, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			return i
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return i
		}
		if got := (answered{resp.StatusCode, string(body)}); got != want {
			t.Fatalf("response %d to %s of %q:\nhere     %+v\nnet/http %+v", i, method, in, want, got)
		}
	}
	return len(all)
}

func TestResponsesBesideNetHTTP(t *testing.T) {
	agreed := 0
	for _, c := range responses {
		all, err := readResponses(c.method, []byte(c.in))
		if len(all) != c.accepted {
			t.Errorf("%s: %d responses, %v; want %d", c.name, len(all), err, c.accepted)
		}
		agreed += sameResponses(t, c.method, []byte(c.in), all)
	}
	if agreed < 15 {
		t.Errorf("net/http has read %d responses alike: too few to have compared anything", agreed)
	}
}

// FuzzResponsesBesideNetHTTP: a client that reads as net/http does sees the
// responses that were judged to be there.
func FuzzResponsesBesideNetHTTP(f *testing.F) {
	for _, c := range responses {
		f.Add(c.method == "HEAD", []byte(c.in))
	}
	f.Fuzz(func(t *testing.T, head bool, in []byte) {
		method := "GET"
		if head {
			method = "HEAD"
		}
		all, _ := readResponses(method, in)
		sameResponses(t, method, in, all)
	})
}
