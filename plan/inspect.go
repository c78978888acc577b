package plan

// Inspect says that the requests to a service are looked at, where they arrive,
// and at which scores something is done: a score is a sum of named findings, and
// 0 is never. The hardest action whose score is reached is done. Without
// any, what is normal is learnt, and nothing done.
type Inspect struct {
	// Observe leaves an event.
	Observe int `json:"observe,omitempty"`
	// Shed refuses the caller's requests for RetryAfter.
	Shed int `json:"shed,omitempty"`
	// Challenge sheds, and closes the connections under the caller's, so that it
	// proves its identity anew.
	Challenge int `json:"challenge,omitempty"`
	// Cut ends all of the caller's connections to the service.
	Cut int `json:"cut,omitempty"`
	// Incident cuts, and has the container that called contained.
	Incident int `json:"incident,omitempty"`

	// RetryAfter is how long a caller is refused; 0 is ten seconds.
	RetryAfter Duration `json:"retryAfter,omitzero"`
	// Learn is after how many requests of a route what it has not seen before is
	// a finding; 0 is 1000.
	Learn int `json:"learn,omitempty"`
	// Frozen stops learning: all that is not known is a finding.
	Frozen bool `json:"frozen,omitempty"`
	// Body is how many bytes at the beginning of a body are looked at; 0 is 4096,
	// -1 none.
	Body int `json:"body,omitempty"`
	// Mirror is where a copy of all that callers send goes: "unix:/path" or
	// "tcp:host:port", as docs/inspect.md says.
	Mirror string `json:"mirror,omitempty"`
}
