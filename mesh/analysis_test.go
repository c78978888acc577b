package mesh

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/plan"
)

// watched is a world with a service of HTTP whose requests are looked at.
func watched(t *testing.T, i plan.Inspect) (w *world, web *box, served *atomic.Int64) {
	t.Helper()
	w = newWorld(t)
	web = w.add("web", nil, nil, nil)
	b := w.add("api", httpPort, anyone(), nil)
	w.service("api").Inspect = &i
	w.apply()
	served = &atomic.Int64{}
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		served.Add(1)
		if strings.HasPrefix(r.URL.Path, "/none") {
			rw.WriteHeader(404)
		}
		if r.URL.Path == "/all" {
			rw.Write(make([]byte, 32<<20))
		}
		io.WriteString(rw, "well")
	})}
	go srv.Serve(b.listen(t, 8080))
	t.Cleanup(func() { srv.Close() })
	return w, web, served
}

// request1 sends the pieces one by one, and reads the answer.
func request1(t *testing.T, c net.Conn, pieces ...string) (status int, retry string, r refusal, err error) {
	t.Helper()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	for i, p := range pieces {
		if i > 0 {
			time.Sleep(20 * time.Millisecond) // to arrive apart, mostly
		}
		if _, err := io.WriteString(c, p); err != nil {
			return 0, "", r, err
		}
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, "", r, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if resp.StatusCode != 200 {
		json.Unmarshal(b, &r)
	}
	return resp.StatusCode, resp.Header.Get("Retry-After"), r, err
}

const sqlQuery = "/items?id=1%20union%20select%201,2%20from%20users"

func get(target string) string { return "GET " + target + " HTTP/1.1\r\nHost: api\r\n\r\n" }

func post(body string) (head, rest string) {
	return fmt.Sprintf("POST /items HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", len(body)), body
}

func TestInspectObserves(t *testing.T) {
	w, web, served := watched(t, plan.Inspect{Observe: 20})
	c := web.mustDial(t, "10.99.0.2:8080")
	if status, _, _, err := request1(t, c, get(sqlQuery)); status != 200 || err != nil {
		t.Fatalf("an attack that is only observed: %d, %v", status, err)
	}
	ev := w.awaitEvent(api.EventFinding, "sql")
	if ev.Instance != "api-1" || ev.Peer != spiffe("web") || !strings.Contains(ev.Reason, "score 40: sql 40 (") || !strings.Contains(ev.Reason, "union select") {
		t.Errorf("event %+v", ev)
	}
	if status, _, _, err := request1(t, c, get("/items/7?q=the+union")); status != 200 || err != nil {
		t.Errorf("an ordinary request: %d, %v", status, err)
	}
	stats, err := w.link.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if a := stats.Analysis["bank/api"]; a.Requests != 2 || a.Found["sql"] != 1 || a.Done["observe"] != 1 || served.Load() != 2 {
		t.Errorf("analysis %+v, %d served", a, served.Load())
	}
}

// An attack is refused wherever in the bytes it stands, and never reaches the
// server whole.
func TestInspectSheds(t *testing.T) {
	head, body := post(`{"id":"x' or '1'='1"}`)
	chunked := "POST /items HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
	for name, c := range map[string]struct {
		pieces []string
		late   bool // the head has passed: no answer can be given any more
	}{
		"target":       {pieces: []string{get(sqlQuery)}},
		"header":       {pieces: []string{"GET / HTTP/1.1\r\nHost: api\r\nUser-Agent: ${jndi:ldap://x/a}\r\n\r\n"}},
		"body":         {pieces: []string{head + body}},
		"body later":   {pieces: []string{head, body}},
		"body split":   {pieces: []string{head + body[:9], body[9:]}},
		"chunk":        {pieces: []string{chunked + "15\r\n" + body + "\r\n0\r\n\r\n"}},
		"chunks":       {pieces: []string{chunked + "a\r\n" + body[:10] + "\r\nb\r\n" + body[10:] + "\r\n0\r\n\r\n"}},
		"chunk later":  {pieces: []string{chunked, "15\r\n" + body + "\r\n0\r\n\r\n"}, late: true},
		"chunks later": {pieces: []string{chunked, "a\r\n" + body[:10] + "\r\n", "b\r", "\n" + body[10:] + "\r\n0\r", "\n\r\n"}, late: true},
	} {
		t.Run(name, func(t *testing.T) {
			w, web, served := watched(t, plan.Inspect{Shed: 25, RetryAfter: plan.Duration(time.Minute)})
			status, retry, r, err := request1(t, web.mustDial(t, "10.99.0.2:8080"), c.pieces...)
			if served.Load() != 0 {
				t.Error("the attack has reached the server")
			}
			ev := w.awaitEvent(api.EventFinding, "shed at score")
			// The server's connection is broken off, if the pieces did come apart.
			if c.late && err == nil && status != 502 && status != 503 {
				t.Errorf("answered with %d", status)
			}
			if !c.late && (err != nil || status != 503 || retry == "" || r.Hint == "" || r.Rule != ev.Rule) {
				t.Errorf("answered with %d, Retry-After %q, %+v, %v", status, retry, r, err)
			}
			// Who was shed stays away, for the time it was told.
			if status, retry, _, err := request1(t, web.mustDial(t, "10.99.0.2:8080"), get("/")); status != 503 || retry == "" || err != nil {
				t.Errorf("asking again: %d, Retry-After %q, %v", status, retry, err)
			}
		})
	}
}

func TestInspectIncident(t *testing.T) {
	w, web, served := watched(t, plan.Inspect{Observe: 10, Incident: 60})
	idle := web.mustDial(t, "10.99.0.2:8080")
	if status, _, _, err := request1(t, idle, get("/")); status != 200 || err != nil {
		t.Fatalf("%d, %v", status, err)
	}
	c := web.mustDial(t, "10.99.0.2:8080")
	if status, _, _, err := request1(t, c, get(sqlQuery)); status != 200 || err != nil { // 40
		t.Fatalf("below the score: %d, %v", status, err)
	}
	request1(t, c, get("/ping?host=x;cat+/etc/hosts")) // 50 more
	ev := w.awaitEvent(api.EventIncident, "shell")
	if ev.Offender != "web-1" || ev.Instance != "api-1" || !strings.Contains(ev.Reason, "shell 50") || !strings.Contains(ev.Reason, "sql") {
		t.Errorf("event %+v", ev)
	}
	if n := served.Load(); n != 2 {
		t.Errorf("%d requests have reached the server", n)
	}
	if _, err := idle.Read(make([]byte, 1)); err == nil {
		t.Error("another connection of the caller was not cut")
	}
}

func TestInspectScan(t *testing.T) {
	w, web, _ := watched(t, plan.Inspect{Observe: 30})
	c := web.mustDial(t, "10.99.0.2:8080")
	for i := range 60 {
		if status, _, _, err := request1(t, c, get(fmt.Sprintf("/none/%d", i))); status != 404 || err != nil {
			t.Fatalf("%d, %v", status, err)
		}
	}
	w.awaitEvent(api.EventFinding, "scan")
}

// A challenge closes the link under the caller's connections: the next is made
// with a new handshake.
func TestInspectChallenge(t *testing.T) {
	w, web, _ := watched(t, plan.Inspect{Challenge: 30, RetryAfter: plan.Duration(time.Millisecond)})
	links := func() (n int, first *entry) {
		for _, e := range w.proxy.registry.all() {
			if e.kind == kindLink && e.instance == "api-1" {
				n, first = n+1, e
			}
		}
		return n, first
	}
	c := web.mustDial(t, "10.99.0.2:8080")
	if status, _, _, err := request1(t, c, get(sqlQuery)); status != 503 || err != nil {
		t.Fatalf("%d, %v", status, err)
	}
	_, before := links()
	if before == nil {
		t.Fatal("no link")
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		status, _, _, err := request1(t, web.mustDial(t, "10.99.0.2:8080"), get("/"))
		if _, now := links(); err == nil && status == 200 && now != nil && now != before {
			break // it has come over a link that was made since
		}
		if time.Now().After(deadline) {
			t.Fatalf("no new handshake was made: %d, %v", status, err)
		}
	}
}

func TestInspectPlanIsChecked(t *testing.T) {
	for _, i := range []plan.Inspect{
		{Observe: -1}, {Shed: maxScore + 1}, {Shed: 50, Cut: 40}, {Learn: -1}, {Body: 1 << 20}, {Body: -2}, {RetryAfter: plan.Duration(2 * time.Hour)},
	} {
		s := plan.Service{Name: "a", Namespace: "b", Identity: spiffe("a"), Inspect: &i}
		if _, err := newDirectory(plan.Mesh{TrustDomain: domain, Services: []plan.Service{s}}); err == nil {
			t.Errorf("%+v was taken", i)
		}
	}
}
