package alone

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/proxyproto"
	"hauberk.dev/mesh/ratelimit"
	"hauberk.dev/mesh/route"
)

// RateService counts for several proxies: a server of Envoy's rate limit API.
type RateService struct {
	Upstream   string   `yaml:"upstream"` // of protocol grpc
	Domain     string   `yaml:"domain"`
	Timeout    Duration `yaml:"timeout"`
	Unanswered string   `yaml:"unanswered"` // allow or deny what it gives no answer to
}

// Entry is one part of what is counted together: a template, or the value of a
// header field.
type Entry struct {
	Key    string `yaml:"key"`
	Value  string `yaml:"value"`
	Header string `yaml:"header"`
}

const (
	defaultRateTimeout = 20 * time.Millisecond // as Envoy's
	maxDescriptors     = 16
	maxEntries         = 16
	maxEntryValue      = 512 // bytes; what is longer is counted by its beginning
)

func (r *reading) rateService(c *Config, upstreams map[string]bool) {
	s := c.RateService
	if s == nil {
		return
	}
	r.known("rate_service.upstream", s.Upstream, upstreams)
	for _, u := range c.Upstreams {
		if u.Name == s.Upstream && u.Protocol != "grpc" {
			r.fault("rate_service.upstream", "%q speaks %s; write protocol: grpc", u.Name, u.Protocol)
		}
	}
	if s.Domain == "" {
		r.fault("rate_service.domain", "is missing; it names these limits to the service")
	}
	if s.Unanswered != "allow" && s.Unanswered != "deny" {
		r.fault("rate_service.unanswered", "%q is not known; write allow or deny: what to do with requests that the service gives no answer to", s.Unanswered)
	}
}

func (r *reading) globalRate(at string, x *Route, groups int, service bool) {
	if len(x.GlobalRate) == 0 {
		return
	}
	if !service {
		r.fault(at+".global_rate", "nobody counts; declare rate_service")
	}
	if len(x.GlobalRate) > maxDescriptors {
		r.fault(at+".global_rate", "%d descriptors; at most %d", len(x.GlobalRate), maxDescriptors)
	}
	for i, d := range x.GlobalRate {
		field := fmt.Sprintf("%s.global_rate[%d]", at, i)
		if len(d) == 0 || len(d) > maxEntries {
			r.fault(field, "%d entries; use 1 to %d", len(d), maxEntries)
		}
		for j, e := range d {
			field := fmt.Sprintf("%s[%d]", field, j)
			if e.Key == "" {
				r.fault(field+".key", "is missing")
			}
			if (e.Value == "") == (e.Header == "") {
				r.fault(field, "use one of value and header")
			}
			r.template(field+".value", e.Value, groups)
			if e.Header != "" && http1.CheckField(e.Header, "") != nil {
				r.fault(field+".header", "%q is no field name", e.Header)
			}
		}
	}
}

// counted is a part of a descriptor, compiled.
type counted struct {
	key, header string
	value       *route.Template
}

func compileGlobal(all [][]Entry) (out [][]counted, err error) {
	for _, d := range all {
		var parts []counted
		for _, e := range d {
			c := counted{key: e.Key, header: e.Header}
			if e.Header == "" {
				if c.value, err = route.ParseTemplate(e.Value); err != nil {
					return nil, err
				}
			}
			parts = append(parts, c)
		}
		out = append(out, parts)
	}
	return out, nil
}

// descriptors are what the request counts to. One that names a field the request
// does not have is left out.
func (s *session) descriptors(a *action) (out [][]ratelimit.Entry) {
	for _, d := range a.global {
		entries := make([]ratelimit.Entry, 0, len(d))
		for i := range d {
			var value []byte
			if d[i].header == "" {
				value = d[i].value.Append(nil, &s.route)
			} else if value, _ = s.req.Field(d[i].header); len(value) == 0 {
				break
			}
			text := strings.ToValidUTF8(string(value[:min(len(value), maxEntryValue)]), "\uFFFD") // protobuf takes no other
			entries = append(entries, ratelimit.Entry{Key: d[i].key, Value: text})
		}
		if len(entries) == len(d) {
			out = append(out, entries)
		}
	}
	return out
}

// withinGlobal asks the rate service whether the request may be. It answers those
// that may not.
func (s *session) withinGlobal(a *action) bool {
	of := s.descriptors(a)
	if len(of) == 0 {
		return true
	}
	service := s.world.config.RateService
	answer, err := s.world.askRate(s.header(), ratelimit.AppendRequest(nil, service.Domain, of))
	switch {
	case err != nil:
		s.p.stats.unjudged.Add(1)
		s.p.log.Debug("no answer of the rate service", "err", err)
		if service.Unanswered == "allow" {
			return true
		}
		return s.refuse(503, "the rate service gives no answer: "+err.Error(), "is it up? unanswered: allow would let requests pass")
	case answer.Over:
		a.stats.limited.Add(1)
		s.overRate(&answer)
		return false
	}
	return true
}

// askRate asks one endpoint of the rate service, and another if that was not
// reached.
func (w *world) askRate(h proxyproto.Header, question []byte) (answer ratelimit.Answer, err error) {
	up := w.upstreams[w.config.RateService.Upstream]
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(w.config.RateService.Timeout))
	defer cancel()
	var tried []*balance.Host
	for len(tried) < maxAttempts {
		at, perr := up.pick(0, tried)
		if perr != nil {
			return answer, errors.Join(err, perr)
		}
		var srv *server
		if srv, err = up.connect(ctx, at.e, h, false); err != nil {
			at.Done(up.clock.Now(), balance.Unreachable)
			if tried = append(tried, at.Host()); ctx.Err() != nil {
				break
			}
			continue
		}
		began := time.Now()
		at.e.requests.Add(1)
		answer, err = srv.shouldRateLimit(ctx, question)
		outcome := balance.Success
		if err != nil {
			at.e.failures.Add(1)
			if outcome = balance.Failure; ctx.Err() != nil {
				srv.two.late(began)
			}
		}
		srv.close()
		at.Done(up.clock.Now(), outcome)
		if err == nil || !notTaken(err) && !errors.Is(err, errConnection) {
			break
		}
		tried = append(tried, at.Host()) // asking twice counts twice at worst
	}
	return answer, err
}

// shouldRateLimit makes the one call of the service.
func (srv *server) shouldRateLimit(ctx context.Context, question []byte) (answer ratelimit.Answer, err error) {
	head := append([]byte("POST "+ratelimit.Path+" HTTP/1.1\r\nHost: "), srv.e.address...)
	head = append(head, "\r\nContent-Type: application/grpc\r\nTE: trailers\r\nUser-Agent: hauberk-mesh\r\n"...)
	said, err := srv.unary(ctx, head, append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(question))), question...))
	if err != nil {
		return answer, err
	}
	return ratelimit.Parse(said)
}

// overRate answers a request that is over the limit.
func (s *session) overRate(a *ratelimit.Answer) {
	s.why = "global rate limit"
	wait := max(int(a.Reset/time.Second), 1)
	if s.grpc {
		s.refuseGRPC(429, "the rate is used up", "wait "+strconv.Itoa(wait)+"s")
		return
	}
	body := `{"error":"Too Many Requests","reason":"the rate that several proxies count is used up","hint":"wait as Retry-After says"}` + "\n"
	b := s.own(s.begin(429), "Content-Type", "application/json")
	b = s.own(b, "Retry-After", strconv.Itoa(wait))
	if a.Known {
		b = s.own(b, "X-RateLimit-Limit", strconv.FormatUint(uint64(a.Limit), 10))
		b = s.own(b, "X-RateLimit-Remaining", strconv.FormatUint(uint64(a.Remaining), 10))
		b = s.own(b, "X-RateLimit-Reset", strconv.Itoa(int(a.Reset/time.Second)))
	}
	for _, h := range a.Headers {
		owned := slices.ContainsFunc(append([]string{"Content-Type", "Date", "Retry-After"}, framed...), func(f string) bool { return strings.EqualFold(f, h.Key) })
		if http1.CheckField(h.Key, h.Value) == nil && !owned {
			b = s.own(b, h.Key, h.Value)
		}
	}
	b = s.finish(b, int64(len(body)))
	if s.out.kept(b) == nil && string(s.req.Method) != "HEAD" {
		s.out.write([]byte(body))
	}
}
