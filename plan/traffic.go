package plan

import (
	"fmt"
	"time"
)

// Traffic says how calls to a service are spread and bounded, where they start.
// What is absent or zero is as the proxy does by itself.
type Traffic struct {
	// Balancer: "least-request", "round-robin", "random", "peak-ewma", "maglev" or
	// "ring-hash"; the last two keep a calling instance at one endpoint.
	Balancer string `json:"balancer,omitempty"`
	// Near: "equal" (the endpoint on the caller's node among equally busy ones),
	// "first" or "ignore".
	Near      string   `json:"near,omitempty"`
	SlowStart Duration `json:"slowStart,omitzero"`
	Outlier   *Outlier `json:"outlier,omitempty"`
	Breaker   *Breaker `json:"breaker,omitempty"`
	Retry     *Retry   `json:"retry,omitempty"`
	// Timeout to reach an endpoint, all tries together.
	Timeout Duration `json:"timeout,omitzero"`
}

// Outlier says when an endpoint that fails is left out for a while.
type Outlier struct {
	// Off leaves nobody out.
	Off bool `json:"off,omitempty"`
	// Unreachable is how often in a row it could not be reached.
	Unreachable uint32 `json:"unreachable,omitempty"`
	// Ejection is how long it is left out the first time; it grows to MaxEjection.
	Ejection    Duration `json:"ejection,omitzero"`
	MaxEjection Duration `json:"maxEjection,omitzero"`
	// MaxEjected is the share of endpoints, in per cent, left out at once.
	MaxEjected uint32 `json:"maxEjected,omitempty"`
}

// Breaker bounds what one node has open at once; 0 is no bound.
type Breaker struct {
	Connections         int64 `json:"connections,omitempty"`         // to the service
	EndpointConnections int64 `json:"endpointConnections,omitempty"` // to each endpoint
	Retries             int64 `json:"retries,omitempty"`
}

// Retry says how often another endpoint is tried, before a byte was sent.
type Retry struct {
	Tries  int      `json:"tries,omitempty"` // with the first
	PerTry Duration `json:"perTry,omitzero"`
	// Percent of the open connections that may be tried again at once, and a
	// Floor of that.
	Percent uint32 `json:"percent,omitempty"`
	Floor   int64  `json:"floor,omitempty"`
}

// Duration is written as in "1.5s".
type Duration time.Duration

// MarshalText writes the duration.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads a duration that is not negative.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("duration %.32q: want one such as \"1.5s\"", text)
	}
	if v < 0 {
		return fmt.Errorf("duration %q is negative", v)
	}
	*d = Duration(v)
	return nil
}
