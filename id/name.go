// Package id holds names, keys and certificates: who somebody is, in SPIFFE's
// words, and how to prove it.
//
// It reads strictly: a name has one spelling, a certificate carries exactly
// one name, a key file is its owner's alone. It issues nothing (room ca does)
// and trusts nobody by itself: every check takes the roots and the expected
// name from its caller.
package id

import (
	"fmt"
	"net/url"
	"strings"
)

// Kind of a name.
type Kind int

// The kinds. The zero Kind is that of the zero Name, which names nobody.
const (
	_            Kind = iota
	KindWorkload      // spiffe://<td>/ns/<namespace>/sa/<workload>
	KindNode          // spiffe://<td>/hauberk/node/<name>
	KindControl       // spiffe://<td>/hauberk/control
	KindIngress       // spiffe://<td>/hauberk/ingress
)

// maxName is SPIFFE's bound on the whole id.
const maxName = 2048

// Name is a SPIFFE id that Hauberk understands. Two names are the same if ==
// says so.
type Name struct {
	kind   Kind
	domain string
	first  string // namespace or node
	second string // workload
}

// Workload names a workload: Istio's form, with the workload in the place of
// the service account.
func Workload(trustDomain, namespace, workload string) (Name, error) {
	return checked(Name{KindWorkload, trustDomain, namespace, workload})
}

// Node names the agent of a machine.
func Node(trustDomain, node string) (Name, error) {
	return checked(Name{KindNode, trustDomain, node, ""})
}

// Control names the control plane.
func Control(trustDomain string) (Name, error) {
	return checked(Name{KindControl, trustDomain, "", ""})
}

// Ingress names the mesh when it speaks for clients without an identity.
func Ingress(trustDomain string) (Name, error) {
	return checked(Name{KindIngress, trustDomain, "", ""})
}

// ParseName reads a SPIFFE id. It accepts only what String prints.
func ParseName(s string) (Name, error) {
	if len(s) > maxName {
		return Name{}, fmt.Errorf("parse name: %d bytes, at most %d are allowed", len(s), maxName)
	}
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok {
		return Name{}, fmt.Errorf("parse name %q: does not begin with spiffe://", s)
	}
	parts := strings.Split(rest, "/")
	n := Name{domain: parts[0]}
	switch path := parts[1:]; {
	case len(path) == 4 && path[0] == "ns" && path[2] == "sa":
		n.kind, n.first, n.second = KindWorkload, path[1], path[3]
	case len(path) == 3 && path[0] == "hauberk" && path[1] == "node":
		n.kind, n.first = KindNode, path[2]
	case len(path) == 2 && path[0] == "hauberk" && path[1] == "control":
		n.kind = KindControl
	case len(path) == 2 && path[0] == "hauberk" && path[1] == "ingress":
		n.kind = KindIngress
	default:
		return Name{}, fmt.Errorf("parse name %q: path is none of /ns/<namespace>/sa/<workload>, /hauberk/node/<name>, /hauberk/control, /hauberk/ingress", s)
	}
	if _, err := checked(n); err != nil {
		return Name{}, fmt.Errorf("parse name %q: %w", s, err)
	}
	return n, nil
}

func checked(n Name) (Name, error) {
	if err := CheckTrustDomain(n.domain); err != nil {
		return Name{}, err
	}
	switch n.kind {
	case KindWorkload:
		if !isLabel(n.first) {
			return Name{}, fmt.Errorf("namespace %q is not a DNS label of at most 63 bytes", n.first)
		}
		if !isSubdomain(n.second) {
			return Name{}, fmt.Errorf("workload %q is not a DNS name of at most 253 bytes", n.second)
		}
	case KindNode:
		if !isSubdomain(n.first) {
			return Name{}, fmt.Errorf("node %q is not a DNS name of at most 253 bytes", n.first)
		}
	}
	return n, nil
}

// CheckTrustDomain refuses what cannot be the authority of a SPIFFE id that
// certificates can also be constrained to: lower-case DNS names.
func CheckTrustDomain(td string) error {
	if !isSubdomain(td) {
		return fmt.Errorf("trust domain %q is not a lower-case DNS name of at most 253 bytes", td)
	}
	return nil
}

func isSubdomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !isLabel(label) {
			return false
		}
	}
	return true
}

func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	return strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// String is the SPIFFE id, or "" for the zero Name.
func (n Name) String() string {
	prefix := "spiffe://" + n.domain
	switch n.kind {
	case KindWorkload:
		return prefix + "/ns/" + n.first + "/sa/" + n.second
	case KindNode:
		return prefix + "/hauberk/node/" + n.first
	case KindControl:
		return prefix + "/hauberk/control"
	case KindIngress:
		return prefix + "/hauberk/ingress"
	}
	return ""
}

// Kind of the name.
func (n Name) Kind() Kind { return n.kind }

// IsZero says that the name names nobody.
func (n Name) IsZero() bool { return n == Name{} }

// TrustDomain the name belongs to.
func (n Name) TrustDomain() string { return n.domain }

// Namespace of a workload, else "".
func (n Name) Namespace() string {
	if n.kind != KindWorkload {
		return ""
	}
	return n.first
}

// Workload is the name of a workload within its namespace, else "".
func (n Name) Workload() string { return n.second }

// Node is the name of a node, else "".
func (n Name) Node() string {
	if n.kind != KindNode {
		return ""
	}
	return n.first
}

// URL is the name as certificates carry it.
func (n Name) URL() *url.URL {
	path := strings.TrimPrefix(n.String(), "spiffe://"+n.domain)
	return &url.URL{Scheme: "spiffe", Host: n.domain, Path: path}
}

// MarshalText makes a Name a string in JSON.
func (n Name) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText is ParseName; the empty string is the zero Name.
func (n *Name) UnmarshalText(text []byte) (err error) {
	if len(text) == 0 {
		*n = Name{}
		return nil
	}
	*n, err = ParseName(string(text))
	return err
}
