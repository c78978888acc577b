package cache

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"hauberk.dev/mesh/http1"
)

var t0 = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

func at(seconds int) time.Time { return t0.Add(time.Duration(seconds) * time.Second) }

func httpDate(seconds int) string { return at(seconds).Format(http.TimeFormat) }

func request(t testing.TB, method string, fields ...string) *http1.Message {
	t.Helper()
	var m http1.Message
	head := method + " /a HTTP/1.1\r\nHost: h\r\n" + strings.Join(append(fields, ""), "\r\n") + "\r\n"
	if err := m.Request([]byte(head)); err != nil {
		t.Fatalf("%q: %v", head, err)
	}
	return &m
}

func response(t testing.TB, status int, fields ...string) *http1.Message {
	t.Helper()
	var m http1.Message
	head := fmt.Sprintf("HTTP/1.1 %d x\r\n", status) + strings.Join(append(fields, ""), "\r\n") + "\r\n"
	if err := m.Response([]byte(head), []byte("GET")); err != nil {
		t.Fatalf("%q: %v", head, err)
	}
	return &m
}

// TestStorable goes through RFC 9111, section 3.
func TestStorable(t *testing.T) {
	fresh := []string{"Cache-Control: max-age=60"}
	for _, c := range []struct {
		section string
		method  string
		asked   []string
		status  int
		said    []string
		want    bool
	}{
		{"3: max-age", "GET", nil, 200, fresh, true},
		{"3: Expires", "GET", nil, 200, []string{"Expires: " + httpDate(60)}, true},
		{"3: s-maxage", "GET", nil, 200, []string{"Cache-Control: s-maxage=1"}, true},
		{"3: public", "GET", nil, 200, []string{"Cache-Control: public"}, true},
		{"3: nothing said", "GET", nil, 200, nil, false},
		{"3: a tag", "GET", nil, 200, []string{"ETag: \"a\""}, true},
		{"3: only GET", "POST", nil, 200, fresh, false},
		{"3: only GET", "HEAD", nil, 200, fresh, false},
		{"3: a status that needs a word, and has one", "GET", nil, 302, fresh, true},
		{"3: and has none", "GET", nil, 302, []string{"Last-Modified: " + httpDate(-1000)}, false},
		{"3.4: a part", "GET", nil, 206, append(fresh, "Content-Range: bytes 0-1/5"), false},
		{"3: not modified", "GET", nil, 304, fresh, false},
		{"3.5: authorization", "GET", []string{"Authorization: Basic x"}, 200, fresh, false},
		{"3.5: and public", "GET", []string{"Authorization: Basic x"}, 200, []string{"Cache-Control: public, max-age=60"}, true},
		{"3.5: and must-revalidate", "GET", []string{"Authorization: Basic x"}, 200, []string{"Cache-Control: must-revalidate, max-age=60"}, true},
		{"3.5: and s-maxage", "GET", []string{"Authorization: Basic x"}, 200, []string{"Cache-Control: s-maxage=60"}, true},
		{"4.1: Vary: *", "GET", nil, 200, append(fresh, "Vary: accept, *"), false},
		{"4.2.2: heuristic", "GET", nil, 200, []string{"Last-Modified: " + httpDate(-1000), "Date: " + httpDate(0)}, true},
		{"4.2.2: heuristic of 404", "GET", nil, 404, []string{"Last-Modified: " + httpDate(-1000), "Date: " + httpDate(0)}, true},
		{"5.2.1.5: no-store asked", "GET", []string{"Cache-Control: no-store"}, 200, fresh, false},
		{"5.2.2.5: no-store", "GET", nil, 200, []string{"Cache-Control: max-age=60, no-store"}, false},
		{"5.2.2.5: no-store in another field", "GET", nil, 200, append(fresh, "cache-control: NO-STORE"), false},
		{"5.2.2.4: no-cache is stored", "GET", nil, 200, []string{"Cache-Control: no-cache, max-age=60"}, true},
		{"5.2.2.7: private", "GET", nil, 200, []string{"Cache-Control: private, max-age=60"}, false},
		{"5.2.2.7: private for a field", "GET", nil, 200, []string{`Cache-Control: private="a, b", max-age=60`}, false},
		{"7.3: cookies", "GET", nil, 200, append(fresh, "Set-Cookie: a=b"), false},
	} {
		if got := Storable(t0, request(t, c.method, c.asked...), response(t, c.status, c.said...), Rules{}); got != c.want {
			t.Errorf("%s: %s %v, %d %v: %v", c.section, c.method, c.asked, c.status, c.said, got)
		}
	}
	if !Storable(t0, request(t, "GET"), response(t, 200), Rules{Valid: time.Minute}) {
		t.Error("an answer that the route calls fresh is not stored")
	}
}

// TestUse goes through RFC 9111, sections 4.2 and 5.2.1, and RFC 5861.
func TestUse(t *testing.T) {
	for _, c := range []struct {
		section string
		said    []string
		asked   []string
		after   int // seconds since it came
		want    Use
	}{
		{"4.2: fresh", []string{"Cache-Control: max-age=60"}, nil, 59, Fresh},
		{"4.2: stale", []string{"Cache-Control: max-age=60"}, nil, 60, Revalidate},
		{"4.2.1: s-maxage first", []string{"Cache-Control: max-age=10, s-maxage=60"}, nil, 59, Fresh},
		{"4.2.1: max-age before Expires", []string{"Cache-Control: max-age=10", "Expires: " + httpDate(60)}, nil, 11, Revalidate},
		{"4.2.1: Expires", []string{"Date: " + httpDate(0), "Expires: " + httpDate(60)}, nil, 59, Fresh},
		{"4.2.1: Expires that is past", []string{"Date: " + httpDate(0), "Expires: " + httpDate(-1)}, nil, 0, Revalidate},
		{"5.3: Expires that is no date", []string{"Expires: 0", "Last-Modified: " + httpDate(-99999)}, nil, 0, Revalidate},
		{"4.2.1: twice is the shorter", []string{"Cache-Control: max-age=60, max-age=10"}, nil, 11, Revalidate},
		{"1.2.2: no number", []string{"Cache-Control: max-age=1x"}, nil, 1, Revalidate},
		{"1.2.2: more than can be counted", []string{"Cache-Control: max-age=99999999999999999999"}, nil, 9999, Fresh},
		{"4.2.2: a tenth", []string{"Date: " + httpDate(0), "Last-Modified: " + httpDate(-1000)}, nil, 99, Fresh},
		{"4.2.2: and no more", []string{"Date: " + httpDate(0), "Last-Modified: " + httpDate(-1000)}, nil, 101, Revalidate},
		{"4.2.3: Age said", []string{"Cache-Control: max-age=60", "Age: 50"}, nil, 11, Revalidate},
		{"4.2.3: Date in the past", []string{"Cache-Control: max-age=60", "Date: " + httpDate(-50)}, nil, 11, Revalidate},
		{"5.2.1.1: max-age asked", []string{"Cache-Control: max-age=60"}, []string{"Cache-Control: max-age=5"}, 6, Revalidate},
		{"5.2.1.2: max-stale", []string{"Cache-Control: max-age=60"}, []string{"Cache-Control: max-stale=5"}, 64, Fresh},
		{"5.2.1.2: and no more", []string{"Cache-Control: max-age=60"}, []string{"Cache-Control: max-stale=5"}, 66, Revalidate},
		{"5.2.1.2: any", []string{"Cache-Control: max-age=60"}, []string{"Cache-Control: max-stale"}, 9999, Fresh},
		{"5.2.1.3: min-fresh", []string{"Cache-Control: max-age=60"}, []string{"Cache-Control: min-fresh=10"}, 51, Revalidate},
		{"5.2.1.4: no-cache asked", []string{"Cache-Control: max-age=60"}, []string{"Cache-Control: no-cache"}, 1, Revalidate},
		{"5.4: Pragma", []string{"Cache-Control: max-age=60"}, []string{"Pragma: no-cache"}, 1, Revalidate},
		{"5.4: Pragma beside Cache-Control", []string{"Cache-Control: max-age=60"}, []string{"Pragma: no-cache", "Cache-Control: max-age=30"}, 1, Fresh},
		{"5.2.1.5: no-store asked", []string{"Cache-Control: max-age=60"}, []string{"Cache-Control: no-store"}, 1, Bypass},
		{"5.2.2.2: must-revalidate", []string{"Cache-Control: max-age=60, must-revalidate"}, []string{"Cache-Control: max-stale"}, 61, Revalidate},
		{"5.2.2.8: proxy-revalidate", []string{"Cache-Control: max-age=60, proxy-revalidate"}, []string{"Cache-Control: max-stale"}, 61, Revalidate},
		{"5.2.2.10: s-maxage means proxy-revalidate", []string{"Cache-Control: s-maxage=60"}, []string{"Cache-Control: max-stale"}, 61, Revalidate},
		{"5.2.2.4: no-cache", []string{"Cache-Control: max-age=60, no-cache"}, nil, 1, Revalidate},
		{"5.2.2.4: no-cache for a field", []string{`Cache-Control: max-age=60, no-cache="x-a"`}, nil, 1, Revalidate},
		{"5861, 3: stale while revalidating", []string{"Cache-Control: max-age=60, stale-while-revalidate=30"}, nil, 89, Background},
		{"5861, 3: and no more", []string{"Cache-Control: max-age=60, stale-while-revalidate=30"}, nil, 91, Revalidate},
		{"5861, 3: but must-revalidate", []string{"Cache-Control: max-age=60, stale-while-revalidate=30, must-revalidate"}, nil, 61, Revalidate},
		{"5.2.1.7: only-if-cached, fresh", []string{"Cache-Control: max-age=60"}, []string{"Cache-Control: only-if-cached"}, 1, Fresh},
		{"5.2.1.7: only-if-cached, stale", []string{"Cache-Control: max-age=60"}, []string{"Cache-Control: only-if-cached"}, 61, Forbidden},
		{"14.2 of 9110: a part", []string{"Cache-Control: max-age=60"}, []string{"Range: bytes=0-1"}, 1, Bypass},
	} {
		s := New(1 << 20)
		s.Put([]byte("k"), request(t, "GET"), response(t, 200, c.said...), []byte("body"), t0, t0, Rules{})
		if _, got := s.Look(at(c.after), []byte("k"), request(t, "GET", c.asked...)); got != c.want {
			t.Errorf("%s: %v, %v after %d s: %d, want %d", c.section, c.said, c.asked, c.after, got, c.want)
		}
	}
}

func TestAge(t *testing.T) {
	s := New(1 << 20)
	// RFC 9111, section 4.2.3: the time that the answer took counts as well.
	e := s.Put([]byte("k"), request(t, "GET"), response(t, 200, "Age: 10", "Date: "+httpDate(0), "Cache-Control: max-age=60"), nil, at(0), at(3), Rules{})
	if got := e.Age(at(8)); got != 18*time.Second {
		t.Errorf("%v", got)
	}
	if got := e.TTL(at(8)); got != 42*time.Second {
		t.Errorf("%v", got)
	}
	if strings.Contains(string(e.Head), "Age") {
		t.Errorf("an old age is stored: %q", e.Head)
	}
}

// TestVary goes through RFC 9111, section 4.1.
func TestVary(t *testing.T) {
	s := New(1 << 20)
	put := func(language, body string) {
		s.Put([]byte("k"), request(t, "GET", "Accept-Language: "+language), response(t, 200, "Cache-Control: max-age=60", "Vary: accept-language"), []byte(body), t0, t0, Rules{})
	}
	put("de", "Hallo")
	put("en, fr", "hello")
	for asked, want := range map[string]string{"Accept-Language: de": "Hallo", "Accept-Language: en,fr": "hello", "Accept-Language: fr": "", "X: y": ""} {
		e, use := s.Look(t0, []byte("k"), request(t, "GET", asked))
		if want == "" != (use == Miss) || e != nil && string(e.Body) != want {
			t.Errorf("%s: %d %v", asked, use, e)
		}
	}
	for i := range 3 * maxVariants {
		put(fmt.Sprint("x", i), "x")
	}
	if n := s.Counts().Entries; n != maxVariants {
		t.Errorf("%d variants", n)
	}
	put("x40", "again")
	put("x40", "again")
	if n := s.Counts().Entries; n != maxVariants {
		t.Errorf("%d variants after the same twice", n)
	}
}

// TestRenew goes through RFC 9111, section 4.3.4 and 3.2.
func TestRenew(t *testing.T) {
	s := New(1 << 20)
	req := request(t, "GET")
	old := s.Put([]byte("k"), req, response(t, 200, "Cache-Control: max-age=10", `ETag: "a"`, "Content-Type: text/plain", "X-Old: 1", "X-Both: old", "Age: 5"), []byte("body"), t0, t0, Rules{})
	if _, use := s.Look(at(20), []byte("k"), req); use != Revalidate {
		t.Fatalf("use %d", use)
	}
	s.Renew(old, req, response(t, 304, "Cache-Control: max-age=100", `ETag: "a"`, "X-Both: new", "Content-Type: text/html", "X-New: 1", "Set-Cookie: of=one"), at(20), at(20), Rules{})
	e, use := s.Look(at(100), []byte("k"), req)
	if use != Fresh || string(e.Body) != "body" {
		t.Fatalf("use %d of %v", use, e)
	}
	head := string(e.Head)
	for _, want := range []string{"X-Old: 1", "X-Both: new", "X-New: 1", "Content-Type: text/plain", "max-age=100", "HTTP/1.1 200", "Content-Length: 4"} {
		if !strings.Contains(head, want) {
			t.Errorf("%s is not in %q", want, head)
		}
	}
	for _, wrong := range []string{"X-Both: old", "max-age=10\r", "text/html", "Age: 5", "Set-Cookie"} {
		if strings.Contains(head, wrong) {
			t.Errorf("%s is in %q", wrong, head)
		}
	}
	if c := s.Counts(); c.Entries != 1 {
		t.Errorf("%+v", c)
	}
}

// What varies by a field that the server never saw is not stored.
func TestTold(t *testing.T) {
	s, req := New(1<<20), request(t, "GET")
	r := Rules{Told: func(name string) bool { return name != "x-who" }}
	if !Storable(t0, req, response(t, 200, "Cache-Control: max-age=10", "Vary: Accept"), r) || Storable(t0, req, response(t, 200, "Cache-Control: max-age=10", "Vary: Accept, X-Who"), r) {
		t.Error("stored by a field that is not told, or not by one that is")
	}
	old := s.Put([]byte("k"), req, response(t, 200, "Cache-Control: max-age=10", `ETag: "a"`), []byte("body"), t0, t0, r)
	for _, vary := range []string{"X-Who", "*"} {
		s.Renew(old, req, response(t, 304, "Cache-Control: max-age=100", "Vary: "+vary), at(20), at(20), r)
		if _, use := s.Look(at(21), []byte("k"), req); use != Miss {
			t.Errorf("%s: use %d of what a 304 says to vary so", vary, use)
		}
	}
}

func TestNotModified(t *testing.T) {
	s := New(1 << 20)
	e := s.Put([]byte("k"), request(t, "GET"), response(t, 200, "Cache-Control: max-age=10", `ETag: W/"a,b"`, "Last-Modified: "+httpDate(-100)), nil, t0, t0, Rules{})
	for asked, want := range map[string]bool{
		`If-None-Match: "a,b"`: true, `If-None-Match: "x", W/"a,b"`: true, `If-None-Match: *`: true, `If-None-Match: "b"`: false,
		"If-Modified-Since: " + httpDate(-100): true, "If-Modified-Since: " + httpDate(-99): true, "If-Modified-Since: " + httpDate(-101): false,
		"X: y": false,
	} {
		if got := e.NotModified(request(t, "GET", asked)); got != want {
			t.Errorf("%s: %v", asked, got)
		}
	}
	// RFC 9110, section 13.2.2: the tag decides where both are asked.
	if e.NotModified(request(t, "GET", `If-None-Match: "z"`, "If-Modified-Since: "+httpDate(0))) {
		t.Error("the date overrules the tag")
	}
}

// What was asked for before a change is not stored after it, and nobody waits for it.
func TestInvalidateUnderWay(t *testing.T) {
	for name, change := range map[string]func(s *Store){
		"invalidate": func(s *Store) { s.Invalidate(at(10), []byte("k")) },
		"purge":      func(s *Store) { s.Purge(at(10), func(key string) bool { return key == "k" }) },
	} {
		s, req, resp := New(1<<20), request(t, "GET"), response(t, 200, "Cache-Control: max-age=600", `ETag: "a"`)
		key := []byte("k")
		old := s.Put(key, req, resp, []byte("old"), at(1), at(1), Rules{})
		f, lead := s.Lead(key)
		change(s)
		s.Put(key, req, resp, []byte("old"), at(9), at(11), Rules{})
		if _, use := s.Look(at(12), key, req); use != Miss {
			t.Errorf("%s: stored what was asked for before: %d", name, use)
		}
		s.Renew(old, req, response(t, 304), at(10), at(11), Rules{})
		if _, use := s.Look(at(12), key, req); use != Miss {
			t.Errorf("%s: renewed by what was asked for before: %d", name, use)
		}
		g, anew := s.Lead(key)
		if f.Land(); !lead || !anew || f == g {
			t.Errorf("%s: a request waits for one from before", name)
		}
		if _, lead := s.Lead(key); lead {
			t.Errorf("%s: the end of the one before has ended the other", name)
		}
		s.Put(key, req, resp, []byte("new"), at(11), at(11), Rules{})
		if e, use := s.Look(at(12), key, req); use != Fresh || string(e.Body) != "new" {
			t.Errorf("%s: what was asked for after is not stored: %d", name, use)
		}
	}
}

// A HEAD renews nothing: it is not asked meanwhile.
func TestHeadStale(t *testing.T) {
	s := New(1 << 20)
	s.Put([]byte("k"), request(t, "GET"), response(t, 200, "Cache-Control: max-age=1, stale-while-revalidate=60"), nil, t0, t0, Rules{})
	for method, want := range map[string]Use{"GET": Background, "HEAD": Fresh} {
		if _, use := s.Look(at(10), []byte("k"), request(t, method)); use != want {
			t.Errorf("%s: %d", method, use)
		}
	}
}

func TestForError(t *testing.T) {
	s := New(1 << 20)
	for said, want := range map[string]bool{"max-age=10, stale-if-error=20": true, "max-age=10": false, "max-age=10, stale-if-error=20, must-revalidate": false} {
		e := s.Put([]byte("k"), request(t, "GET"), response(t, 200, "Cache-Control: "+said), nil, t0, t0, Rules{})
		if got := e.ForError(at(25)); got != want {
			t.Errorf("%s: %v", said, got)
		}
		if e.ForError(at(31)) {
			t.Errorf("%s: after its time", said)
		}
	}
}

// TestBound fills the store: what was used longest ago goes.
func TestBound(t *testing.T) {
	s := New(100 << 10)
	body := make([]byte, 9<<10)
	asked := t0
	put := func(i int) {
		s.Put(fmt.Append(nil, i), request(t, "GET"), response(t, 200, "Cache-Control: max-age=60"), body, asked, asked, Rules{})
	}
	for i := range 100 {
		put(i)
		s.Look(t0, []byte("0"), request(t, "GET")) // is used all the time
		if c := s.Counts(); c.Bytes > 100<<10 || c.Bytes < 0 {
			t.Fatalf("%+v", c)
		}
	}
	for key, want := range map[string]Use{"0": Fresh, "99": Fresh, "1": Miss, "50": Miss} {
		if _, use := s.Look(t0, []byte(key), request(t, "GET")); use != want {
			t.Errorf("%s: %d", key, use)
		}
	}
	if n := s.Purge(t0, func(key string) bool { return key == "99" }); n != 1 {
		t.Errorf("%d purged", n)
	}
	s.Invalidate(t0, []byte("0"))
	if _, use := s.Look(t0, []byte("0"), request(t, "GET")); use != Miss {
		t.Error("an answer that was invalidated is there")
	}
	s.Resize(0)
	if c := s.Counts(); c.Bytes != 0 || c.Entries != 0 || len(s.entries) != 0 {
		t.Errorf("%+v", c)
	}
	asked = at(1)
	put(1) // larger than all there is room for
	if c := s.Counts(); c.Entries != 0 {
		t.Errorf("%+v", c)
	}
}

func FuzzControl(f *testing.F) {
	for _, s := range []string{"max-age=60", `private="a,b", max-age="5"`, `"`, `a="\`, ",,,=,", "max-age=99999999999999999999999"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var m http1.Message
		if m.Response([]byte("HTTP/1.1 200 x\r\nCache-Control: "+s+"\r\n\r\n"), []byte("GET")) != nil {
			return
		}
		if d := control(&m); d.maxAge < -1 || d.sMaxAge < -1 {
			t.Errorf("%q: %+v", s, d)
		}
	})
}

// A 304 to who has proved who it is renews an answer for others only if it says that it
// may: RFC 9111, section 3.5.
func TestRenewAuthorized(t *testing.T) {
	for text, renewed := range map[string]bool{"max-age=60": false, "max-age=60, public": true} {
		s, now := New(1<<20), time.Now()
		plain, proved := request(t, "GET"), request(t, "GET", "Authorization: Basic YTpi")
		old := s.Put([]byte("k"), plain, response(t, 200, `ETag: "e"`, "Content-Length: 1"), []byte("x"), now, now, Rules{})
		own := s.Renew(old, proved, response(t, 304, `ETag: "e"`, "X-User: a", "Cache-Control: "+text), now.Add(1), now.Add(2), Rules{})
		if !strings.Contains(string(own.Head), "X-User: a") {
			t.Errorf("%s: who asked gets %q", text, own.Head)
		}
		e, use := s.Look(now.Add(3), []byte("k"), plain)
		if got := e != nil && strings.Contains(string(e.Head), "X-User"); got != renewed || e == nil || (use == Fresh) != renewed {
			t.Errorf("%s: others get %v, %v", text, e, use)
		}
	}
}

// Answers that are coming hold no more than those that are stored may.
func TestHold(t *testing.T) {
	s := New(100)
	if !s.Hold(60) || s.Hold(41) || !s.Hold(40) || s.Hold(1<<62) {
		t.Error("over the bound, or not up to it")
	}
	s.Give(60)
	if !s.Hold(60) {
		t.Error("what was given back is not there")
	}
}
