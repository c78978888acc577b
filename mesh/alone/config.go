package alone

import (
	"net/netip"
	"regexp"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/route"
)

// Config is what proxy.yaml says. Load reads and checks it; it never changes
// after.
type Config struct {
	Version int    `yaml:"version"`
	Admin   string `yaml:"admin"` // Unix socket
	// Identities is the Unix socket at which hauberk-xds hands over certificates
	// and authorities that are in no file.
	Identities string     `yaml:"identities"`
	AccessLog  AccessLog  `yaml:"access_log"`
	Limits     Limits     `yaml:"limits"`
	Listeners  []Listener `yaml:"listeners"`
	Hosts      []Host     `yaml:"hosts"`
	Upstreams  []Upstream `yaml:"upstreams"`

	Traces      *Traces      `yaml:"traces"`
	RateService *RateService `yaml:"rate_service"`
	Cache       CacheMemory  `yaml:"cache"`

	dir string // that paths are relative to
	sum string // SHA-256 of the text

	told []byte // the text, if it came over the admin socket
}

// AccessLog is where requests are noted, and how.
type AccessLog struct {
	Path   string `yaml:"path"`   // "" none, "-" the standard output
	Format string `yaml:"format"` // text, json

	Collector *Collector `yaml:"collector"` // beside or in place of path
}

// Limits hold for everything the proxy serves.
type Limits struct {
	Connections   int      `yaml:"connections"`
	Head          Size     `yaml:"head"`
	Body          Size     `yaml:"body"`
	HeadTimeout   Duration `yaml:"head_timeout"`
	IdleTimeout   Duration `yaml:"idle_timeout"`
	StreamTimeout Duration `yaml:"stream_timeout"`
	StopTimeout   Duration `yaml:"stop_timeout"`
	DrainTimeout  Duration `yaml:"drain_timeout"` // when another process has taken over
}

// Listener is an address the proxy serves.
type Listener struct {
	Name          string      `yaml:"name"`
	Address       string      `yaml:"address"`
	Protocol      string      `yaml:"protocol"` // http, tcp, udp, sni, bolt, dubbo
	HTTP2         string      `yaml:"http2"`    // on, off, only
	TLS           *ServerTLS  `yaml:"tls"`
	ProxyProtocol []string    `yaml:"proxy_protocol_from"` // networks
	Connections   int         `yaml:"connections"`
	Upstream      string      `yaml:"upstream"` // tcp, udp
	Names         []NameRoute `yaml:"names"`    // sni
	Calls         []Call      `yaml:"calls"`    // bolt, dubbo

	// Of UDP.
	Idle      Duration `yaml:"idle"`      // without a datagram either way a session ends
	Sessions  int      `yaml:"sessions"`  // at once
	Responses int      `yaml:"responses"` // to each datagram, after which its session ends; 0 is any number

	from []netip.Prefix
}

// ServerTLS ends TLS at a listener.
type ServerTLS struct {
	Certificates []Certificate `yaml:"certificates"`
	MinVersion   string        `yaml:"min_version"` // 1.2, 1.3
	Clients      *Clients      `yaml:"clients"`     // must show a certificate
}

// Certificate is a chain and its key, in files that are read again when they
// change; or the name of one that is handed over.
type Certificate struct {
	Chain    string `yaml:"chain"`
	Key      string `yaml:"key"`
	Identity string `yaml:"identity"` // a SPIFFE id, a hint, a secret's name, or default
}

// NameRoute says where a TLS connection that asks for one of these names goes.
type NameRoute struct {
	Names    []string `yaml:"names"`
	Upstream string   `yaml:"upstream"`
}

// Host is a virtual host.
type Host struct {
	Names     []string `yaml:"names"`
	Listeners []string `yaml:"listeners"` // none: all that speak http
	Paths     string   `yaml:"paths"`     // strict, loose
	Routes    []Route  `yaml:"routes"`
}

// Route is what is demanded of a request and what then happens. The first of a
// host that matches decides.
type Route struct {
	Name    string   `yaml:"name"`
	Path    string   `yaml:"path"`
	Prefix  string   `yaml:"prefix"`
	Regex   string   `yaml:"regex"`
	Methods []string `yaml:"methods"`
	Headers []Value  `yaml:"headers"`
	Query   []Value  `yaml:"query"`

	Upstream string    `yaml:"upstream"`
	Split    []Share   `yaml:"split"`
	Redirect *Redirect `yaml:"redirect"`
	Respond  *Respond  `yaml:"respond"`
	Static   *Static   `yaml:"static"`

	Rewrite         string     `yaml:"rewrite"`
	Host            string     `yaml:"host"` // sent to the upstream
	RequestHeaders  Edit       `yaml:"request_headers"`
	ResponseHeaders Edit       `yaml:"response_headers"`
	Transcode       *Transcode `yaml:"transcode"`
	Mirror          *Mirror    `yaml:"mirror"`
	Timeout         Duration   `yaml:"timeout"`
	Retries         *Retries   `yaml:"retries"`
	Hedge           *Hedge     `yaml:"hedge"`
	Gzip            *Gzip      `yaml:"gzip"`
	Rate            *Rate      `yaml:"rate"`
	GlobalRate      [][]Entry  `yaml:"global_rate"` // what the request counts to, in the words of rate_service
	Body            Size       `yaml:"body"`
	Hash            string     `yaml:"hash"`
	Cache           *Caching   `yaml:"cache"`
	Deadline        string     `yaml:"deadline"` // field that says for how many milliseconds the client waits

	match route.Match
}

// Value is a condition on a header field or a query parameter.
type Value struct {
	Name  string  `yaml:"name"`
	Equal *string `yaml:"equal"`
	Regex string  `yaml:"regex"`
	Not   bool    `yaml:"not"` // must not hold; without equal and regex: must not be there
}

// Share is an upstream's part of a route.
type Share struct {
	Upstream string `yaml:"upstream"`
	Weight   int    `yaml:"weight"`
}

// Redirect answers with another address.
type Redirect struct {
	Status int    `yaml:"status"`
	To     string `yaml:"to"`
}

// Respond answers by itself.
type Respond struct {
	Status int    `yaml:"status"`
	Type   string `yaml:"type"`
	Body   string `yaml:"body"`
}

// Static serves files below a directory.
type Static struct {
	Root  string   `yaml:"root"`
	Index []string `yaml:"index"`
	Try   string   `yaml:"try"` // a file for what is not there
}

// Edit changes header fields. Values may be templates.
type Edit struct {
	Set    map[string]string `yaml:"set"`
	Add    map[string]string `yaml:"add"`
	Remove []string          `yaml:"remove"`
}

// Mirror sends copies of requests whose answers nobody waits for.
type Mirror struct {
	Upstream string `yaml:"upstream"`
	Percent  int    `yaml:"percent"`
}

// Retries of requests that were not sent, or that may be sent twice.
type Retries struct {
	Attempts int   `yaml:"attempts"` // in all
	Statuses []int `yaml:"statuses"` // of answers to idempotent requests

	PerTry Duration `yaml:"per_try"` // for one answer; what takes longer is tried again
}

// Gzip compresses answers.
type Gzip struct {
	Types []string `yaml:"types"`
	Min   Size     `yaml:"min"`
	Level int      `yaml:"level"`
}

// Rate is a token bucket.
type Rate struct {
	Requests int      `yaml:"requests"`
	Per      Duration `yaml:"per"`
	Burst    int      `yaml:"burst"`
	By       string   `yaml:"by"` // client, route
}

// Upstream is a set of servers.
type Upstream struct {
	Name           string     `yaml:"name"`
	Endpoints      []Endpoint `yaml:"endpoints"`
	Protocol       string     `yaml:"protocol"` // http, http2, grpc, bolt, dubbo
	Balance        string     `yaml:"balance"`
	ConnectTimeout Duration   `yaml:"connect_timeout"`
	Idle           int        `yaml:"idle"` // connections kept per endpoint
	Connections    int        `yaml:"connections"`
	Requests       int        `yaml:"requests"`       // under way at once; 0 is any number
	SlowStart      Duration   `yaml:"slow_start"`     // of an endpoint that is new
	ProxyProtocol  string     `yaml:"proxy_protocol"` // v1, v2
	TLS            *ClientTLS `yaml:"tls"`
	Check          *Check     `yaml:"check"`
	Outlier        *Outlier   `yaml:"outlier"`

	policy *balance.Policy
}

// Check asks endpoints for a sign of life: GET of a path, or a connection.
type Check struct {
	Path      string   `yaml:"path"`
	Host      string   `yaml:"host"`
	Service   string   `yaml:"service"` // of gRPC's health service, with protocol grpc
	Interval  Duration `yaml:"interval"`
	Timeout   Duration `yaml:"timeout"`
	Unhealthy int      `yaml:"unhealthy"` // checks in a row
	Healthy   int      `yaml:"healthy"`
}

// Outlier leaves out endpoints that fail, for a while.
type Outlier struct {
	Failures    int      `yaml:"failures"`    // answers of 500 and above in a row; 0 is any number
	Unreachable int      `yaml:"unreachable"` // times in a row
	Ejection    Duration `yaml:"ejection"`
	MaxEjected  int      `yaml:"max_ejected"` // per cent
}

// Endpoint is one server.
type Endpoint struct {
	Address  string `yaml:"address"`
	Weight   int    `yaml:"weight"`
	Priority int    `yaml:"priority"` // 0 is asked first, 1 when those are not enough
}

// ClientTLS is how an upstream is spoken to.
type ClientTLS struct {
	Name        string       `yaml:"name"`
	CA          string       `yaml:"ca"`
	Authorities string       `yaml:"authorities"` // in place of ca: what is handed over under this name
	Bundles     []string     `yaml:"bundles"`     // or trust domains: the server shows a SPIFFE id of one, and its bundle decides
	Names       []string     `yaml:"names"`       // of the server, in place of a host name: SPIFFE ids or DNS names, one may end in *
	Certificate *Certificate `yaml:"certificate"` // shown to the server
}

// Duration is written as in 30s or 5m.
type Duration time.Duration

// Size is written as in 512, 16KiB, 10MiB.
type Size int64

// Defaults.
const (
	defaultConnections    = 10000
	defaultHead           = 16 << 10
	defaultBody           = 8 << 20
	defaultHeadTimeout    = 10 * time.Second
	defaultIdleTimeout    = 75 * time.Second
	defaultStreamTimeout  = time.Hour
	defaultStopTimeout    = 30 * time.Second
	defaultDrainTimeout   = time.Minute
	defaultTimeout        = 60 * time.Second
	defaultConnectTimeout = 2 * time.Second
	defaultIdle           = 128
	defaultEjection       = 5 * time.Second
	defaultGzipMin        = 1 << 10
	defaultGzipLevel      = 5
	maxConfig             = 8 << 20
)

var defaultGzipTypes = []string{"text/html", "text/plain", "text/css", "text/xml", "application/json", "application/javascript",
	"text/javascript", "application/xml", "image/svg+xml"}

// def sets what the file leaves out.
func def[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func (c *Config) defaults() {
	def(&c.AccessLog.Format, "text")
	l := &c.Limits
	def(&l.Connections, defaultConnections)
	def(&l.Head, defaultHead)
	def(&l.Body, defaultBody)
	def(&l.HeadTimeout, Duration(defaultHeadTimeout))
	def(&l.IdleTimeout, Duration(defaultIdleTimeout))
	def(&l.StreamTimeout, Duration(defaultStreamTimeout))
	def(&l.StopTimeout, Duration(defaultStopTimeout))
	def(&l.DrainTimeout, Duration(defaultDrainTimeout))
	def(&c.Cache.Memory, defaultCache)
	if c.RateService != nil {
		def(&c.RateService.Timeout, Duration(defaultRateTimeout))
	}
	for i := range c.Listeners {
		def(&c.Listeners[i].Protocol, "http")
		if c.Listeners[i].Protocol == "udp" {
			def(&c.Listeners[i].Idle, Duration(defaultQuiet))
			def(&c.Listeners[i].Sessions, defaultSessions)
			continue
		}
		def(&c.Listeners[i].Connections, l.Connections)
		def(&c.Listeners[i].HTTP2, "on")
		for j := range c.Listeners[i].Calls {
			c.Listeners[i].Calls[j].defaults()
		}
		if t := c.Listeners[i].TLS; t != nil {
			def(&t.MinVersion, "1.2")
		}
	}
	for i := range c.Hosts {
		def(&c.Hosts[i].Paths, "strict")
		for j := range c.Hosts[i].Routes {
			c.Hosts[i].Routes[j].defaults(l.Body)
		}
	}
	for i := range c.Upstreams {
		u := &c.Upstreams[i]
		def(&u.Protocol, "http")
		def(&u.Balance, string(balance.LeastRequest))
		if u.Outlier == nil {
			u.Outlier = &Outlier{}
		}
		def(&u.Outlier.Unreachable, 1)
		def(&u.Outlier.Ejection, Duration(defaultEjection))
		def(&u.Outlier.MaxEjected, 100)
		def(&u.ConnectTimeout, Duration(defaultConnectTimeout))
		def(&u.Idle, defaultIdle)
		for j := range u.Endpoints {
			def(&u.Endpoints[j].Weight, 1)
		}
	}
}

func (r *Route) defaults(body Size) {
	def(&r.Timeout, Duration(defaultTimeout))
	def(&r.Body, body)
	if r.Redirect != nil {
		def(&r.Redirect.Status, 308)
	}
	if r.Respond != nil {
		def(&r.Respond.Type, "text/plain; charset=utf-8")
	}
	if r.Static != nil && r.Static.Index == nil {
		r.Static.Index = []string{"index.html"}
	}
	if r.Mirror != nil {
		def(&r.Mirror.Percent, 100)
	}
	if g := r.Gzip; g != nil {
		if g.Types == nil {
			g.Types = defaultGzipTypes
		}
		def(&g.Min, defaultGzipMin)
		def(&g.Level, defaultGzipLevel)
	}
	if r.Rate != nil {
		r.Rate.defaults()
	}
	if r.Cache != nil {
		def(&r.Cache.Largest, defaultLargest)
	}
}

func (r *Rate) defaults() {
	def(&r.Per, Duration(time.Second))
	def(&r.Burst, r.Requests)
	def(&r.By, "client")
}

// values compiles conditions; Check has seen that they compile.
func values(vs []Value) (out []route.Value) {
	for _, v := range vs {
		c := route.Value{Name: v.Name, Equal: v.Equal, Not: v.Not}
		if v.Regex != "" {
			c.Pattern = regexp.MustCompile(v.Regex)
		}
		out = append(out, c)
	}
	return out
}
