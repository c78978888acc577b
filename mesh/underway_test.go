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
