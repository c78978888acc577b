package alone

import (
	"fmt"
	"net/netip"
)

// datagrams notes what does not go with a listener of UDP, and what of UDP does not
// go with another. It says whether the listener is one.
func (r *reading) datagrams(at string, l *Listener, c *Config, upstreams map[string]bool) bool {
	if l.Protocol != "udp" {
		for _, x := range []struct {
			field string
			there bool
		}{{".idle", l.Idle != 0}, {".sessions", l.Sessions != 0}, {".responses", l.Responses != 0}} {
			if x.there {
				r.fault(at+x.field, "goes with protocol udp")
			}
		}
		return false
	}
	for _, x := range []struct {
		field, fix string
		there      bool
	}{
		{".tls", "datagrams are passed on as they are; end it behind the proxy", l.TLS != nil},
		{".http2", "goes with protocol http", l.HTTP2 != ""},
		{".proxy_protocol_from", "goes with listeners of connections", len(l.ProxyProtocol) > 0},
		{".connections", "goes with listeners of connections; use sessions", l.Connections != 0},
		{".names", "goes with protocol sni", len(l.Names) > 0},
		{".calls", "goes with protocol bolt or dubbo", len(l.Calls) > 0},
	} {
		if x.there {
			r.fault(at+x.field, "%s", x.fix)
		}
	}
	if l.Sessions < 1 || l.Sessions > mostSessions {
		r.fault(at+".sessions", "%d is out of range; use 1 to %d", l.Sessions, mostSessions)
	}
	if l.Responses < 0 {
		r.fault(at+".responses", "%d is out of range; use 1 for questions and answers, or leave it out for any number", l.Responses)
	}
	r.known(at+".upstream", l.Upstream, upstreams)
	r.speaks(at+".upstream", c, "http", l.Upstream)
	for i := range c.Upstreams {
		if c.Upstreams[i].Name == l.Upstream {
			r.datagramUpstream(fmt.Sprintf("upstreams[%d]", i), l, &c.Upstreams[i])
		}
	}
	return true
}

// datagramUpstream notes what cannot be done for datagrams.
func (r *reading) datagramUpstream(at string, l *Listener, u *Upstream) {
	if u.TLS != nil {
		r.fault(at+".tls", "listener %q passes datagrams on as they are; leave it out", l.Name)
	}
	if u.ProxyProtocol != "" {
		r.fault(at+".proxy_protocol", "listener %q is of protocol udp, which has no beginning to tell it at; leave it out", l.Name)
	}
	for j, e := range u.Endpoints {
		field := fmt.Sprintf("%s.endpoints[%d].address", at, j)
		if _, err := netip.ParseAddrPort(e.Address); err != nil {
			r.fault(field, "%q has no IP address, which listener %q of protocol udp needs; write for example 127.0.0.1:53", e.Address, l.Name)
		}
		if e.Address == l.Address {
			r.fault(field, "%q is listener %q itself; name the server behind it", e.Address, l.Name)
		}
	}
}
