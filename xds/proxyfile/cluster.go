package proxyfile

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"hauberk.dev/plan"
)

// maxWeight of an endpoint, as the proxy has it.
const maxWeight = 1000

type upstream struct {
	Name           string     `json:"name"`
	Endpoints      []endpoint `json:"endpoints"`
	Protocol       string     `json:"protocol,omitempty"`
	Balance        string     `json:"balance,omitempty"`
	ConnectTimeout string     `json:"connect_timeout,omitempty"`
	Connections    uint32     `json:"connections,omitempty"`
	Requests       uint32     `json:"requests,omitempty"`
	TLS            *clientTLS `json:"tls,omitempty"`
}

type endpoint struct {
	Address  string `json:"address"`
	Weight   uint32 `json:"weight,omitempty"`
	Priority uint32 `json:"priority,omitempty"`
}

type clientTLS struct {
	Name        string       `json:"name,omitempty"`
	CA          string       `json:"ca,omitempty"`
	Authorities string       `json:"authorities,omitempty"`
	Names       []string     `json:"names,omitempty"`
	Certificate *certificate `json:"certificate,omitempty"`
}

var balancers = map[string]string{"round_robin": "round-robin", "least_request": "least-request", "random": "random"}

func (w *Writer) upstream(c *plan.Cluster) (out upstream, err error) {
	l := c.Limits
	switch {
	case balancers[c.Balance] == "":
		return out, fmt.Errorf("lb_policy: %q: held are ROUND_ROBIN, LEAST_REQUEST and RANDOM", c.Balance)
	case l.Connections == 0 || l.Requests == 0 || l.Pending == 0 || l.Retries == 0:
		return out, errors.New("circuit_breakers: 0: a cluster that nobody may use is not held")
	}
	out = upstream{
		Name: c.Name, Balance: balancers[c.Balance], ConnectTimeout: duration(c.ConnectTimeout),
		Connections: l.Connections, Requests: l.Requests, Endpoints: endpoints(c.Upstreams),
	}
	if c.HTTP2 {
		out.Protocol = "http2"
	}
	if t := c.TLS; t != nil && len(t.ALPN) > 0 && slices.Contains(t.ALPN, "h2") != c.HTTP2 {
		return out, fmt.Errorf("alpn_protocols: %q: offered is what http2_protocol_options say", t.ALPN)
	}
	out.TLS, err = w.clientTLS(c.TLS)
	return out, err
}

// endpoints are those that are healthy. Weights keep their ratio in the smaller
// range that the proxy has.
func endpoints(all []plan.Upstream) []endpoint {
	out := []endpoint{}
	most := uint32(1)
	for _, u := range all {
		most = max(most, u.Weight)
	}
	for _, u := range all {
		if u.Health != "healthy" {
			continue
		}
		weight := u.Weight
		if most > maxWeight {
			weight = max(1, uint32((uint64(weight)*maxWeight+uint64(most)/2)/uint64(most)))
		}
		out = append(out, endpoint{Address: u.Address.String(), Weight: weight, Priority: u.Priority})
	}
	return out
}

func (w *Writer) clientTLS(t *plan.ClientTLS) (*clientTLS, error) {
	if t == nil {
		return nil, nil
	}
	ca, given, err := w.authorities(t.Authorities)
	if err != nil {
		return nil, err
	}
	out := &clientTLS{Name: t.ServerName, CA: ca, Authorities: given, Names: t.Names}
	for _, name := range t.Names {
		if strings.Contains(name, "*") { // which the proxy takes for any
			return nil, fmt.Errorf("match_typed_subject_alt_names: %q: no name that one server has", name)
		}
	}
	if t.Certificate != "" {
		c, err := w.certificate(t.Certificate)
		if err != nil {
			return nil, err
		}
		out.Certificate = &c
	}
	return out, nil
}

// forever is longer than any request.
const forever = 365 * 24 * time.Hour

// duration of a plan, in which 0 is no bound.
func duration(d time.Duration) string {
	if d == 0 {
		d = forever
	}
	return d.String()
}
