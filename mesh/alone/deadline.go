package alone

import (
	"strconv"
	"time"

	"hauberk.dev/mesh/http1"
)

// maxDeadline is the longest that is taken for one: gRPC writes eight digits.
const maxDeadline = 24 * time.Hour

// deadline reads until when the client waits: what a call of gRPC says, or the field
// that the route names, in milliseconds.
func (s *session) deadline(a *action) {
	s.until = time.Time{}
	d, ok := time.Duration(0), false
	if s.grpc {
		if v, there := s.req.Field("Grpc-Timeout"); there {
			d, ok = grpcTimeout(v)
		}
	} else if name := a.route.Deadline; name != "" {
		if v, there := s.req.Field(name); there {
			var n int64
			n, ok = digits(v)
			d = time.Duration(min(n, int64(maxDeadline/time.Millisecond))) * time.Millisecond
		}
	}
	if ok {
		s.until = s.began.Add(min(d, maxDeadline))
	}
}

// grpcTimeout reads digits and a unit.
func grpcTimeout(v []byte) (time.Duration, bool) {
	if len(v) < 2 || len(v) > 9 {
		return 0, false
	}
	unit := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': 1}[v[len(v)-1]]
	n, ok := digits(v[:len(v)-1])
	if !ok || unit == 0 {
		return 0, false
	}
	return time.Duration(min(n, int64(maxDeadline/unit))) * unit, true
}

func digits(v []byte) (n int64, ok bool) {
	if len(v) == 0 || len(v) > 15 {
		return 0, false
	}
	for _, c := range v {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

// within is when something ends that may take d, or earlier as the client waits no
// longer.
func (s *session) within(now time.Time, d time.Duration) time.Time {
	t := now.Add(d)
	if !s.until.IsZero() && s.until.Before(t) {
		return s.until
	}
	return t
}

// expired says whether the client waits no longer.
func (s *session) expired() bool { return !s.until.IsZero() && !time.Now().Before(s.until) }

// givenUp says that the client's own time is over, and not what the route gives one
// try: that tells nothing of the server. A server is told whole milliseconds, and may
// give up that much earlier.
func (s *session) givenUp(a *action) bool {
	if s.until.IsZero() || time.Until(s.until) > time.Millisecond {
		return false
	}
	most := s.tryTime(a)
	if s.grpc || s.upload != nil {
		most = max(most, s.streamTime())
	}
	return time.Since(s.cache.asked) < most
}

// tryTime is how long one try may take.
func (s *session) tryTime(a *action) time.Duration {
	if r := a.route.Retries; r != nil && r.PerTry > 0 {
		return min(time.Duration(r.PerTry), time.Duration(a.route.Timeout))
	}
	return time.Duration(a.route.Timeout)
}

// another says whether there is time for another try after one that took too long.
func (s *session) another(a *action) bool {
	r := a.route.Retries
	if r == nil || r.PerTry == 0 {
		return false
	}
	now := time.Now()
	return now.Before(s.began.Add(time.Duration(a.route.Timeout))) && (s.until.IsZero() || now.Before(s.until))
}

// tells says whether a field tells the deadline, which is told anew.
func (s *session) tells(a *action, f *http1.Field) bool {
	is := func(name string) bool { return len(f.Name) == len(name) && hyphenated(f.Name, name) }
	return !s.until.IsZero() && (is("grpc-timeout") || a.route.Deadline != "" && is(a.route.Deadline))
}

// appendDeadline says how long the client still waits.
func (s *session) appendDeadline(b []byte, a *action) []byte {
	if s.until.IsZero() {
		return b
	}
	if s.grpc {
		return appendTimeout(append(b, "Grpc-Timeout: "...), time.Until(s.until))
	}
	left := max(time.Until(s.until)/time.Millisecond, 1)
	b = append(append(b, a.route.Deadline...), ": "...)
	return append(strconv.AppendInt(b, int64(left), 10), "\r\n"...)
}

// appendTimeout writes a time as gRPC does, never less than it is: a server that gave
// up before its client would look as if it had failed.
func appendTimeout(b []byte, left time.Duration) []byte {
	const most = 99_999_999
	unit, name := time.Microsecond, "u\r\n"
	if left > most*unit {
		unit, name = time.Millisecond, "m\r\n"
	}
	n := min((max(left, 1)+unit-1)/unit, most)
	return append(strconv.AppendInt(b, int64(n), 10), name...)
}
