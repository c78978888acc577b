package mesh

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/inspect"
	"hauberk.dev/plan"
)

// TestMirror: an analyser gets all that callers send, whatever its pieces, and
// who sends it; one that does not read delays nobody, and what it misses is
// counted.
func TestMirror(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	w, web, _ := watched(t, plan.Inspect{Mirror: "unix:" + path})
	analyser, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer analyser.Close()
	analyser.SetDeadline(time.Now().Add(30 * time.Second))
	// Greeted, the analyser gets what comes from now on; accepted, it may not yet.
	stream := make([]byte, len(inspect.MirrorMagic))
	if _, err := io.ReadFull(analyser, stream); err != nil {
		t.Fatal(err)
	}
	c := web.mustDial(t, "10.99.0.2:8080")
	head, body := post(`{"a":"` + strings.Repeat("x", 10_000) + `"}`)
	if status, _, _, err := request1(t, c, head, body); status != 200 || err != nil {
		t.Fatalf("%d, %v", status, err)
	}
	c.Close()
	var got []byte
	var opened mirrorOpening
	for ended, buf := false, make([]byte, 4096); !ended; {
		n, err := analyser.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, got)
		}
		stream = append(stream, buf[:n]...)
		if len(got) == 0 && opened.Service == "" {
			if len(stream) < len(inspect.MirrorMagic) {
				continue
			}
			if rest, ok := bytes.CutPrefix(stream, []byte(inspect.MirrorMagic)); ok {
				stream = rest
			}
		}
		for {
			f, size, err := inspect.NextMirror(stream)
			if err != nil {
				t.Fatal(err)
			}
			if size == 0 {
				break
			}
			switch f.Kind {
			case inspect.MirrorOpen:
				if err := json.Unmarshal(f.Payload, &opened); err != nil {
					t.Fatal(err)
				}
			case inspect.MirrorData:
				got = append(got, f.Payload...)
			case inspect.MirrorEnd:
				ended = true
			}
			stream = stream[size:]
		}
	}
	if string(got) != head+body {
		t.Errorf("the analyser has %d bytes, of %d that were sent", len(got), len(head+body))
	}
	if opened.Service != "api.bank" || opened.Caller != spiffe("web") || opened.Instance != "web-1" || opened.Port != 8080 || opened.Protocol != "http" {
		t.Errorf("opened %+v", opened)
	}

	// From here on the analyser reads nothing: 32 MiB do not fit anywhere.
	c = web.mustDial(t, "10.99.0.2:8080")
	large := strings.Repeat("y", 1<<20)
	for range 32 {
		if status, _, _, err := request1(t, c, fmt.Sprintf("POST / HTTP/1.1\r\nHost: api\r\nContent-Length: %d\r\n\r\n%s", len(large), large)); status != 200 || err != nil {
			t.Fatalf("with an analyser that does not read: %d, %v", status, err)
		}
	}
	stats, err := w.link.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if a := stats.Analysis["bank/api"]; a.MirrorMissed < 16<<20 || a.Mirrored < uint64(len(got)) {
		t.Errorf("%d bytes copied, %d missed", a.Mirrored, a.MirrorMissed)
	}
	w.service("api").Inspect.Mirror = ""
	w.plan.Generation++
	w.apply()
	if _, err := io.Copy(io.Discard, analyser); err != nil {
		t.Errorf("the mirror is not ended with the plan: %v", err)
	}
	w.service("api").Inspect.Mirror = "udp:1.2.3.4:5"
	w.plan.Generation++
	if err := w.link.SetPlan(t.Context(), w.plan); err == nil {
		t.Error("a mirror that is none was taken")
	}
}

// TestInspectHijack: who speaks from the address of an instance under another
// name is not that instance.
func TestInspectHijack(t *testing.T) {
	w, web, _ := watched(t, plan.Inspect{Observe: 10, Cut: 60})
	w.add("evil", nil, nil, nil)
	w.plan.Generation++
	w.apply()
	if status, _, _, err := request1(t, web.mustDial(t, "10.99.0.2:8080"), get("/")); status != 200 || err != nil {
		t.Fatalf("%d, %v", status, err)
	}
	if resp, err := w.claim(t, "10.88.0.1:4711", io.NopCloser(strings.NewReader(get("/")))); err == nil {
		io.ReadAll(resp.Body) // until it is cut
		resp.Body.Close()
	}
	ev := w.awaitEvent(api.EventFinding, "hijack")
	if ev.Peer != spiffe("evil") || !strings.Contains(ev.Reason, "10.88.0.1") {
		t.Errorf("event %+v", ev)
	}
}

// claim calls the api as evil, saying that it speaks for an address.
func (w *world) claim(t *testing.T, address string, body io.ReadCloser) (*http.Response, error) {
	t.Helper()
	evil := w.ca.credential(t, spiffe("evil"), time.Hour)
	cc, err := w.peer(t, w.boxes["api-1"], &evil, true)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequest("CONNECT", "https://gateway", body)
	if err != nil {
		t.Fatal(err)
	}
	r.Host = "10.88.0.2:8080"
	r.Header.Set("Forwarded", `for="`+address+`"`)
	return cc.RoundTrip(r)
}

// TestInspectHijackFirst: somebody else who claims an instance's address before
// it calls, and stays, makes nothing of it.
func TestInspectHijackFirst(t *testing.T) {
	w, web, _ := watched(t, plan.Inspect{Observe: 10, Shed: 90, Incident: 100})
	w.add("evil", nil, nil, nil)
	w.plan.Generation++
	w.apply()
	body, more := io.Pipe()
	defer more.Close()
	resp, err := w.claim(t, "10.88.0.1:4711", body)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.WriteString(more, get("/")); err != nil {
		t.Fatal(err)
	}
	if ev := w.awaitEvent(api.EventFinding, "hijack"); ev.Peer != spiffe("evil") {
		t.Errorf("event %+v", ev)
	}
	for range 3 {
		if status, _, _, err := request1(t, web.mustDial(t, "10.99.0.2:8080"), get("/")); status != 200 || err != nil {
			t.Errorf("whose address it is: %d, %v", status, err)
		}
	}
	w.link.Ping(t.Context())
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, ev := range w.events {
		if ev.Kind == api.EventIncident || ev.Peer == spiffe("web") {
			t.Errorf("event %+v", ev)
		}
	}
}

// TestInspectDenied: a caller that is refused again and again, for different
// things, scans; and so does a workload that dials everywhere.
func TestInspectDenied(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("api", httpPort, []plan.Rule{{Name: "api/read", From: []string{spiffe("web")}, Paths: []string{"/open*"}}}, nil)
	w.service("api").Inspect = &plan.Inspect{Observe: 30}
	w.service("web").Inspect = &plan.Inspect{Observe: 30, Incident: 40}
	w.apply()
	var served atomic.Int64
	srv := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served.Add(1) })}
	go srv.Serve(b.listen(t, 8080))
	defer srv.Close()
	c := web.mustDial(t, "10.99.0.2:8080")
	for i := range 60 {
		if status, _, _, err := request1(t, c, get(fmt.Sprintf("/admin/%d", i))); status != 403 || err != nil {
			t.Fatalf("%d, %v", status, err)
		}
	}
	if ev := w.awaitEvent(api.EventFinding, "scan"); ev.Instance != "api-1" || ev.Peer != spiffe("web") {
		t.Errorf("event %+v", ev)
	}
	for i := range 60 {
		if c, err := web.dial("tcp4", fmt.Sprintf("192.0.2.%d:443", i)); err == nil {
			c.Close()
		}
	}
	if ev := w.awaitEvent(api.EventIncident, "spread"); ev.Offender != "web-1" || ev.Instance != "web-1" {
		t.Errorf("event %+v", ev)
	}
	if served.Load() != 0 {
		t.Error("what is refused was served")
	}
}
