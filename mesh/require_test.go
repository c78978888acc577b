package mesh

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/id"
	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
	"hauberk.dev/plan"
)

// mint signs tokens for tests.
type mint struct {
	key *ecdsa.PrivateKey
	set string
}

func newMint(t testing.TB) mint {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	return mint{key, fmt.Sprintf(`{"keys":[{"kty":"EC","crv":"P-256","kid":"k","x":%q,"y":%q}]}`, b64(point[1:33]), b64(point[33:]))}
}

func (m mint) issuer() plan.Issuer {
	return plan.Issuer{Name: "p https://i", Issuer: "https://i", Audiences: []string{"bank"}, Keys: m.set, Skew: 5}
}

func (m mint) token(t testing.TB, life time.Duration, more jwt.MapClaims) string {
	t.Helper()
	c := jwt.MapClaims{"iss": "https://i", "aud": "bank", "sub": "alice", "exp": time.Now().Add(life).Unix()}
	for k, v := range more {
		c[k] = v
	}
	j := jwt.NewWithClaims(jwt.SigningMethodES256, c)
	j.Header["kid"] = "k"
	s, err := j.SignedString(m.key)
	if err != nil {
		t.Fatal(err)
	}
	return "Bearer " + s
}

func wants(claims ...plan.Claim) *plan.Token {
	return &plan.Token{Issuers: []string{"p https://i"}, Claims: claims}
}

func oneOf(name string, values ...string) plan.Claim { return plan.Claim{Name: name, OneOf: values} }

// is makes a condition out of a name, a function and a literal.
func is(variable, function, literal string) *plan.Expr {
	of := plan.Expr{Op: "var", Name: variable}
	if name, field, ok := strings.Cut(variable, "/"); ok {
		of = plan.Expr{Op: "get", Name: field, Args: []plan.Expr{{Op: "var", Name: name}}}
	}
	return &plan.Expr{Op: "call", Name: function, Args: []plan.Expr{of, {Op: "string", Name: literal}}}
}

// requireWorld is a server of HTTP/1 and HTTP/2 that tokens lead to.
func requireWorld(t *testing.T, allow, deny []plan.Rule, more func(*plan.Service)) (w *world, web *box) {
	w = newWorld(t)
	web = w.add("web", nil, nil, nil)
	b := w.add("api", httpPort, allow, deny)
	more(w.service("api"))
	w.apply()
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "served") })}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(b.listen(t, 8080))
	t.Cleanup(func() { srv.Close() })
	return w, web
}

// TestRequirements judges the same requests over HTTP/1 and HTTP/2 by tokens,
// fields, sources and conditions.
func TestRequirements(t *testing.T) {
	m, other := newMint(t), newMint(t)
	gold := "gold"
	all := []string{"*"}
	w, web := requireWorld(t, []plan.Rule{
		{Name: "token", From: all, Paths: []string{"/token"}, Token: wants(oneOf("role", "teller", "auditor"))},
		{Name: "header", From: all, Paths: []string{"/header"}, Headers: []plan.Header{{Name: "x-tenant", Exact: &gold}, {Name: "x-via", Absent: true}, {Name: "user-agent", Prefix: "t"}}},
		{Name: "near", From: all, Paths: []string{"/near"}, Sources: []netip.Prefix{netip.MustParsePrefix("10.88.0.1/32")}},
		{Name: "far", From: all, Paths: []string{"/far"}, Sources: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}},
		{Name: "when", From: all, Paths: []string{"/when"}, Token: wants(), When: is("jwt/sub", "startsWith", "ali")},
		{Name: "query", From: all, Paths: []string{"/query"}, When: is("request.query", "_==_", "a=1")},
		{Name: "host", From: all, Paths: []string{"/host"}, When: is("request.host", "_==_", "10.99.0.2:8080")},
		{Name: "open", From: all, Paths: []string{"/denied", "/sealed"}},
	}, []plan.Rule{
		{Name: "never", From: all, Paths: []string{"/denied"}, Token: wants(oneOf("role", "guest"))},
		{Name: "unless", From: all, Paths: []string{"/sealed"}, When: is("request.headers/x-tenant", "_!=_", "gold")},
	}, func(s *plan.Service) { s.Issuers = []plan.Issuer{m.issuer()} })

	teller := m.token(t, time.Hour, jwt.MapClaims{"role": "teller"})
	for version, client := range map[string]*http.Client{
		"HTTP/2": web.http2Client(t),
		"HTTP/1": {Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(_ context.Context, network, address string) (net.Conn, error) { return web.dial(network, address) }}},
	} {
		for _, c := range []struct {
			path   string
			header []string
			status int
		}{
			{"/token", []string{"Authorization", teller}, 200},
			{"/token", []string{"Authorization", teller}, 200}, // looked up
			{"/token", []string{"Authorization", m.token(t, time.Hour, jwt.MapClaims{"role": []string{"x", "auditor"}})}, 200},
			{"/token", nil, 403},
			{"/token", []string{"Authorization", m.token(t, time.Hour, jwt.MapClaims{"role": "guest"})}, 403},
			{"/token", []string{"Authorization", m.token(t, time.Hour, nil)}, 403},
			{"/token", []string{"Authorization", m.token(t, -time.Minute, jwt.MapClaims{"role": "teller"})}, 403},
			{"/token", []string{"Authorization", other.token(t, time.Hour, jwt.MapClaims{"role": "teller"})}, 403},
			{"/token", []string{"Authorization", m.token(t, time.Hour, jwt.MapClaims{"role": "teller", "aud": "shop"})}, 403},
			{"/token", []string{"Authorization", teller, "Authorization", teller}, 403},
			{"/token", []string{"Authorization", "Basic " + teller[7:]}, 403},
			{"/token", []string{"X-Authorization", teller}, 403},
			{"/header", []string{"X-Tenant", "gold", "User-Agent", "test"}, 200},
			{"/header", []string{"X-Tenant", "silver", "User-Agent", "test"}, 403},
			{"/header", []string{"X-Tenant", "gold", "User-Agent", "curl"}, 403},
			{"/header", []string{"X-Tenant", "gold", "User-Agent", "test", "X-Via", ""}, 403},
			{"/header", nil, 403},
			{"/near", nil, 200},
			{"/far", nil, 403},
			{"/when", []string{"Authorization", m.token(t, time.Hour, nil)}, 200},
			{"/when", []string{"Authorization", m.token(t, time.Hour, jwt.MapClaims{"sub": "bob"})}, 403},
			{"/when", nil, 403},
			{"/query?a=1", nil, 200},
			{"/query?a=2", nil, 403},
			{"/host", nil, 200},
			{"/denied", []string{"Authorization", teller}, 200},
			{"/denied", []string{"Authorization", m.token(t, time.Hour, jwt.MapClaims{"role": "guest"})}, 403},
			{"/denied", nil, 403}, // nobody knows who asks
			{"/denied", []string{"Authorization", other.token(t, time.Hour, jwt.MapClaims{"role": "teller"})}, 403},
			{"/sealed", []string{"X-Tenant", "gold"}, 200},
			{"/sealed", []string{"X-Tenant", "silver"}, 403},
			{"/sealed", nil, 403}, // the condition cannot be decided
		} {
			req, err := http.NewRequestWithContext(t.Context(), "GET", "http://10.99.0.2:8080"+c.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			for i := 0; i < len(c.header); i += 2 {
				req.Header.Add(c.header[i], c.header[i+1])
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Errorf("%s %s %.60q: %v", version, c.path, c.header, err)
				continue
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != c.status {
				t.Errorf("%s %s %.60q: %d %s; want %d", version, c.path, c.header, resp.StatusCode, body, c.status)
			}
		}
	}
	w.awaitEvent(api.EventAccessDenied, "expired at")
}

// TestAliases: a field that some servers take for another is judged as if they all
// did, where it would make a difference.
func TestAliases(t *testing.T) {
	m := newMint(t)
	all, gold := []string{"*"}, "gold"
	named := func(path string) plan.Rule { return plan.Rule{Name: "any", From: all, Paths: []string{path}} }
	absent, tenant, token, has := named("/absent"), named("/tenant"), named("/token"), named("/never")
	absent.Headers = []plan.Header{{Name: "x-debug", Absent: true}}
	tenant.Headers = []plan.Header{{Name: "x-tenant", Exact: &gold}}
	token.Token = wants()
	has.Headers = []plan.Header{{Name: "x-debug"}}
	said := named("/said")
	said.When = is("request.headers/x-role", "_==_", "root")
	said2, calm := named("/said2"), named("/calm")
	said2.When = is("request.headers/x_role", "_==_", "root")
	calm.When = is("request.headers/x-debug", "_!=_", "1")
	low := named("/low")
	low.Headers = []plan.Header{{Name: "user_id", Exact: &gold}}
	_, web := requireWorld(t, []plan.Rule{absent, tenant, token, low, calm, named("/never"), named("/said"), named("/said2")}, []plan.Rule{has, said, said2}, func(s *plan.Service) {
		i := m.issuer()
		i.Header = "x-token"
		s.Issuers = []plan.Issuer{i}
	})
	good := strings.TrimPrefix(m.token(t, time.Hour, nil), "Bearer ")
	for head, want := range map[string]int{
		"/absent":                                      200,
		"/absent|X_Debug: 1":                           403,
		"/absent|X-Debug: 1":                           403,
		"/never":                                       200,
		"/never|X_Debug: 1":                            403,
		"/never|X_DEBUG_: 1":                           200,
		"/tenant|X-Tenant: gold":                       200,
		"/tenant|X_Tenant: gold":                       403,
		"/tenant|X-Tenant: gold|X_Tenant: gold":        200,
		"/tenant|X-Tenant: gold|X_Tenant: silver":      403,
		"/token|X-Token: " + good:                      200,
		"/token|X_Token: " + good:                      403,
		"/token|X-Token: " + good + "|X_Token: " + "x": 403,
		"/said|X-Role: user":                           200,
		"/said|X-Role: root":                           403,
		"/said|X_Role: root":                           403,
		"/said|X-Role: root|X_Role: x":                 403,
		"/said|X-Role: x|X_Role: root":                 403,
		"/said|X-Role: root|X_Role: root":              403,
		"/said|X-Role: x|X_Role: x":                    200,
		"/said2|X-Role: root":                          403,
		"/said2|X_Role: root":                          403,
		"/said2|X-Role: root|X_Role: x":                403,
		"/said2|X-Role: user":                          200,
		"/calm|X-Debug: 0":                             200,
		"/calm|X_Debug: 0":                             200,
		"/calm|X-Debug: 0|X_Debug: 0":                  200,
		"/calm|X-Debug: 1|X_Debug: 0":                  403,
		"/calm|X-Debug: 0|X_Debug: 1":                  403,
		"/calm|X-Debug: 1":                             403,
		"/low|User_Id: gold":                           200,
		"/low|User-Id: gold":                           403,
	} {
		c := web.mustDial(t, "10.99.0.2:8080")
		path, fields, _ := strings.Cut(head, "|")
		if fields != "" {
			fields = "\r\n" + strings.ReplaceAll(fields, "|", "\r\n")
		}
		if got, _, _, err := request1(t, c, "GET "+path+" HTTP/1.1\r\nHost: x"+fields+"\r\n\r\n"); err != nil || got != want {
			t.Errorf("%.60q: %d, %v; want %d", head, got, err, want)
		}
		c.Close()
	}
}

// TestTwoTokens: a good token hides no other, of an issuer who is heard in another
// field, from a rule that denies.
func TestTwoTokens(t *testing.T) {
	a, b := newMint(t), newMint(t)
	all, both := []string{"*"}, &plan.Token{Issuers: []string{"p https://i", "second"}}
	guest := &plan.Token{Issuers: both.Issuers, Claims: []plan.Claim{oneOf("role", "guest")}}
	_, web := requireWorld(t, []plan.Rule{
		{Name: "any", From: all, Paths: []string{"/deny", "/when"}},
		{Name: "guests", From: all, Paths: []string{"/allow"}, Token: guest},
	}, []plan.Rule{
		{Name: "claim", From: all, Paths: []string{"/deny"}, Token: guest},
		{Name: "when", From: all, Paths: []string{"/when"}, Token: both, When: is("jwt/role", "_==_", "guest")},
	}, func(s *plan.Service) {
		second := b.issuer()
		second.Name, second.Header = "second", "x-token"
		s.Issuers = []plan.Issuer{a.issuer(), second}
	})
	first := func(role string) string {
		return "\r\nAuthorization: " + a.token(t, time.Hour, jwt.MapClaims{"role": role})
	}
	second := func(role string) string {
		return "\r\nX-Token: " + strings.TrimPrefix(b.token(t, time.Hour, jwt.MapClaims{"role": role}), "Bearer ")
	}
	for _, c := range []struct {
		path, tokens string
		want         int
	}{
		{"/deny", first("teller"), 200},
		{"/deny", second("teller"), 200},
		{"/deny", first("teller") + second("teller"), 200},
		{"/deny", first("guest"), 403},
		{"/deny", first("teller") + second("guest"), 403},
		{"/deny", first("guest") + second("teller"), 403},
		{"/when", first("teller"), 200},
		{"/when", first("teller") + second("guest"), 403},
		{"/when", second("guest"), 403},
		{"/allow", first("teller") + second("guest"), 200},
		{"/allow", first("teller") + second("teller"), 403},
	} {
		conn := web.mustDial(t, "10.99.0.2:8080")
		if got, _, _, err := request1(t, conn, "GET "+c.path+" HTTP/1.1\r\nHost: x"+c.tokens+"\r\n\r\n"); err != nil || got != c.want {
			t.Errorf("%s %.60q: %d, %v; want %d", c.path, c.tokens, got, err, c.want)
		}
		conn.Close()
	}
}

// TestHeardAlike: a host, cookies and a field that is there twice are judged
// alike, however they are spelt.
func TestHeardAlike(t *testing.T) {
	all, host, cookie, gold := []string{"*"}, "Secret.test", "a=b; debug=1", "gold"
	_, web := requireWorld(t, []plan.Rule{
		{Name: "open", From: all, Paths: []string{"/h", "/c", "/k", "/e"}},
		{Name: "tenant", From: all, Paths: []string{"/t"}, Headers: []plan.Header{{Name: "x-tenant", Exact: &gold}}},
	}, []plan.Rule{
		{Name: "host", From: all, Paths: []string{"/h"}, Headers: []plan.Header{{Name: "host", Exact: &host}}},
		{Name: "said", From: all, Paths: []string{"/c"}, When: is("request.host", "_==_", "secret.test")},
		{Name: "cookie", From: all, Paths: []string{"/k"}, When: is("request.headers/cookie", "matches", "(^|; )debug=1(;|$)")},
		{Name: "exact", From: all, Paths: []string{"/e"}, Headers: []plan.Header{{Name: "cookie", Exact: &cookie}}},
	}, func(*plan.Service) {})
	for head, want := range map[string]int{
		"GET /h HTTP/1.1\r\nHost: secret.test":                                403,
		"GET /h HTTP/1.1\r\nHost: SECRET.test":                                403,
		"GET /h HTTP/1.1\r\nHost: secret.test:80":                             403,
		"GET /h HTTP/1.1\r\nHost: secret.test:":                               403,
		"GET /h HTTP/1.1\r\nHost: secret.test.":                               403,
		"GET /h HTTP/1.1\r\nHost: Secret.test.:8080":                          403,
		"GET /h HTTP/1.1\r\nHost: secret.test..":                              403,
		"GET http://secret.test.:80/h HTTP/1.0":                               403,
		"GET /h HTTP/1.1\r\nHost: secret.test.open.test:80":                   200,
		"GET http://secret.test/h HTTP/1.0":                                   403,
		"GET http://Secret.test/h HTTP/1.1\r\nHost: secret.test":              403,
		"GET /h HTTP/1.1\r\nHost: open.test":                                  200,
		"GET /c HTTP/1.1\r\nHost: SECRET.test":                                403,
		"GET http://secret.test/c HTTP/1.0":                                   403,
		"GET http://open.test/c HTTP/1.0":                                     200,
		"GET /c HTTP/1.0":                                                     403, // it cannot be told
		"GET /k HTTP/1.1\r\nHost: x\r\nCookie: a=b; debug=1":                  403,
		"GET /k HTTP/1.1\r\nHost: x\r\nCookie: a=b\r\nCookie: debug=1":        403,
		"GET /k HTTP/1.1\r\nHost: x\r\nCookie: a=b":                           200,
		"GET /e HTTP/1.1\r\nHost: x\r\nCookie: a=b\r\nCookie: debug=1":        403,
		"GET /t HTTP/1.1\r\nHost: x\r\nX-Tenant: gold":                        200,
		"GET /t HTTP/1.1\r\nHost: x\r\nX-Tenant: gold\r\nX-Tenant: gold":      200,
		"GET /t HTTP/1.1\r\nHost: x\r\nX-Tenant: gold\r\nX-Tenant: silver":    403,
		"GET /t HTTP/1.1\r\nHost: x\r\nX-Tenant: silver\r\nX-Tenant: gold":    403,
		"GET /h HTTP/1.1\r\nHost: open.test\r\nX-Forwarded-Host: secret.test": 200,
	} {
		c := web.mustDial(t, "10.99.0.2:8080")
		if got, _, _, err := request1(t, c, head+"\r\n\r\n"); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", head, got, err, want)
		}
		c.Close()
	}
	two := web.http2Client(t)
	for _, c := range []struct {
		path, host, header, value string
		status                    int
	}{
		{"/h", "secret.test", "", "", 403}, {"/h", "Secret.TEST", "", "", 403}, {"/h", "secret.test:443", "", "", 403}, {"/h", "secret.test.", "", "", 403}, {"/h", "open.test", "", "", 200}, {"/c", "SECRET.test", "", "", 403},
		{"/k", "x", "Cookie", "a=b; debug=1", 403}, {"/e", "x", "Cookie", "a=b; debug=1", 403}, {"/k", "x", "Cookie", "a=b; c=d", 200},
	} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://10.99.0.2:8080"+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if req.Host = c.host; c.header != "" {
			req.Header.Set(c.header, c.value)
		}
		resp, err := two.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != c.status {
			t.Errorf("HTTP/2 %+v: %d", c, resp.StatusCode)
		}
	}
}

// TestHosts: a port counts where a rule names one, and a last dot never.
func TestHosts(t *testing.T) {
	for _, c := range []struct {
		exact, prefix, host string
		want                bool
	}{
		{"a.test", "", "a.test", true}, {"a.test", "", "a.test:80", true}, {"a.test", "", "a.test.", true}, {"a.test", "", "a.test.:80", true}, {"a.test", "", "a.test:", true},
		{"A.test.", "", "a.test", true}, {"a.test", "", "b.a.test", false}, {"a.test", "", "a.testy", false}, {"a.test", "", "", false},
		{"a.test:80", "", "a.test:80", true}, {"a.test:80", "", "a.test.:080", true}, {"a.test:80", "", "a.test:8080", false}, {"a.test:80", "", "a.test", false},
		{"a.test.:80", "", "a.test:80", true}, {"[::1]", "", "[::1]:80", true}, {"[::1]:80", "", "[::1]:80", true}, {"[::1]:80", "", "[::1]", false}, {"[::1]", "", "[::2]", false},
		{"", "A.", "a.test:80", true}, {"", "a.test", "a.test.:80", true}, {"", "a.test:8", "a.test.:8080", true}, {"", "a.test:8", "a.test:9", false}, {"", "a.test:", "a.test:9", true},
	} {
		h := &plan.Header{Name: "host", Prefix: c.prefix}
		if c.exact != "" {
			h.Exact = &c.exact
		}
		if got := fieldMatches(h, c.host); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

// TestOneGoodValueIsNotEnough: what is good in part is not known to be good, nor
// to be no reason to deny.
func TestOneGoodValueIsNotEnough(t *testing.T) {
	gold := "gold"
	s := &service{}
	for _, h := range []plan.Header{{Name: "x", Exact: &gold}, {Name: "x", Exact: &gold, Absent: true}} {
		for _, values := range [][2]string{{"gold", "lead"}, {"lead", "gold"}} {
			l := letter{two: []http2.Field{{Name: "x", Value: values[0]}, {Name: "x", Value: values[1]}}}
			if holds, known := find(s, call{http: true, letter: l}).holds(&plan.Rule{Headers: []plan.Header{h}}); holds || known {
				t.Errorf("%v of %v: %v, known %v", h, values, holds, known)
			}
		}
	}
}

// TestTrials: what is in audit refuses nothing, is told and counted; what it
// would allow it does not.
func TestTrials(t *testing.T) {
	m := newMint(t)
	all := []string{"*"}
	w, web := requireWorld(t, []plan.Rule{
		{Name: "open", From: all, Paths: []string{"/a", "/b", "/c"}},
		{Name: "trial/allow", From: all, Paths: []string{"/d"}, Audit: true},
	}, []plan.Rule{{Name: "trial/deny", From: all, Paths: []string{"/b"}, Audit: true}}, func(s *plan.Service) {
		s.Issuers = []plan.Issuer{m.issuer()}
		s.Trials = []plan.Trial{{Name: "strict", Allow: []plan.Rule{{Name: "strict/allow[0]", From: all, Paths: []string{"/a", "/b"}}, {Name: "strict/allow[1]", From: all, Token: wants()}}}}
	})
	one := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DialContext: func(_ context.Context, network, address string) (net.Conn, error) { return web.dial(network, address) }}}
	defer one.CloseIdleConnections()
	for _, client := range []*http.Client{one, web.http2Client(t)} {
		for path, want := range map[string]int{"/a": 200, "/b": 200, "/c": 200, "/d": 403} {
			resp, err := client.Get("http://10.99.0.2:8080" + path)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != want {
				t.Errorf("%s: %d %s; want %d", path, resp.StatusCode, body, want)
			}
			if path == "/d" && !strings.Contains(string(body), "trial/allow, which is in audit, would") {
				t.Errorf("%s: %s", path, body)
			}
		}
	}
	if e := w.awaitEvent(api.EventWouldDeny, "trial/deny would refuse it"); e.Peer != spiffe("web") || e.Instance != "api-1" || !strings.Contains(e.Reason, "allowed by open") {
		t.Errorf("%+v", e)
	}
	w.awaitEvent(api.EventWouldDeny, `"/c": allowed by open, and strict/allow would refuse it`)
	s, err := w.link.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n := s.Sandboxes["api-1"].WouldDeny; n != 4 {
		t.Errorf("%d were counted; want 4", n)
	}
	if n := s.Sandboxes["api-1"].Refused; n != 2 {
		t.Errorf("%d were refused; want 2", n)
	}
}

// TestTrialOfPaths: a policy in audit has nothing refused for a path that can be
// read in two ways; it tells that it would refuse it.
func TestTrialOfPaths(t *testing.T) {
	all := []string{"*"}
	w, web := requireWorld(t, []plan.Rule{{Name: "open", From: all}}, []plan.Rule{{Name: "trial/deny", From: all, Methods: []string{"POST"}, Paths: []string{"/a/b"}, Audit: true}}, func(s *plan.Service) {
		s.Trials = []plan.Trial{{Name: "strict", Allow: []plan.Rule{{Name: "strict/allow[0]", From: all, Paths: []string{"/a/b", "/a//b"}}}},
			{Name: "meant", Deny: []plan.Rule{{Name: "meant/deny[0]", From: all, When: is("request.path", "_==_", "/a/b")}}}}
	})
	for _, c := range []struct{ method, tells string }{{"GET", "strict/allow"}, {"POST", "trial/deny"}} {
		status, _, _, err := request1(t, web.mustDial(t, "10.99.0.2:8080"), c.method+" /a//b HTTP/1.1\r\nHost: api\r\nContent-Length: 0\r\n\r\n")
		if status != 200 && status != 301 || err != nil {
			t.Errorf("%s: %d, %v", c.method, status, err)
		}
		w.awaitEvent(api.EventWouldDeny, c.tells+" would refuse it")
	}
	s := w.proxy.directory.Load().services["bank/api"]
	faulty := &service{Service: plan.Service{Name: "f", Namespace: "bank", Allow: anyone(), Trials: []plan.Trial{{Name: "broken", Faulty: true}}}, ports: s.ports, judgement: judgement{trying: true}}
	if v := decide(faulty, call{caller: spiffe("web"), port: 8080}); !v.allowed || v.trial != "broken/allow" {
		t.Errorf("a trial that could allow nothing: %+v", v)
	}
	faulty.Callbacks, faulty.Trials = anyone(), []plan.Trial{{Name: "broken", FaultyCallbacks: true}}
	if v := decide(faulty, call{caller: spiffe("web"), back: true}); !v.allowed || v.trial != "broken/callbacks" {
		t.Errorf("a trial that could allow no callback: %+v", v)
	}
	if v := decide(faulty, call{caller: spiffe("web"), port: 8080}); !v.allowed || v.trial != "" {
		t.Errorf("a trial that says nothing of calls: %+v", v)
	}
	c := call{caller: spiffe("web"), port: 8080, letter: letter{one: &http1.Head{Raw: []byte("GET /a//b HTTP/1.1\r\n\r\n")}}}
	s.Deny, s.Trials = nil, s.Trials[1:]
	if v, status := decideRequest(s, c, &http1.Head{Method: "GET", Target: "/a//b"}); !v.allowed || v.trial != "meant/deny[0]" {
		t.Errorf("a condition on the path: %+v, %d", v, status)
	}
	if stats, err := w.link.Stats(t.Context()); err != nil || stats.Sandboxes["api-1"].WouldDeny != 2 {
		t.Errorf("%+v, %v", stats, err)
	}
}

// TestBoltSource: of a network that is denied nothing reaches the guest, not even
// a frame that is no request.
func TestBoltSource(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("ledger", []plan.Port{{Port: 12200, Protocol: "bolt"}}, anyone(), nil)
	w.apply()
	server := &rpcServer{}
	go server.listen(b.listen(t, 12200), server.bolt)
	c := web.mustDial(t, "10.99.0.2:12200")
	c.SetDeadline(time.Now().Add(time.Minute))
	c.Write(beat(1))
	if _, err := readBolt(c); err != nil {
		t.Fatalf("allowed: %v", err)
	}
	w.service("ledger").Deny = []plan.Rule{{Name: "ledger/far", From: []string{"*"}, Sources: []netip.Prefix{netip.MustParsePrefix("10.88.0.1/32")}}}
	w.plan.Generation++
	w.apply()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection that may ask nothing any more stays")
	}
	seen := len(server.all())
	c = web.mustDial(t, "10.99.0.2:12200")
	c.SetDeadline(time.Now().Add(time.Minute))
	c.Write(slices.Concat(beat(2), boltCall(3, sofaService, "get", true, "x")))
	for { // until what is a request is refused
		f, err := readBolt(c)
		if err != nil || f.ID == 3 {
			break
		}
	}
	if got := server.all()[seen:]; len(got) > 0 {
		t.Errorf("the server has seen %q", got)
	}
}

// TestGRPCToken: a token in the metadata of a call, and a stream that a new plan
// does not allow any more.
func TestGRPCToken(t *testing.T) {
	m := newMint(t)
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	bank := w.add("bank", grpcPort, []plan.Rule{{Name: "teller", From: []string{"*"}, Services: []string{"grpc.testing.TestService"}, Token: wants(oneOf("role", "teller"))}}, nil)
	w.service("bank").Issuers = []plan.Issuer{m.issuer()}
	w.apply()
	bank.serveGRPC(t)
	client := web.grpcClient(t, w.service("bank").Address.String()+":9090")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	as := func(role string) context.Context {
		return metadata.AppendToOutgoingContext(ctx, "authorization", m.token(t, time.Hour, jwt.MapClaims{"role": role}))
	}
	if _, err := client.EmptyCall(as("teller"), &pb.Empty{}); err != nil {
		t.Error(err)
	}
	if _, err := client.EmptyCall(as("guest"), &pb.Empty{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a guest: %v", err)
	}
	if _, err := client.EmptyCall(ctx, &pb.Empty{}); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "no token") {
		t.Errorf("nobody: %v", err)
	}
	stay, err := client.FullDuplexCall(as("teller"))
	if err != nil {
		t.Fatal(err)
	}
	echo := func() error {
		if err := stay.Send(&pb.StreamingOutputCallRequest{}); err != nil && err != io.EOF {
			return err
		}
		_, err := stay.Recv()
		return err
	}
	if err := echo(); err != nil {
		t.Fatal(err)
	}
	w.plan.Generation++
	w.apply() // the same: it may stay
	if err := echo(); err != nil {
		t.Fatal(err)
	}
	w.service("bank").Allow = []plan.Rule{{Name: "auditor", From: []string{"*"}, Token: wants(oneOf("role", "auditor"))}}
	w.plan.Generation++
	w.apply()
	if err := echo(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a stream that is no longer allowed: %v", err)
	}
}

// TestUnreadableProtocols: where there are no fields to read, a rule that asks
// for them does not allow, and denies.
func TestUnreadableProtocols(t *testing.T) {
	m := newMint(t)
	all := []string{"*"}
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	ports := []plan.Port{{Port: 9000, Protocol: "tcp"}, {Port: 9001, Protocol: "bolt"}}
	b := w.add("old", ports, []plan.Rule{{Name: "token", From: all, Token: wants()}, {Name: "meant", From: all, When: is("request.method", "_==_", "GET")}}, nil)
	w.service("old").Issuers = []plan.Issuer{m.issuer()}
	w.apply()
	go serveEcho(b.listen(t, 9000))
	server := &rpcServer{}
	go server.listen(b.listen(t, 9001), server.bolt)
	address := w.service("old").Address.String()
	bolted := func(method string) bolt.Status {
		t.Helper()
		c := web.mustDial(t, address+":9001")
		defer c.Close()
		c.Write(boltCall(7, sofaService, method, false, "x"))
		f, err := readBolt(c)
		if err != nil {
			t.Fatal(err)
		}
		return f.Status
	}
	set := func(allow, deny []plan.Rule) {
		w.service("old").Allow, w.service("old").Deny = allow, deny
		w.plan.Generation++
		w.apply()
	}
	if err := web.call(address+":9000", "x"); !refused(err) {
		t.Errorf("TCP with a token asked for: %v", err)
	}
	if got := bolted("get"); got != bolt.ServerException {
		t.Errorf("bolt with a token asked for: status %d", got)
	}
	set(anyone(), []plan.Rule{{Name: "never", From: all, Headers: []plan.Header{{Name: "x-bad"}}}})
	if err := web.call(address+":9000", "x"); !refused(err) {
		t.Errorf("TCP with a field that denies: %v", err)
	}
	if got := bolted("get"); got != bolt.ServerException {
		t.Errorf("bolt with a field that denies: status %d", got)
	}
	// What can be read is read.
	set([]plan.Rule{{Name: "near", From: all, Sources: []netip.Prefix{netip.MustParsePrefix("10.88.0.0/16")}, When: is("source.identity", "_==_", spiffe("web"))}},
		[]plan.Rule{{Name: "drop", From: all, Ports: []uint16{9001}, When: is("rpc.method", "_==_", "drop")}})
	if err := web.call(address+":9000", "x"); err != nil {
		t.Errorf("TCP by source: %v", err)
	}
	if got := bolted("get"); got != 0 {
		t.Errorf("bolt by method: status %d", got)
	}
	if got := bolted("drop"); got != bolt.ServerException {
		t.Errorf("bolt by method: status %d", got)
	}
}

// TestIssuerPipe: a policy that names a pipe nobody writes to holds up nothing.
func TestIssuerPipe(t *testing.T) {
	i := newMint(t).issuer()
	i.Keys, i.File = "", filepath.Join(t.TempDir(), "keys.json")
	if err := unix.Mkfifo(i.File, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		ready, err := newIssuer(i)
		done <- errors.Join(err, ready.readAgain())
	}()
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "no regular file") {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the plan waits for the pipe")
		if w, err := os.OpenFile(i.File, os.O_WRONLY, 0); err == nil {
			w.Close()
		}
	}
}

// TestIssuerFile reads keys when they appear and when they change, and keeps
// those it has when they do not read.
func TestIssuerFile(t *testing.T) {
	a, b := newMint(t), newMint(t)
	path := filepath.Join(t.TempDir(), "keys.json")
	i := a.issuer()
	i.Keys, i.File = "", path
	ready, err := newIssuer(i)
	if err != nil {
		t.Fatal(err)
	}
	s := &service{Service: plan.Service{Name: "s", Namespace: "bank"}}
	s.issuers = map[string]*issuer{i.Name: ready}
	r := plan.Rule{Token: wants()}
	holds := func(m mint) bool {
		h := &http1.Head{Raw: []byte("GET / HTTP/1.1\r\nAuthorization: " + m.token(t, time.Hour, nil) + "\r\n\r\n")}
		ok, known := find(s, call{http: true, letter: letter{one: h}}).holds(&r)
		return ok && known
	}
	if holds(a) {
		t.Error("taken before there were keys")
	}
	write := func(set string, at time.Time) {
		t.Helper()
		if err := os.WriteFile(path, []byte(set), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now().Add(-time.Hour)
	write(a.set, begin)
	if err := ready.readAgain(); err != nil || !holds(a) || holds(b) {
		t.Errorf("the first keys: %v, %v, %v", err, holds(a), holds(b))
	}
	write("nonsense", begin.Add(time.Minute))
	if err := ready.readAgain(); err == nil || !holds(a) {
		t.Errorf("a file that does not read: %v, %v", err, holds(a))
	}
	write(b.set, begin.Add(2*time.Minute))
	if err := ready.readAgain(); err != nil || holds(a) || !holds(b) {
		t.Errorf("other keys: %v, %v, %v", err, holds(a), holds(b))
	}
	// Keys that hold until a moment, as those that are fetched do: after it no token
	// is good, one that was looked at before neither.
	until := func(at time.Time) string {
		return strings.Replace(b.set, "{", fmt.Sprintf(`{"hauberk_until": %d, `, at.Unix()), 1)
	}
	write(until(time.Now().Add(time.Hour)), begin.Add(3*time.Minute))
	if err := ready.readAgain(); err != nil || !holds(b) {
		t.Errorf("keys that hold: %v, %v", err, holds(b))
	}
	text := strings.TrimPrefix(b.token(t, 3*time.Hour, nil), "Bearer ")
	if _, err := ready.now.Load().verify(text, time.Now()); err != nil {
		t.Error(err)
	}
	if _, err := ready.now.Load().verify(text, time.Now().Add(2*time.Hour)); err == nil || !strings.Contains(err.Error(), "nobody has confirmed them") {
		t.Errorf("after their time: %v", err)
	}
	write(until(time.Now().Add(-time.Hour)), begin.Add(4*time.Minute))
	if err := ready.readAgain(); err != nil || holds(b) {
		t.Errorf("keys that do not hold any more: %v, %v", err, holds(b))
	}
}

// TestPlainRulesAllocateNothing: who asks for nothing of this pays nothing.
func TestPlainRulesAllocateNothing(t *testing.T) {
	d, err := newDirectory(plan.Mesh{Generation: 1, TrustDomain: domain, Services: []plan.Service{{Name: "s", Namespace: "bank", Identity: spiffe("s"), Ports: httpPort,
		Allow: []plan.Rule{{Name: "a", From: []string{"*"}, Methods: []string{"GET"}, Paths: []string{"/x*"}}}, Deny: []plan.Rule{{Name: "d", From: []string{"*"}, Paths: []string{"/y"}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	s := d.services["bank/s"]
	c := call{caller: spiffe("web"), port: 8080, http: true, method: "GET", path: "/x/1", letter: letter{two: []http2.Field{}}}
	if n := testing.AllocsPerRun(100, func() {
		if !decide(s, c).allowed || !mayCall(s, call{caller: c.caller, port: 8080}) {
			t.Fatal("not allowed")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestPlanWithFaultyConditions: a plan with what cannot be made ready is refused
// and named.
func TestPlanWithFaultyConditions(t *testing.T) {
	m := newMint(t)
	for want, change := range map[string]func(*plan.Service){
		`issuer "other" is not one of the service`: func(s *plan.Service) { s.Allow = []plan.Rule{{Token: &plan.Token{Issuers: []string{"other"}}}} },
		"no issuer is named":                       func(s *plan.Service) { s.Deny = []plan.Rule{{Token: &plan.Token{}}} },
		`call "rm" of 1 parts`: func(s *plan.Service) {
			s.Allow = []plan.Rule{{When: &plan.Expr{Op: "call", Name: "rm", Args: []plan.Expr{{Op: "null"}}}}}
		},
		"header \"X-A\"": func(s *plan.Service) {
			s.Trials = []plan.Trial{{Allow: []plan.Rule{{Headers: []plan.Header{{Name: "X-A"}}}}}}
		},
		"either keys or a file": func(s *plan.Service) { s.Issuers[0].Keys = "" },
		"an audience":           func(s *plan.Service) { s.Issuers[0].Audiences = nil },
		"a secret":              func(s *plan.Service) { s.Issuers[0].Keys = `{"keys":[{"kty":"oct","k":"AA"}]}` },
		"skew":                  func(s *plan.Service) { s.Issuers[0].Skew = 601 },
	} {
		s := plan.Service{Name: "s", Namespace: "bank", Identity: spiffe("s"), Ports: httpPort, Issuers: []plan.Issuer{m.issuer()}}
		change(&s)
		if _, err := newDirectory(plan.Mesh{Generation: 1, TrustDomain: domain, Services: []plan.Service{s}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want it to speak of %s", err, want)
		}
	}
}

// TestSourceIsProved: a peer with an identity of its own cannot say that it calls
// from where others are. What cannot be told does not allow, and denies.
func TestSourceIsProved(t *testing.T) {
	near := []netip.Prefix{netip.MustParsePrefix("10.88.0.0/16")}
	w := newWorld(t)
	web := w.add("web", tcpPort, nil, nil) // has an endpoint, so that the plan knows its address
	b := w.add("b", tcpPort, []plan.Rule{{Name: "near", From: []string{"*"}, Sources: near}}, nil)
	w.apply()
	go serveEcho(b.listen(t, 9000))
	me, other := w.ca.credential(t, spiffe("web"), time.Hour), w.ca.credential(t, spiffe("other"), time.Hour)
	ask := func(as *id.Credential, forwarded string) int {
		t.Helper()
		cc, err := w.peer(t, b, as, true)
		if err != nil {
			t.Fatal(err)
		}
		authority := b.Address.String() + ":9000"
		head := http.Header{}
		if forwarded != "" {
			head.Set("forwarded", `for="`+forwarded+`"`)
		}
		resp, err := cc.RoundTrip(&http.Request{Method: "CONNECT", Host: authority, URL: &url.URL{Host: authority}, Header: head, Body: io.NopCloser(strings.NewReader(""))})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	its := web.Address.String() + ":4711"
	for _, c := range []struct {
		as        *id.Credential
		forwarded string
		status    int
	}{{&me, its, 200}, {&other, its, 401}, {&me, "10.88.0.99:1", 401}, {&me, "", 401}, {&other, "", 401}} {
		if got := ask(c.as, c.forwarded); got != c.status {
			t.Errorf("forwarded %q: %d; want %d", c.forwarded, got, c.status)
		}
	}
	w.service("b").Allow, w.service("b").Deny = anyone(), []plan.Rule{{Name: "far", From: []string{"*"}, Sources: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}}
	w.plan.Generation++
	w.apply()
	for _, c := range []struct {
		as        *id.Credential
		forwarded string
		status    int
	}{{&me, its, 200}, {&me, "", 200}, {&other, its, 401}, {&me, "10.88.0.99:1", 401}} {
		if got := ask(c.as, c.forwarded); got != c.status {
			t.Errorf("a rule that denies, forwarded %q: %d; want %d", c.forwarded, got, c.status)
		}
	}
}
