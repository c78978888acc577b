package cache

import (
	"math"
	"strings"
	"time"

	"hauberk.dev/mesh/http1"
)

// directives are what Cache-Control fields say: RFC 9111, section 5.2, and RFC 5861.
// Times are -1 where nothing is said.
type directives struct {
	noStore, noCache, private, public   bool
	mustRevalidate, proxyRevalidate     bool
	onlyIfCached, maxStaleAny           bool
	maxAge, sMaxAge, minFresh, maxStale time.Duration
	staleWhileRevalidate, staleIfError  time.Duration
	said                                bool // there was a field
}

// control reads the Cache-Control fields of a message. What is named twice counts
// as the shorter; a time that is no number counts as 0, which is never too long.
func control(m *http1.Message) directives {
	d := directives{maxAge: -1, sMaxAge: -1, minFresh: -1, maxStale: -1, staleWhileRevalidate: -1, staleIfError: -1}
	for i := range m.Fields {
		f := &m.Fields[i]
		if !http1.Is(f.Name, "cache-control") {
			continue
		}
		d.said = true
		for rest := string(f.Value); rest != ""; {
			var one string
			one, rest = nextDirective(rest)
			d.add(one)
		}
	}
	return d
}

// nextDirective cuts the first of a list, in which quoted text may hold commas.
func nextDirective(s string) (one, rest string) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case c == ',' && !quoted:
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}

func (d *directives) add(one string) {
	name, value, _ := strings.Cut(strings.Trim(one, " \t"), "=")
	value = strings.Trim(value, `"`)
	switch strings.ToLower(strings.Trim(name, " \t")) {
	case "no-store":
		d.noStore = true
	case "no-cache": // for some fields only: the whole is treated so, which is allowed
		d.noCache = true
	case "private":
		d.private = true
	case "public":
		d.public = true
	case "must-revalidate":
		d.mustRevalidate = true
	case "proxy-revalidate":
		d.proxyRevalidate = true
	case "only-if-cached":
		d.onlyIfCached = true
	case "max-age":
		shorter(&d.maxAge, value)
	case "s-maxage":
		shorter(&d.sMaxAge, value)
	case "min-fresh":
		shorter(&d.minFresh, value)
	case "max-stale":
		if value == "" {
			d.maxStaleAny = true
		} else {
			shorter(&d.maxStale, value)
		}
	case "stale-while-revalidate":
		shorter(&d.staleWhileRevalidate, value)
	case "stale-if-error":
		shorter(&d.staleIfError, value)
	}
}

func shorter(d *time.Duration, value string) {
	if n := seconds(value); *d < 0 || n < *d {
		*d = n
	}
}

// seconds reads delta-seconds: RFC 9111, section 1.2.2. More than can be counted is
// very long, what is no number is nothing.
func seconds(s string) time.Duration {
	const most = math.MaxInt32
	n := int64(0)
	if s == "" {
		return 0
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0
		}
		n = min(n*10+int64(s[i]-'0'), most)
	}
	return time.Duration(n) * time.Second
}

// date reads a field that is a date.
func date(m *http1.Message, name string) (t time.Time, there, valid bool) {
	v, there := m.Field(name)
	if !there {
		return t, false, false
	}
	for _, layout := range [...]string{timeFormat, "Monday, 02-Jan-06 15:04:05 GMT", time.ANSIC} {
		if t, err := time.Parse(layout, string(v)); err == nil {
			return t, true, true
		}
	}
	return t, true, false
}

// timeFormat is the one of the three forms of RFC 9110, section 5.6.7, that is
// written today.
const timeFormat = "Mon, 02 Jan 2006 15:04:05 GMT"
