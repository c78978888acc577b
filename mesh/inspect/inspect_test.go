package inspect

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

var who = CallerKey{"spiffe://d/ns/n/sa/web", "web-1"}

// ordinary is a request as most are.
func ordinary(q *Query, s *Service, c *Caller, now time.Duration) Verdict {
	q.Begin(s, 80, now)
	Target(q, "POST", "/accounts/12345/transfers?limit=50&sort=asc")
	Field(q, "Host", "ledger.bank")
	Field(q, "User-Agent", "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0")
	Field(q, "Accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8")
	Field(q, "Content-Type", "application/json")
	q.Body(JSON, ordinaryBody, int64(len(ordinaryBody)))
	return q.Judge(c)
}

var ordinaryBody = []byte(`{"from":"acc-1","to":"acc-2","amount":12.5,"currency":"EUR","note":"rent & heating; thanks","lines":[{"id":1,"text":"a"},{"id":2,"text":"b"}]}`)

func names(v Verdict) string { return v.Names() }

// learnt is a service that knows its ordinary requests.
func learnt(t testing.TB) (*Service, *Caller, *Query) {
	t.Helper()
	s, q := New(Config{Observe: 1, Learn: 50}), &Query{}
	c := s.Caller(who, 0)
	for i := range 60 {
		if v := ordinary(q, s, c, time.Duration(i)*time.Second); v.Action != None {
			t.Fatalf("request %d: %v", i, &v)
		}
	}
	return s, c, q
}

// TestSchema: what a route has not seen is a finding, each by its name.
func TestSchema(t *testing.T) {
	for _, c := range []struct {
		want         string
		method, path string
		body         string
		size         int64
		identity     string
	}{
		{"", "POST", "/accounts/77/transfers?limit=5&sort=desc", `{"from":"x","amount":1.5}`, 0, ""},
		{"", "POST", "/accounts/1a2b3c4d5e/transfers", `{"amount":null}`, 0, ""},
		{"new-route", "POST", "/accounts/77/admin", "", 0, ""},
		{"new-method", "DELETE", "/accounts/77/transfers", "", 0, ""},
		{"new-argument", "POST", "/accounts/77/transfers?debug=1", "", 0, ""},
		{"new-argument", "POST", "/accounts/77/transfers", `{"lines":[{"role":"x"}]}`, 0, ""},
		{"argument-type", "POST", "/accounts/77/transfers", `{"from":7}`, 0, ""},
		{"argument-type", "POST", "/accounts/77/transfers?limit=ten", "", 0, ""},
		{"large-request", "POST", "/accounts/77/transfers", `{}`, 1 << 20, ""},
		{"new-caller", "POST", "/accounts/77/transfers", "", 0, "spiffe://d/ns/n/sa/other"},
	} {
		s, caller, q := learnt(t)
		if c.identity != "" {
			caller = s.Caller(CallerKey{c.identity, "x-1"}, 0)
		}
		q.Begin(s, 80, time.Hour)
		Target(q, c.method, c.path)
		if c.body != "" {
			q.Body(JSON, []byte(c.body), max(c.size, int64(len(c.body))))
		}
		v := q.Judge(caller)
		if got := names(v); got != c.want {
			t.Errorf("%s %s %s: found %q, want %q", c.method, c.path, c.body, got, c.want)
		}
		sum := 0
		for _, f := range v.Findings {
			if f.Detail == "" {
				t.Errorf("%s says nothing", f.Kind)
			}
			sum += f.Kind.Weight()
		}
		if v.Score != sum {
			t.Errorf("score %d is not the sum %d", v.Score, sum)
		}
	}
}

// TestSecretsAreNotQuoted: a finding says where it was found, and quotes nothing
// of a field that has the name of a secret.
func TestSecretsAreNotQuoted(t *testing.T) {
	const attack = "' union select a, b from c"
	for where, put := range map[string]func(q *Query, name, value string){
		"header": func(q *Query, name, value string) { Field(q, name, value) },
		"query": func(q *Query, name, value string) {
			Target(q, "GET", "/?a=1&"+name+"="+strings.ReplaceAll(value, " ", "+"))
		},
		"form": func(q *Query, name, value string) {
			q.Body(Form, []byte(name+"="+strings.ReplaceAll(value, " ", "+")), -1)
		},
		"json": func(q *Query, name, value string) { q.Body(JSON, []byte(`{"`+name+`":"`+value+`"}`), -1) },
	} {
		for name, secret := range map[string]bool{"Cookie": true, "proxy-authorization": true, "api_key": true, "passwordOld": true, "X-JWT": true, "comment": false} {
			s, q := New(Config{Observe: 1}), &Query{}
			q.Begin(s, 80, 0)
			put(q, name, "WORD"+attack)
			v := q.Judge(s.Caller(who, 0))
			if got := v.String(); !strings.Contains(got, "sql 40 (") || strings.Contains(strings.ToLower(got), "word'") == secret || !strings.Contains(got, name) {
				t.Errorf("%s %s: %s", where, name, got)
			}
		}
	}
}

// TestAttackTeachesNothing: the same attack is found again and again, and its
// arguments do not become ordinary.
func TestAttackTeachesNothing(t *testing.T) {
	s, q := New(Config{Observe: 1, Learn: 10}), &Query{}
	c := s.Caller(who, 0)
	for range 100 {
		q.Begin(s, 80, 0)
		Target(q, "GET", "/items?id=1%20union%20select%201,2")
		if v := q.Judge(c); !strings.Contains(v.Names(), "sql") {
			t.Fatal("not found")
		}
	}
	if s.routes != 0 {
		t.Errorf("%d routes were learnt of attacks", s.routes)
	}
}

// TestScoreFades: a score holds what is left of findings before, says so, and
// forgets them.
func TestScoreFades(t *testing.T) {
	s, q := New(Config{Observe: 1, Shed: 70, Cut: 170}), &Query{}
	c := s.Caller(who, 0)
	attack := func(now time.Duration) Verdict {
		q.Begin(s, 80, now)
		Target(q, "GET", "/?q=1'%20or%20'1'='1")
		return q.Judge(c)
	}
	for i, want := range []struct {
		score  int
		action Action
	}{{40, Observe}, {80, Shed}, {120, Shed}, {160, Shed}, {200, Cut}, {200, Cut}} {
		if v := attack(0); v.Score != want.score || v.Action != want.action || i > 0 && !strings.Contains(v.String(), "sql 40 (") {
			t.Errorf("attack %d: %v", i, &v)
		}
	}
	if v := attack(time.Minute); v.Score != 120 || !strings.Contains(v.String(), "+ sql 80 before") {
		t.Errorf("a minute later: %v", &v)
	}
	if v := attack(time.Hour); v.Score != 40 {
		t.Errorf("an hour later: %v", &v)
	}
	if _, shed := c.Shed(0); !shed {
		t.Error("who was shed is not kept away")
	}
	if _, shed := c.Shed(2 * time.Hour); shed {
		t.Error("who was shed is kept away for ever")
	}
}

func TestScan(t *testing.T) {
	s, q := New(Config{Observe: 1}), &Query{}
	c := s.Caller(who, 0)
	ask := func(path string, now time.Duration) string {
		q.Begin(s, 80, now)
		Target(q, "GET", path)
		q.Judge(c)
		a := q.Asked(Hash(path))
		v := a.Answered(c, 404, now)
		return v.Names()
	}
	found := ""
	for range 1000 {
		found += ask("/missing", 0) // one and the same is a fault, not a search
	}
	for i := range 1000 {
		found += ask(fmt.Sprintf("/few/%d", i%10), 0)
	}
	for i := range 100 {
		found += ask(fmt.Sprintf("/slow/%d", i), time.Duration(i)*10*time.Second)
	}
	if found != "" {
		t.Errorf("found %q", found)
	}
	for i := range 60 {
		found += ask(fmt.Sprintf("/scan/%d", i), time.Hour)
	}
	if !strings.HasPrefix(found, "scan") {
		t.Errorf("a scan: found %q", found)
	}
	for i := range 60 {
		if v := c.Reached(Hash(fmt.Sprint("10.0.0.", i)), 2*time.Hour); v.Action != None {
			found = v.Names()
		}
	}
	if found != "spread" {
		t.Errorf("many destinations: found %q", found)
	}
}

func TestExfiltration(t *testing.T) {
	s := New(Config{Observe: 1})
	c, other := s.Caller(who, 0), s.Caller(CallerKey{"spiffe://d/ns/n/sa/b", "b-1"}, 0)
	now := time.Duration(0)
	var found []string
	tick := func(sent uint64) {
		c.Sent(sent)
		now += sentWindow / 2
		s.Tick(now, func(c *Caller, v Verdict) { found = append(found, c.Instance+" "+v.Names()) })
	}
	for range 60 {
		tick(1 << 20)
	}
	tick(6 << 20) // more than usual, but not far beyond
	tick(0)
	if len(found) > 0 {
		t.Fatalf("found %q in ordinary traffic", found)
	}
	tick(200 << 20)
	other.Sent(300 << 20) // of whom nothing is known: as any caller
	tick(0)
	if slices.Sort(found); !slices.Equal(found, []string{"b-1 exfiltration", "web-1 exfiltration"}) {
		t.Errorf("found %q", found)
	}
	found = nil
	for range 10 {
		tick(1 << 20)
	}
	if len(found) > 0 {
		t.Errorf("found %q afterwards", found)
	}
}

func TestHijack(t *testing.T) {
	s := New(Config{})
	for i, c := range []struct {
		address, identity, from string
		sure, strange           bool
	}{
		{"10.0.0.1", "a", "n1", false, false}, {"10.0.0.1", "a", "n1", true, false}, {"10.0.0.2", "a", "n2", false, false},
		{"10.0.0.1", "b", "n1", false, true}, {"10.0.0.1", "a", "n3", true, true},
		// Whom the plan puts there is not strange for who was there before.
		{"10.0.0.2", "b", "n3", true, false}, {"10.0.0.2", "b", "n3", true, false}, {"10.0.0.2", "a", "n2", false, true},
	} {
		if got := s.Arrive(c.address, c.identity, c.from, c.sure); (got != "") != c.strange {
			t.Errorf("%d: %q", i, got)
		}
	}
	for range 4 {
		s.Depart("10.0.0.1")
	}
	if got := s.Arrive("10.0.0.1", "b", "n3", false); got != "" {
		t.Errorf("another instance has the address later: %q", got)
	}
}

// TestHijackNamesNobody: what only somebody else's lie may have caused does not
// make an offender; what the caller has sent itself does.
func TestHijackNamesNobody(t *testing.T) {
	s := New(Config{Observe: 1, Incident: 100})
	c := s.Caller(who, 0)
	c.Strange(Hijack, "x", 0)
	if v := c.Strange(Hijack, "x", 0); v.Action != Incident || v.Own != None {
		t.Errorf("twice in two places: %+v", v)
	}
	if v := c.Strange(Shell, "x", 0); v.Action != Incident || v.Own != Observe {
		t.Errorf("and one attack: %+v", v)
	}
	if v := c.Strange(Shell, "x", 0); v.Action != Incident || v.Own != Incident {
		t.Errorf("and another: %+v", v)
	}
}

// TestBounds: however many different things there are, memory is bounded, and
// what has no room is counted.
func TestBounds(t *testing.T) {
	s, q := New(Config{Learn: 1 << 30}), &Query{}
	c := s.Caller(who, 0)
	for i := range 4 * MaxRoutes {
		for _, path := range []string{fmt.Sprintf("/a%c%c/x%c", 'a'+i%26, 'a'+i/26%26, 'a'+i%7), fmt.Sprintf("/%d/x", i)} {
			q.Begin(s, 80, 0)
			Target(q, "GET", path+fmt.Sprintf("?k%d=1", i))
			q.Judge(c)
		}
	}
	if s.routes > MaxRoutes || len(s.root.kids) > MaxKids {
		t.Errorf("%d routes, %d segments", s.routes, len(s.root.kids))
	}
	s.root.each(func(r *route) {
		if len(r.fields) > MaxFields {
			t.Errorf("%d fields", len(r.fields))
		}
	})
	for i := range 2 * MaxCallers {
		s.Caller(CallerKey{"x", fmt.Sprint(i)}, 0)
	}
	if len(s.callers) > MaxCallers || s.Counts.CallersOver.Load() == 0 {
		t.Errorf("%d callers, %d over", len(s.callers), s.Counts.CallersOver.Load())
	}
	deep := bytes.Repeat([]byte(`{"a":[`), 10_000)
	q.Begin(s, 80, 0)
	q.Body(JSON, deep, -1)
	if len(q.fields) > MaxFields {
		t.Errorf("%d fields of a deep body", len(q.fields))
	}
}

// TestExport: what was learnt outlives the process, and what is no schema changes
// nothing.
func TestExport(t *testing.T) {
	s, c, q := learnt(t)
	c.Sent(1 << 20)
	s.Tick(0, nil)
	s.Tick(time.Minute, func(*Caller, Verdict) {})
	b, err := s.Export()
	if err != nil {
		t.Fatal(err)
	}
	fresh := New(Config{Observe: 1, Learn: 50})
	if err := fresh.Import(b); err != nil {
		t.Fatal(err)
	}
	again, err := fresh.Export()
	if err != nil || !bytes.Equal(b, again) {
		t.Errorf("what was imported is exported otherwise: %v\n%s\n%s", err, b, again)
	}
	c = fresh.Caller(who, 0)
	if v := ordinary(q, fresh, c, time.Hour); v.Action != None {
		t.Errorf("an ordinary request: %v", &v)
	}
	q.Begin(fresh, 80, time.Hour)
	Target(q, "DELETE", "/accounts/77/transfers")
	if v := q.Judge(c); v.Names() != "new-method" {
		t.Errorf("a new method: %q", v.Names())
	}
	for _, bad := range []string{"", "{}", `{"version":3}`, `{"version":1,"other":1}`, string(b) + "x", string(b[:len(b)/2]),
		strings.Replace(string(b), `"types":"`, `"types":"x`, 1), strings.Replace(string(b), `"mean":`, `"mean":-1`, 1)} {
		if err := fresh.Import([]byte(bad)); err == nil {
			t.Errorf("%.80q was taken", bad)
		}
	}
	if still, _ := fresh.Export(); len(still) < len(b) {
		t.Error("what was refused has changed something")
	}
}

// TestExportNames: an argument is known again whatever bytes its name is of.
func TestExportNames(t *testing.T) {
	s, q := New(Config{Observe: 1, Learn: 5}), &Query{}
	c := s.Caller(who, 0)
	odd := func(s *Service, c *Caller, name string) Verdict {
		q.Begin(s, 80, time.Hour)
		Target(q, "POST", "/a")
		q.Body(JSON, []byte(`{"`+name+`":1}`), -1)
		return q.Judge(c)
	}
	for range 10 {
		for _, name := range []string{"\xff\xfe", "a\x01", "ä<b", "\u2028"} {
			odd(s, c, name)
		}
	}
	s.Begin(time.Date(2026, 11, 2, 3, 4, 5, 6, time.UTC))
	b, err := s.Export()
	if err != nil {
		t.Fatal(err)
	}
	fresh := New(Config{Observe: 1, Learn: 5})
	fresh.Begin(time.Now())
	if err := fresh.Import(b); err != nil {
		t.Fatal(err)
	}
	if since, n := fresh.Learnt(); !since.Equal(time.Date(2026, 11, 2, 3, 4, 5, 6, time.UTC)) || n != 40 {
		t.Errorf("learnt since %v from %d requests", since, n)
	}
	c = fresh.Caller(who, 0)
	for _, name := range []string{"\xff\xfe", "a\x01", "ä<b", "\u2028"} {
		if v := odd(fresh, c, name); v.Action != None {
			t.Errorf("%q: %v", name, &v)
		}
	}
	if v := odd(fresh, c, "\xff\xfd"); v.Names() != "new-argument" {
		t.Errorf("another one: %v", &v)
	}
}

// TestExportBound: whoever may call cannot make what is learnt too large to keep.
func TestExportBound(t *testing.T) {
	s, q := New(Config{Observe: 1, Learn: 1 << 30}), &Query{}
	c := make([]*Caller, MaxSeen)
	for i := range c {
		c[i] = s.Caller(CallerKey{Identity: fmt.Sprintf("spiffe://bank.example/ns/%060d/sa/%060d", i, i)}, 0)
	}
	for r := range MaxRoutes {
		path := fmt.Sprintf("%s%03d", strings.Repeat(`"`, maxCall-3), r)
		for i := range c {
			q.Begin(s, 80, 0)
			q.named("CALL", []byte(path))
			for n := range MaxFields {
				if i > 0 {
					break // they are the same
				}
				from := len(q.name)
				q.name = append(q.name, strings.Repeat("\x01", maxPathField-3)+fmt.Sprintf("%03d", n)...)
				q.argument(from, 1<<len(typeNames)-1)
			}
			q.Body(Bytes, nil, int64(1)<<(i%40))
			q.Judge(c[i])
		}
	}
	b, err := s.Export()
	if err != nil || s.routes != MaxRoutes || len(b) > 12<<20 {
		t.Errorf("%d bytes of %d routes: %v", len(b), s.routes, err)
	}
	if err := New(Config{}).Import(b); err != nil {
		t.Error(err)
	}
	q.Begin(s, 80, 0)
	if q.named("CALL", []byte(strings.Repeat("a", maxCall+1))); q.route != nil {
		t.Error("a long name is kept")
	}
	t.Logf("%d bytes", len(b))
}

func TestSizes(t *testing.T) {
	var s Sizes
	var all []int64
	r := rand.New(rand.NewPCG(1, 2))
	for range 10_000 {
		n := int64(r.ExpFloat64() * 5000)
		s.Add(n)
		all = append(all, n)
	}
	slices.Sort(all)
	for _, q := range []float64{0, .01, .5, .9, .99, .999} {
		want, got := all[int(q*float64(len(all)))], s.Quantile(q)
		if got < want || float64(got) > 1.25*float64(want)+1 {
			t.Errorf("quantile %v: %d, want %d to a quarter more", q, got, want)
		}
	}
	for n := int64(0); n < 1<<20; n += 1 + n/7 {
		if b := sizeBucket(n); bucketEnd(b) < n || b > 0 && bucketEnd(b-1) >= n {
			t.Fatalf("%d is in bucket %d to %d", n, b, bucketEnd(b))
		}
	}
}

// TestNoAllocation: a request in which nothing is found costs no memory.
func TestNoAllocation(t *testing.T) {
	s, c, q := learnt(t)
	now := time.Hour
	if n := testing.AllocsPerRun(1000, func() {
		now += time.Millisecond * 100
		if v := ordinary(q, s, c, now); len(v.Findings) > 0 {
			t.Fatal(v.String())
		}
		a := q.Asked(Hash("/accounts"))
		a.Answered(c, 200, now)
	}); n != 0 {
		t.Errorf("%v allocations for a request", n)
	}
}

func BenchmarkRequest(b *testing.B) {
	s, c, q := learnt(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		ordinary(q, s, c, time.Duration(i)*time.Millisecond*100)
	}
}

func BenchmarkMatch(b *testing.B) {
	var v value
	b.SetBytes(int64(len(ordinaryBody)))
	for b.Loop() {
		v.place = inBody
		decode(&v.normal, ordinaryBody, codePercent|codeJSON)
		v.match()
	}
}

// FuzzRequest: no bytes make looking at them fail, grow or find what is not named.
func FuzzRequest(f *testing.F) {
	f.Add("GET", "/a/b?c=d%27", "x", []byte(`{"a":[1,"b\u0027"]}`), uint8(JSON))
	f.Add("POST", "/%2e%2e/%c0%af?__proto__[a]=%u0027", "${jndi:${lower:x}}", []byte("a=1&b=' or '1'='1"), uint8(Form))
	f.Add("GET", "/", "", []byte("\x00\x00\x00\x00\x05\x0a\x03abc"), uint8(GRPC))
	f.Add("GET", "/*x*//*!50000union*/", "1;;;|||`$($(", []byte("C\x1dcom.sun.rowset.JdbcRowSetImpl"), uint8(Hessian))
	f.Fuzz(func(t *testing.T, method, target, field string, body []byte, kind uint8) {
		s, q := New(Config{Observe: 1, Learn: 1}), &Query{}
		c := s.Caller(who, 0)
		for i := range 3 {
			q.Begin(s, 80, time.Duration(i)*time.Second)
			Target(q, method, target)
			Field(q, "X", field)
			q.Body(BodyKind(kind%6), body, -1)
			v := q.Judge(c)
			if sum := v.Score; sum < 0 || v.String() == "" || len(v.Findings) > int(kinds) {
				t.Fatalf("%+v", v)
			}
		}
		b, err := s.Export()
		if err != nil {
			t.Fatal(err)
		}
		if err := New(Config{}).Import(b); err != nil {
			t.Fatalf("what was exported is not taken: %v\n%s", err, b)
		}
	})
}

// FuzzImport: a schema is taken whole or not at all.
func FuzzImport(f *testing.F) {
	s, _, _ := learnt(f)
	b, err := s.Export()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1,"requests":1,"routes":[{"method":"GET","path":"a","sizes":{"3":1}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := New(Config{})
		if s.Import(b) != nil {
			return
		}
		out, err := s.Export()
		if err != nil {
			t.Fatal(err)
		}
		if err := New(Config{}).Import(out); err != nil {
			t.Fatal(err)
		}
	})
}

func TestMirrorFrames(t *testing.T) {
	b := AppendMirror(nil, MirrorData, 7, 3)
	b = append(b, "abc"...)
	for n := range len(b) {
		if _, size, err := NextMirror(b[:n]); size != 0 || err != nil {
			t.Errorf("%d bytes: %d, %v", n, size, err)
		}
	}
	if f, size, err := NextMirror(append(b, 1)); err != nil || size != len(b) || f.Kind != MirrorData || f.Connection != 7 || string(f.Payload) != "abc" {
		t.Errorf("%+v, %d, %v", f, size, err)
	}
}

func FuzzMirror(f *testing.F) {
	f.Add(append(AppendMirror(nil, MirrorLost, 1, 8), make([]byte, 8)...))
	f.Add(AppendMirror(AppendMirror(nil, MirrorEnd, 1, 0), MirrorData, 2, 1<<20))
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			f, size, err := NextMirror(b)
			if err != nil || size == 0 {
				return
			}
			again := append(AppendMirror(nil, f.Kind, f.Connection, len(f.Payload)), f.Payload...)
			if !bytes.Equal(again, b[:size]) {
				t.Fatalf("%x is written as %x", b[:size], again)
			}
			b = b[size:]
		}
	})
}
