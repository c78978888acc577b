package guard

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"hauberk.dev/api/spec"
)

// message is an answer of one question with a name and an address.
func message() []byte {
	b := []byte{0x12, 0x34, 0x81, 0x80, 0, 1, 0, 2, 0, 0, 0, 0}
	b = append(b, "\x03api\x07example\x00\x00\x01\x00\x01"...)
	b = append(b, "\xc0\x0c\x00\x05\x00\x01\x00\x00\x00\x3c\x00\x04\x01x\xc0\x10"...)
	return append(b, "\xc0\x29\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x0a\x00\x00\x01"...)
}

func TestParseNames(t *testing.T) {
	n, err := parseNames(message())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := n.String(), "for [api.example. A]: [api.example. CNAME x.example. x.example. A 10.0.0.1]"; got != want || n.Cut {
		t.Errorf("%s (cut %t), want %s", got, n.Cut, want)
	}
	for i := 12; i < len(message()); i++ {
		if n, err := parseNames(message()[:i]); err != nil || !n.Cut {
			t.Errorf("cut after %d: %v %v; want what there is, and that it is cut", i, n, err)
		}
	}
	dotted := append([]byte{0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0}, "\x05a.b.c\x07example\x00\x00\x01\x00\x01"...)
	if n, err := parseNames(dotted); err != nil || n.Questions[0].Name != `a\.b\.c.example.` {
		t.Errorf("%v %v; want the dots inside a label told apart", n, err)
	}
}

func FuzzParseNames(f *testing.F) {
	f.Add(message())
	f.Add([]byte{})
	f.Add(append(make([]byte, 12), 0xc0, 0x0c))
	loop := message()
	binary.BigEndian.PutUint16(loop[4:], 0xffff)
	f.Add(loop)
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := parseNames(b)
		if err == nil && (len(n.Questions) > maxNameRecords || len(n.Answers) > maxNameRecords || len(n.Questions)*5+len(n.Answers)*11 > len(b)) {
			t.Errorf("%d questions, %d answers of %d bytes", len(n.Questions), len(n.Answers), len(b))
		}
		_ = n.String()
	})
}

func namesPolicy() spec.GuardPolicy {
	return spec.GuardPolicy{Net: &spec.GuardNet{
		Egress: []spec.GuardEgress{{Name: "api.example", Ports: []int32{443}}, {Name: "*.wild.example"}},
		DNS:    &spec.GuardDNS{Servers: []string{"10.9.0.53"}, Audit: true},
	}}
}

// Whose name a list has is reached, at once after the answer; nobody else is.
func TestNamesAreLearntFromAnswers(t *testing.T) {
	if covers("*.x", "x") || !covers("*.x", "a.x") || !covers("*.x", "*.a.x") || covers("*.x", "ax") || covers("a.x", "a.x") {
		t.Error("a name covers what is below it, and only that")
	}
	c := compileForTest(t, 1, namesPolicy())
	files := imageFiles()
	files[".names"] = c.Blob
	next := namesPolicy()
	again := compileForTest(t, 2, next)
	next.Net.Egress = next.Net.Egress[1:]
	without := compileForTest(t, 3, next)
	files[".again"], files[".without"] = again.Blob, without.Blob
	steps := []string{"network", "policy .names"}
	for _, run := range []string{
		"udp=1 10.9.0.80:443",                             // before anybody asked
		"resolve=1 api.example 10.9.0.80:443",             // the first connection right after the answer
		"resolve=2 API.eXample 10.9.0.80:443",             // in any case
		"udp=2 10.9.0.80:80",                              // another port
		"resolve=3 evil.other 10.9.0.66:443",              // another name
		"resolve=4 a.b.wild.example 10.9.0.81:443",        // below the wildcard
		"resolve=5 wild.example 10.9.0.82:443",            // but not itself
		"resolve=6 meta.wild.example 169.254.169.254:443", // nobody's to give away
		"resolve=7 big.wild.example 10.9.0.219:443",       // the last of a large answer
		`resolve=8 a.wild\.example 10.9.0.83:443`,         // a dot inside a label
		"unasked 10.9.0.84:443",                           // an answer to no question
	} {
		steps = append(steps, "run "+run)
	}
	o := boot(t, true, files, append(steps, "policy .again", "run udp=3 10.9.0.80:443", "policy .without", "run udp=4 10.9.0.80:443")...)
	for run, works := range map[string]bool{
		"udp=1": false, "resolve=1": true, "resolve=2": true, "udp=2": false, "resolve=3": false, "resolve=4": true, "resolve=5": false,
		"resolve=6": false, "resolve=7": true, "resolve=8": false, "unasked": false, "udp=3": true, "udp=4": false,
	} {
		want := "exit 10 "
		if works {
			want = "exit 0 "
		}
		if got := o.ran[run]; !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s; want %s: %v", run, got, want, o.events[run])
		}
		if told := slices.ContainsFunc(o.events[run], func(e Event) bool { return e.Op == OpEgress && e.Verdict == Denied }); told == works {
			t.Errorf("%s: %v; want a refusal told: %t", run, o.events[run], !works)
		}
	}
	seen := ""
	for _, e := range o.events["resolve=1"] {
		if e.Op == OpNames {
			seen += e.String() + "\n"
		}
	}
	for _, want := range []string{`"attack"`, "asked 10.9.0.53:53 for [api.example. A]", "heard from 10.9.0.53:53 for [api.example. A]: [api.example. A 10.9.0.80]"} {
		if !strings.Contains(seen, want) {
			t.Errorf("the record of names says %q; want %q in it", seen, want)
		}
	}
}
