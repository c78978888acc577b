package plan

// Observe is what a proxy notes of requests where they arrive.
type Observe struct {
	// Traces are carried on; without this, what a request says of its trace
	// passes as it is.
	Traces *Traces `json:"traces,omitempty"`
	// Log has a line for each request; none is no log.
	Log string `json:"log,omitempty"` // text or json
	// LogCollector is told of each request too, or instead.
	LogCollector *Collector `json:"logCollector,omitempty"`
}

// Collector takes OTLP over HTTP.
type Collector struct {
	Address string `json:"address"` // host:port
	// Authorities have signed its certificate, in PEM; without them it is spoken to in
	// the clear.
	Authorities string `json:"authorities,omitempty"`
}

// Traces are how requests are followed from hop to hop.
type Traces struct {
	// Collector takes spans by OTLP over HTTP, at host:port; none is told nothing.
	Collector string `json:"collector,omitempty"`
	// PerMille of the traces that begin here are sampled. Others are as who began
	// them says.
	PerMille int `json:"perMille"`
}
