package mesh

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/plan"
)

// TestUnderWayJudgedAgain: a tunnel and an answer without end, of HTTP/1, end with
// the plan that allowed them, before and after they were put down and taken up.
// Those that the next plan allows go on.
func TestUnderWayJudgedAgain(t *testing.T) {
	for _, held := range []bool{false, true} {
		w := newWorld(t)
		web := w.add("web", nil, nil, nil)
		b := w.add("api", httpPort, anyone(), []plan.Rule{{Name: "never", From: []string{"*"}, Headers: []plan.Header{{Name: "x-never"}}}})
		w.apply()
		stop := make(chan struct{})
		srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Upgrade") == "" {
				io.WriteString(rw, "event\n")
				rw.(http.Flusher).Flush()
				<-stop
				return
			}
			rw.Header().Set("Connection", "Upgrade")
			rw.Header().Set("Upgrade", "echo")
			rw.WriteHeader(101)
			c, buf, err := rw.(http.Hijacker).Hijack()
			if err == nil {
				io.Copy(c, buf)
				c.Close()
			}
		})}
		go srv.Serve(b.listen(t, 8080))
		open := func(path, more string) (net.Conn, *bufio.Reader) {
			c := web.mustDial(t, "10.99.0.2:8080")
			t.Cleanup(func() { c.Close() })
			c.SetDeadline(time.Now().Add(30 * time.Second))
			io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: a\r\n"+more+"\r\n")
			r := bufio.NewReader(c)
			for line := ""; line != "\r\n"; {
				var err error
				if line, err = r.ReadString('\n'); err != nil {
					t.Fatalf("%s: %v", path, err)
				}
			}
			return c, r
		}
		const upgrade = "Connection: Upgrade\r\nUpgrade: echo\r\n"
		stays, stayed := open("/stays", upgrade+"X-Role: teller\r\n")
		ended := map[string]*bufio.Reader{}
		_, ended["a tunnel by its path"] = open("/tunnel", upgrade)
		_, ended["a tunnel by a field"] = open("/field", upgrade+"X-Role: guest\r\n")
		_, ended["an answer by its path"] = open("/events", "")
		if held {
			load, err := w.proxy.hold()
			if err == nil {
				err = w.proxy.back(load)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		guest := "guest"
		w.service("api").Deny = []plan.Rule{{Name: "paths", From: []string{"*"}, Paths: []string{"/tunnel", "/events"}},
			{Name: "fields", From: []string{"*"}, Headers: []plan.Header{{Name: "x-role", Exact: &guest}}}}
		w.plan.Generation++
		w.apply()
		for name, r := range ended {
			if b, err := io.ReadAll(r); err == nil && name == "an answer by its path" || err != nil && strings.Contains(err.Error(), "timeout") {
				t.Errorf("held %v: %s: %q, %v", held, name, b, err)
			}
		}
		w.awaitEvent(api.EventAccessDenied, `GET "/tunnel" under way: denied by paths`)
		w.awaitEvent(api.EventAccessDenied, `GET "/field" under way: denied by fields`)
		io.WriteString(stays, "still\n")
		if line, err := stayed.ReadString('\n'); err != nil || line != "still\n" {
			t.Errorf("held %v: one that is allowed: %q, %v", held, line, err)
		}
		close(stop)
		srv.Close()
	}
}

// TestUnderWayTokenExpires: a tunnel stays when its token expires, whatever plans
// come that do not forbid it, and after it was put down and taken up; so does one that
// began when no rule read fields. One that forbids either ends it at once.
func TestUnderWayTokenExpires(t *testing.T) {
	m := newMint(t)
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	all := []string{"*"}
	b := w.add("api", httpPort, []plan.Rule{{Name: "holders", From: all, Token: wants()}}, nil)
	plain := w.add("plain", httpPort, []plan.Rule{{Name: "any", From: all}}, nil)
	i := m.issuer()
	i.Skew = 0
	w.service("api").Issuers = []plan.Issuer{i}
	apply := func() {
		w.plan.Generation++
		w.apply()
	}
	apply()
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			return
		}
		c, buf, err := rw.(http.Hijacker).Hijack()
		if err == nil {
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			io.Copy(c, buf)
			c.Close()
		}
	})}
	defer srv.Close()
	go srv.Serve(b.listen(t, 8080))
	go srv.Serve(plain.listen(t, 8080))
	field := "\r\nAuthorization: " + m.token(t, 5*time.Second, nil)
	type tunnel struct {
		net.Conn
		*bufio.Reader
	}
	var tunnels []tunnel
	for address, more := range map[string]string{"10.99.0.2:8080": field, "10.99.0.3:8080": "\r\nX-Role: teller"} {
		c := web.mustDial(t, address)
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo"+more+"\r\n\r\n")
		r := bufio.NewReader(c)
		if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 101 {
			t.Fatalf("%s: %+v, %v", address, resp, err)
		}
		tunnels = append(tunnels, tunnel{c, r})
	}
	stay := func(when string) {
		t.Helper()
		for _, c := range tunnels {
			io.WriteString(c.Conn, "still\n")
			if line, err := c.ReadString('\n'); err != nil || line != "still\n" {
				t.Fatalf("%s: %q, %v", when, line, err)
			}
		}
	}
	stay("at first")
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c := web.mustDial(t, "10.99.0.2:8080")
		status, _, _, err := request1(t, c, "GET / HTTP/1.1\r\nHost: a"+field+"\r\n\r\n")
		c.Close()
		if err == nil && status == 403 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the token does not expire: %d, %v", status, err)
		}
	}
	apply()
	stay("after a plan that changes nothing")
	load, err := w.proxy.hold()
	if err == nil {
		err = w.proxy.back(load)
	}
	if err != nil {
		t.Fatal(err)
	}
	apply()
	stay("taken up")
	for _, name := range []string{"api", "plain"} {
		w.service(name).Deny = []plan.Rule{{Name: "never", From: all, Headers: []plan.Header{{Name: "x-never"}}}}
	}
	apply()
	stay("after a rule that reads fields")
	for _, name := range []string{"api", "plain"} {
		w.service(name).Deny = []plan.Rule{{Name: "nobody", From: all, Headers: []plan.Header{{Name: "upgrade"}}}}
	}
	apply()
	for _, c := range tunnels {
		if b, err := io.ReadAll(c.Reader); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("forbidden, and goes on: %q, %v", b, err)
		}
	}
}
