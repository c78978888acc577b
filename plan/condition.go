package plan

import "hauberk.dev/internal/condition"

// Header is a condition on a field of a request. A field that is there more
// than once matches if one of its values does.
type Header struct {
	Name string `json:"name"` // lower-case
	// Exact is the value, or Prefix its beginning; without either the field must
	// be there, with Absent it must not.
	Exact  *string `json:"exact,omitempty"`
	Prefix string  `json:"prefix,omitempty"`
	Absent bool    `json:"absent,omitempty"`
}

// Token is a condition on the JSON Web Token of a request: it must be good, of
// one of the issuers, and each claim must hold.
type Token struct {
	Issuers []string `json:"issuers"` // names of Issuers of the service
	Claims  []Claim  `json:"claims,omitempty"`
}

// Claim is one of a token. A claim that is a list holds if one of its elements
// does. Numbers and booleans are compared as JSON writes them.
type Claim struct {
	Name  string   `json:"name"`
	OneOf []string `json:"oneOf"`
}

// Issuer is whose tokens are believed, and by which keys.
type Issuer struct {
	Name      string   `json:"name"` // by which rules mean it
	Issuer    string   `json:"issuer"`
	Audiences []string `json:"audiences"` // a token must be for one of them
	// Keys is a JSON Web Key Set; or File is the path of one that the proxy
	// reads, and reads again when it has changed.
	Keys string `json:"keys,omitempty"`
	File string `json:"file,omitempty"`
	// Header holds the token; none is authorization, after "Bearer".
	Header string `json:"header,omitempty"`
	Skew   int    `json:"skew,omitempty"` // seconds that clocks may differ by
}

// Trial is a policy that is tried out: what it alone would refuse, of what is
// allowed, is told and not refused.
type Trial struct {
	Name  string `json:"name"`
	Allow []Rule `json:"allow,omitempty"`
	Deny  []Rule `json:"deny,omitempty"`
	// Callbacks as those of a Service.
	Callbacks []Rule `json:"callbacks,omitempty"`
	// Faulty says that rules of Allow are left out, for they make no sense: they
	// would allow nothing.
	Faulty bool `json:"faulty,omitempty"`
	// FaultyCallbacks says the same of Callbacks.
	FaultyCallbacks bool `json:"faultyCallbacks,omitempty"`
}

// Expr is a condition in CEL that has been parsed and checked: what is left is
// to be evaluated.
type Expr = condition.Expr
