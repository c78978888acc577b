package show

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

type story struct {
	Name  string            `json:"name"`
	Age   int               `json:"age"`
	Note  string            `json:"note,omitempty"`
	Parts []string          `json:"parts"`
	More  map[string]string `json:"more"`
}

func TestFormats(t *testing.T) {
	v := story{Name: "a <b>\n: yes", Age: 3, Parts: []string{"x", "true"}, More: map[string]string{"k": "v"}}
	for f, want := range map[Format]string{
		JSON:  "{\n  \"name\": \"a <b>\\n: yes\",\n  \"age\": 3,\n  \"parts\": [\n    \"x\",\n    \"true\"\n  ],\n  \"more\": {\n    \"k\": \"v\"\n  }\n}\n",
		YAML:  "name: |-\n  a <b>\n  : yes\nage: 3\nparts:\n  - x\n  - \"true\"\nmore:\n  k: v\n",
		Table: "table\n",
	} {
		var b bytes.Buffer
		err := Value(&b, f, v, func(w io.Writer) error { _, err := io.WriteString(w, "table\n"); return err })
		if err != nil || b.String() != want {
			t.Errorf("%s: %v\n%q, want\n%q", f, err, b.String(), want)
		}
	}
	broken := errors.New("broken")
	if err := Value(io.Discard, Table, v, func(io.Writer) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("error is %v", err)
	}
}

func TestFormatFlag(t *testing.T) {
	var f Format
	for _, name := range Formats() {
		if err := f.Set(name); err != nil || f.String() != name || !strings.Contains(f.Type(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := f.Set("xml"); err == nil || f != YAML {
		t.Errorf("xml: %v, %s", err, f)
	}
}

func TestRows(t *testing.T) {
	var b bytes.Buffer
	if err := Rows(&b, []string{"A", "B"}, [][]string{{"tab\there", ""}, {"\x1b[31m", "资"}}); err != nil {
		t.Fatal(err)
	}
	want := "A         B\ntab\ufffdhere  -\n\ufffd[31m     资\n"
	if b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}

func TestAge(t *testing.T) {
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 90 * time.Second: "90s", 2 * time.Minute: "2m", 3 * time.Hour: "3h", 50 * time.Hour: "2d",
	} {
		if got := Age(now.Add(-d), now); got != want {
			t.Errorf("%v is %q, want %q", d, got, want)
		}
	}
	if got := Age(time.Time{}, now); got != "" {
		t.Errorf("never is %q", got)
	}
}

func TestShort(t *testing.T) {
	for in, want := range map[string]string{"sha256:0123456789abcdef": "sha256:0123456789ab", "sha256:01": "sha256:01", "x": "x", "": ""} {
		if got := Short(in); got != want {
			t.Errorf("%q is %q", in, got)
		}
	}
}
