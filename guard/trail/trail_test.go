package trail

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	logs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	"google.golang.org/protobuf/encoding/protojson"

	"hauberk.dev/api/spec"
	"hauberk.dev/guard"
)

func TestRedact(t *testing.T) {
	const jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
	for _, tt := range []struct {
		args string
		want string
	}{
		{"app --password=hunter2", "app --password=[redacted: named]"},
		{"app --password hunter2 go", "app --password [redacted: flag] go"},
		{"app -token abc", "app -token [redacted: flag]"},
		{"app DB_PASSWORD=x;y", "app DB_PASSWORD=[redacted: named];y"},
		{"app --api-key=abc", "app --api-key=[redacted: named]"},
		{"mysql -phunter2 db", "mysql -p[redacted: flag] db"},
		{"/usr/bin/sshpass -p hunter2 ssh host", "/usr/bin/sshpass -p [redacted: flag] ssh host"},
		{"curl -u me:secret http://x/", "curl -u [redacted: flag] http://x/"},
		{"mkdir -p /a/b", "mkdir -p /a/b"},
		{"curl https://me:hunter2@example.com/path", "curl https://[redacted: url user]@example.com/path"},
		{"psql postgres://u:p@db:5432/x?sslmode=off", "psql postgres://[redacted: url user]@db:5432/x?sslmode=off"},
		{"x " + jwt, "x [redacted: jwt]"},
		{"x AKIAIOSFODNN7EXAMPLE", "x [redacted: aws key]"},
		{"x wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "x [redacted: key]"},
		{"x 0123456789abcdef0123456789abcdef", "x [redacted: hex key]"},
		{"x ghp_0123456789abcdefghijABCDEFGHIJ012345", "x [redacted: token]"},
		{"x https://example.com/a?token=abc&b=1", "x https://example.com/a?token=[redacted: named]&b=1"},
		// What is no secret stays.
		{"java -jar /opt/app/service-1.2.3.jar --port 8080", "java -jar /opt/app/service-1.2.3.jar --port 8080"},
		{"cat /usr/lib/x86_64-linux-gnu/libcrypto.so.3", "cat /usr/lib/x86_64-linux-gnu/libcrypto.so.3"},
		{"git clone https://example.com/org/repository-name.git", "git clone https://example.com/org/repository-name.git"},
		{"ssh -p 22 host", "ssh -p 22 host"},
	} {
		got, taken := Redact(strings.Fields(tt.args))
		if text := strings.Join(got, " "); text != tt.want {
			t.Errorf("%s: %s; want %s", tt.args, text, tt.want)
		}
		if marks := strings.Count(tt.want, "[redacted: "); taken != marks {
			t.Errorf("%s: %d taken, %d marks", tt.args, taken, marks)
		}
	}
	header, taken := Redact([]string{"curl", "-H", "Authorization: Bearer abc.def-ghi", "-H", "Cookie: session=1; b=2"})
	if want := []string{"curl", "-H", "Authorization: Bearer [redacted: authorization]", "-H", "Cookie: [redacted: cookie]"}; !slices.Equal(header, want) || taken != 2 {
		t.Errorf("%q, %d taken; want %q", header, taken, want)
	}
	key, _ := Redact([]string{"sh", "-c", "echo '-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA' > k"})
	if strings.Contains(key[2], "MII") {
		t.Errorf("%q holds the key", key[2])
	}
}

func FuzzRedact(f *testing.F) {
	f.Add("mysql -psecret\x00password=x")
	f.Fuzz(func(t *testing.T, s string) {
		args := strings.Split(s, "\x00")
		got, taken := Redact(args)
		if len(got) != len(args) {
			t.Fatalf("%d arguments became %d", len(args), len(got))
		}
		if taken == 0 && !slices.Equal(got, args) {
			t.Fatalf("%q became %q without a mark", args, got)
		}
	})
}

func event(op guard.Op, verdict guard.Verdict) guard.Event {
	return guard.Event{Op: op, Verdict: verdict, Rule: 17, Generation: 3, Sequence: 9, PID: 42, PPID: 41, UID: 1000, Command: "sh\x1b[2J",
		Exe: "/bin/sh", Parent: "/usr/bin/java", Container: 3, Lineage: []guard.Ancestor{{PID: 41, Name: "java"}, {PID: 7, Name: "init"}}}
}

type rules struct{}

func (rules) Rule(id uint32) (guard.Rule, bool) {
	return guard.Rule{ID: id, Policy: "strict", Text: "nothing may run", Severity: spec.SeverityCritical}, id == 17
}

var somewhere = Sandbox{ID: "web-1", Image: "bank/web", ImageDigest: "sha256:aa", Node: "n1", Namespace: "bank", Workload: "web", Application: "shop"}

func records() []Record {
	tr := Trail{Sandbox: somewhere}
	now := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	started, connected, denied := event(guard.OpStarted, guard.Allowed), event(guard.OpConnected, guard.Allowed), event(guard.OpExec, guard.Denied)
	started.Path, started.Args, started.Rule = "/bin/sh", []string{"sh", "--token", "abc"}, 0
	connected.Target, connected.Rule = netip.MustParseAddrPort("10.0.0.5:443"), 0
	denied.Path, denied.Series, denied.Count = "/tmp/x\x1b]0;owned\x07", 9, 1
	write := event(guard.OpWrite, guard.Reported)
	write.Path = "/etc/passwd"
	again := guard.Event{Op: guard.OpRepeated, Verdict: guard.Denied, Detail: uint64(guard.OpExec), Rule: 17, Series: 9, Count: 1000}
	var out []Record
	for _, e := range []guard.Event{started, connected, denied, write, again} {
		out = append(out, tr.Record(e, rules{}, "digest", now))
	}
	return append(out, tr.Losses(map[guard.Op]guard.Tally{guard.OpExec: {Happened: 20, Sent: 10, Lost: 7, Held: 3}}, now)...)
}

func TestRecords(t *testing.T) {
	all := records()
	if len(all) != 6 {
		t.Fatalf("%d records; want 6", len(all))
	}
	if r := all[0]; r.Redacted != 1 || strings.Contains(r.Text, "abc") || r.Process.Args[2] != "[redacted: flag]" {
		t.Errorf("%+v; want the token gone and said so", r)
	}
	if r := all[2]; r.Policy != "strict" || r.Severity != "critical" || r.Digest != "digest" || r.Count != 1 || r.Process.Container != "3" {
		t.Errorf("%+v; want its rule", r)
	}
	if r := all[4]; r.Op != "exec" || r.Count != 999 {
		t.Errorf("a repetition is %s, %d times; want exec, the 999 that were not told", r.Op, r.Count)
	}
	if r := all[5]; r.Verdict != VerdictLost || r.Count != 10 || r.Op != "exec" {
		t.Errorf("%+v; want a loss of 10", r)
	}
	for _, r := range all {
		line, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := Parse(line); err != nil || again.Text != r.Text || again.Sandbox != r.Sandbox {
			t.Errorf("%s reads as %+v, %v", line, again, err)
		}
	}
}

// Whatever a workload is called, it cannot speak to the terminal.
func TestTextIsPlain(t *testing.T) {
	for _, r := range records() {
		if line := Line(r); strings.ContainsFunc(line, func(c rune) bool { return c < ' ' || c == 0x7f || c == '\u202e' }) {
			t.Errorf("%q", line)
		}
	}
	r := Record{Schema: Schema, Text: "a\u202eb\x9b", Sandbox: Sandbox{ID: "x\x1b[m"}, Process: Process{Exe: "\x1b"}}
	if line := Line(r); strings.ContainsAny(line, "\x1b\u202e\u009b") {
		t.Errorf("%q", line)
	}
}

func TestOTelIsOTLP(t *testing.T) {
	for _, r := range records() {
		var b bytes.Buffer
		if err := Write(&b, OTel, r); err != nil {
			t.Fatal(err)
		}
		var request logs.ExportLogsServiceRequest
		if err := (protojson.UnmarshalOptions{}).Unmarshal(b.Bytes(), &request); err != nil {
			t.Fatalf("%s: %v", b.Bytes(), err)
		}
		record := request.ResourceLogs[0].ScopeLogs[0].LogRecords[0]
		if record.Body.GetStringValue() != r.Text || record.TimeUnixNano != uint64(r.Time.UnixNano()) {
			t.Errorf("%v; want the text and time of %+v", record, r)
		}
	}
}

// The classes and what each must have, by version 1.3.0 of the schema.
func TestOCSF(t *testing.T) {
	classes := []float64{1007, 4001, 2004, 2004, 2004, 2004}
	required := map[float64][]string{
		1007: {"actor", "device", "process"}, 4001: {"dst_endpoint"}, 2004: {"finding_info"},
	}
	for i, r := range records() {
		var b bytes.Buffer
		if err := Write(&b, OCSF, r); err != nil {
			t.Fatal(err)
		}
		var e map[string]any
		if err := json.Unmarshal(b.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		if e["class_uid"] != classes[i] || e["type_uid"] != classes[i]*100+e["activity_id"].(float64) {
			t.Errorf("%v: want class %v", e, classes[i])
		}
		for _, field := range append(required[classes[i]], "activity_id", "category_uid", "metadata", "severity_id", "time", "type_uid") {
			if e[field] == nil {
				t.Errorf("class %v without %s: %s", classes[i], field, b.Bytes())
			}
		}
	}
}

func TestHistory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "h")
	const limit = 64 << 10
	h, err := OpenHistory(path, limit)
	if err != nil {
		t.Fatal(err)
	}
	r := records()[2]
	for i := range 1000 {
		r.Sequence = uint64(i + 1)
		if err := h.Append(r); err != nil {
			t.Fatal(err)
		}
	}
	h.Close()
	size := int64(0)
	for _, p := range []string{path, path + ".1"} {
		if info, err := os.Stat(p); err == nil {
			size += info.Size()
		}
	}
	if size > limit || size < limit/4 {
		t.Errorf("%d bytes kept; the limit is %d", size, limit)
	}
	// A crash cut the last line.
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, `{"schema":"hauberk.dev/gu`)
	f.Close()
	if h, err = OpenHistory(path, limit); err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	r.Sequence = 1001
	if err := h.Append(r); err != nil {
		t.Fatal(err)
	}
	last := uint64(0)
	err = Read(t.Context(), path, false, func(r Record) error {
		if last != 0 && r.Sequence != last+1 {
			t.Errorf("record %d after %d", r.Sequence, last)
		}
		last = r.Sequence
		return nil
	})
	if err != nil || last != 1001 {
		t.Errorf("the last is %d, %v; want 1001", last, err)
	}
}

func TestHistoryIsFollowed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "h")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const all = 300
	go func() {
		h, err := OpenHistory(path, 256<<10)
		if err != nil {
			t.Error(err)
			return
		}
		defer h.Close()
		r := records()[2]
		for i := range all {
			r.Sequence = uint64(i + 1)
			if err := h.Append(r); err != nil {
				t.Error(err)
			}
		}
	}()
	done, seen := errors.New("done"), uint64(0)
	err := Read(ctx, path, true, func(r Record) error {
		if r.Sequence <= seen {
			t.Errorf("record %d after %d", r.Sequence, seen)
		}
		if seen = r.Sequence; seen == all {
			return done
		}
		return nil
	})
	if !errors.Is(err, done) {
		t.Errorf("read to %d, %v; want all %d", seen, err, all)
	}
}

// No two operations have the same word, and one without is told by its number.
func TestOperationsHaveNames(t *testing.T) {
	words := map[string]bool{}
	for op, n := range names {
		if words[n] || n == "" || OpName(op) != n {
			t.Errorf("operation %d: %q is taken", op, n)
		}
		words[n] = true
	}
	if got := OpName(127); got != "op127" {
		t.Errorf("operation 127 is %q", got)
	}
}

func TestMetrics(t *testing.T) {
	var m Metrics
	for _, r := range records() {
		m.Add(r)
	}
	hostile := records()[2]
	hostile.Sandbox.Workload, hostile.Op = "a\"\n\\", "op77"
	m.Add(hostile)
	m.Tally(somewhere, map[guard.Op]guard.Tally{guard.OpExec: {Sent: 4}}, map[guard.Op]guard.Tally{guard.OpExec: {Happened: 20, Sent: 10, Lost: 7, Held: 3}})
	var b bytes.Buffer
	if _, err := m.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`hauberk_guard_acts_total{workload="bank/web",op="exec",verdict="denied"} 1000` + "\n",
		`hauberk_guard_acts_total{workload="bank/web",op="started",verdict="allowed"} 1` + "\n",
		`hauberk_guard_acts_total{workload="bank/a\"\n\\",op="other",verdict="denied"} 1` + "\n",
		`hauberk_guard_records_total{workload="bank/web",op="exec",outcome="sent"} 6` + "\n",
		`hauberk_guard_records_total{workload="bank/web",op="exec",outcome="lost"} 7` + "\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %s in\n%s", want, &b)
		}
	}
	for i := range 2 * maxLabels {
		m.Add(Record{Op: "exec", Verdict: "denied", Count: 1, Sandbox: Sandbox{Workload: fmt.Sprint(i)}})
	}
	b.Reset()
	m.WriteTo(&b)
	if n := strings.Count(b.String(), "\n"); n > maxLabels+20 {
		t.Errorf("%d lines of metrics for %d workloads", n, 2*maxLabels)
	}
}

func FuzzParse(f *testing.F) {
	for _, r := range records() {
		line, _ := json.Marshal(r)
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := Parse(line)
		if err != nil {
			return
		}
		for _, format := range []string{Text, JSON, OCSF, OTel} {
			if err := Write(&bytes.Buffer{}, format, r); err != nil {
				t.Errorf("%s: %v", format, err)
			}
		}
	})
}
