package plan

import (
	"net/netip"
	"time"
)

// Proxy is what a proxy that stands alone, outside any sandbox, should do.
// Like a Mesh it is whole, and it names keys and never holds one.
type Proxy struct {
	Listeners []Listener `json:"listeners"`
	Clusters  []Cluster  `json:"clusters"`
}

// Listener is one address that the proxy listens on.
type Listener struct {
	Name    string         `json:"name"`
	Address netip.AddrPort `json:"address"`
	// Chains say what becomes of a connection. One that lists the server name
	// which the client asks for goes before one that lists none.
	Chains []Chain `json:"chains"`
}

// Chain is what becomes of a connection. Either HTTP or TCP is set.
type Chain struct {
	// ServerNames of TLS, as "a.example" or "*.example"; none fits any name.
	ServerNames []string   `json:"serverNames,omitempty"`
	TLS         *ServerTLS `json:"tls,omitempty"` // nil leaves bytes as they are
	HTTP        *HTTP      `json:"http,omitempty"`
	TCP         *TCP       `json:"tcp,omitempty"`
}

// ServerTLS ends TLS of clients.
type ServerTLS struct {
	// Certificates are names of secrets: a chain and its key each.
	Certificates []string `json:"certificates"`
	// Clients is the name of the secret whose authorities clients prove
	// themselves to; a client without such a certificate is refused.
	Clients string   `json:"clients,omitempty"`
	ALPN    []string `json:"alpn,omitempty"`
}

// HTTP serves requests.
type HTTP struct {
	// Codec is "http1" or "http2"; "" takes either, as the client begins.
	Codec string `json:"codec,omitempty"`
	Hosts []Host `json:"hosts"`
}

// TCP carries the bytes of a connection.
type TCP struct {
	To []Weighted `json:"to"`
}

// Host is a virtual host.
type Host struct {
	Name string `json:"name"`
	// Domains as "a.example", "*.example", "a.*" or "*"; the longest that
	// fits wins, and an exact one wins over any other.
	Domains []string `json:"domains"`
	// Routes in order: the first that matches is taken.
	Routes []Route `json:"routes"`
}

// Route is what becomes of a request that matches. Exactly one of To,
// Redirect and Reply is set.
type Route struct {
	Name     string     `json:"name,omitempty"`
	Match    Match      `json:"match"`
	To       []Weighted `json:"to,omitempty"`
	Redirect *Redirect  `json:"redirect,omitempty"`
	Reply    *Reply     `json:"reply,omitempty"`

	// Timeout of the whole answer; 0 is none.
	Timeout time.Duration `json:"timeout,omitempty"`
	// PrefixRewrite replaces what Match.Prefix or Match.Path matched.
	PrefixRewrite string `json:"prefixRewrite,omitempty"`
	// HostRewrite replaces the name of the host.
	HostRewrite string      `json:"hostRewrite,omitempty"`
	Retry       *RouteRetry `json:"retry,omitempty"`
	// Hedge has what takes Retry.PerTry asked again while it is waited for on.
	Hedge bool `json:"hedge,omitempty"`
	// Request and Reply headers are changed before they go on.
	RequestHeaders  []HeaderEdit `json:"requestHeaders,omitempty"`
	ResponseHeaders []HeaderEdit `json:"responseHeaders,omitempty"`
}

// Match of a request: every present part must hold. Exactly one of Prefix,
// Segments, Path and Regex is set.
type Match struct {
	Prefix   string       `json:"prefix,omitempty"`
	Segments string       `json:"segments,omitempty"` // a prefix that ends where a segment does
	Path     string       `json:"path,omitempty"`
	Regex    string       `json:"regex,omitempty"` // RE2, of the whole path
	Headers  []ValueMatch `json:"headers,omitempty"`
	Query    []ValueMatch `json:"query,omitempty"`
	GRPC     bool         `json:"grpc,omitempty"`
}

// ValueMatch is a condition on a header or a parameter of the query.
type ValueMatch struct {
	Name string `json:"name"`
	// Is how Value is compared: "exact", "prefix", "suffix", "contains",
	// "regex" (RE2, of the whole value), or "present" and "absent".
	Is     string `json:"is"`
	Value  string `json:"value,omitempty"`
	Invert bool   `json:"invert,omitempty"`
}

// Weighted is a cluster and its share.
type Weighted struct {
	Cluster string `json:"cluster"`
	Weight  uint32 `json:"weight"`
}

// Redirect answers with another place. What is empty stays as it was.
type Redirect struct {
	Status     int    `json:"status"`
	Scheme     string `json:"scheme,omitempty"`
	Host       string `json:"host,omitempty"`
	Port       uint16 `json:"port,omitempty"`
	Path       string `json:"path,omitempty"`
	Prefix     string `json:"prefix,omitempty"` // in place of what matched
	StripQuery bool   `json:"stripQuery,omitempty"`
}

// Reply answers at once.
type Reply struct {
	Status int    `json:"status"`
	Body   string `json:"body,omitempty"`
}

// RouteRetry of a request that failed.
type RouteRetry struct {
	// On lists what is tried again, in Envoy's words ("5xx",
	// "connect-failure", "unavailable", ...).
	On       []string      `json:"on"`
	Attempts uint32        `json:"attempts"` // beside the first
	PerTry   time.Duration `json:"perTry,omitempty"`
}

// HeaderEdit changes one header.
type HeaderEdit struct {
	Name  string `json:"name"`
	Value string `json:"value,omitempty"`
	// Act is "append", "set", "add" (if absent) or "remove".
	Act string `json:"act"`
}

// Cluster is what requests and connections go to.
type Cluster struct {
	Name string `json:"name"`
	// Balance is "round_robin", "least_request", "random", "ring_hash" or
	// "maglev".
	Balance        string        `json:"balance"`
	ConnectTimeout time.Duration `json:"connectTimeout"`
	HTTP2          bool          `json:"http2,omitempty"`
	TLS            *ClientTLS    `json:"tls,omitempty"`
	Limits         Limits        `json:"limits"`
	Upstreams      []Upstream    `json:"upstreams"`
}

// ClientTLS proves to upstreams who calls, and asks who answers.
type ClientTLS struct {
	// Certificate is the name of the secret shown, or "".
	Certificate string `json:"certificate,omitempty"`
	// Authorities is the name of the secret upstreams are verified by.
	Authorities string `json:"authorities"`
	// Names of which the upstream must prove one: DNS names or URIs. None
	// means the server name.
	Names      []string `json:"names,omitempty"`
	ServerName string   `json:"serverName,omitempty"`
	ALPN       []string `json:"alpn,omitempty"`
}

// Limits of a cluster. What is above is refused, not queued.
type Limits struct {
	Connections uint32 `json:"connections"`
	Pending     uint32 `json:"pending"`
	Requests    uint32 `json:"requests"`
	Retries     uint32 `json:"retries"`
}

// Upstream is one endpoint of a cluster.
type Upstream struct {
	Address  netip.AddrPort `json:"address"`
	Weight   uint32         `json:"weight"`   // at least 1
	Priority uint32         `json:"priority"` // 0 is tried first
	Zone     string         `json:"zone,omitempty"`
	// Health is "healthy", "draining" (no new work) or "unhealthy".
	Health string `json:"health"`
}
