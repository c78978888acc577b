// Package ratelimit writes questions to a rate limit service of Envoy's API
// (envoy.service.ratelimit.v3) and reads its answers.
//
// It knows the messages and neither gRPC nor a socket: a question is a dozen
// fields, and the generated code for it would be larger than the proxy that asks.
package ratelimit

import (
	"errors"
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"hauberk.dev/internal/protofields"
)

// Path of the one method.
const Path = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"

// Bounds of what is read of an answer.
const (
	MaxAnswer   = 64 << 10 // bytes
	maxStatuses = 64
	maxHeaders  = 16
)

// Entry is one part of what is counted together.
type Entry struct{ Key, Value string }

// AppendRequest appends the question whether one more of each descriptor may be.
func AppendRequest(dst []byte, domain string, descriptors [][]Entry) []byte {
	dst = appendText(dst, 1, domain)
	for _, d := range descriptors {
		var inner []byte
		for _, e := range d {
			inner = appendBytes(inner, 1, appendText(appendText(nil, 1, e.Key), 2, e.Value))
		}
		dst = appendBytes(dst, 2, inner)
	}
	return dst
}

func appendText(b []byte, n protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

func appendBytes(b []byte, n protowire.Number, p []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), p)
}

// Answer is what the service says.
type Answer struct {
	Over bool
	// Limit is the one that is nearest to its end: of how many, how many are left
	// and for how long, if the service says.
	Limit, Remaining uint32
	Reset            time.Duration
	Known            bool    // that it has said
	Headers          []Entry // to be added to the answer of the client
}

// status is what is said of one descriptor.
type status struct {
	over             bool
	limit, remaining uint32
	reset            time.Duration
	known            bool
}

// ErrUnknown is an answer that says neither that the request may be nor that it
// may not.
var ErrUnknown = errors.New("the service says neither yes nor no")

// Parse reads an answer.
func Parse(raw []byte) (Answer, error) {
	var a Answer
	if len(raw) > MaxAnswer {
		return a, fmt.Errorf("read answer: %d bytes; at most %d", len(raw), MaxAnswer)
	}
	code, statuses := uint64(0), 0
	err := protofields.Each(raw, func(n protowire.Number, inner []byte, v uint64) (err error) {
		switch {
		case n == 1 && inner == nil:
			code = v
		case n == 2 && inner != nil:
			if statuses++; statuses > maxStatuses {
				return fmt.Errorf("over %d statuses", maxStatuses)
			}
			s, err := parseStatus(inner)
			if err == nil {
				a.nearest(s)
			}
			return err
		case n == 3 && inner != nil:
			if len(a.Headers) >= maxHeaders {
				return fmt.Errorf("over %d header fields", maxHeaders)
			}
			var h Entry
			if h, err = parseHeader(inner); err == nil {
				a.Headers = append(a.Headers, h)
			}
		}
		return err
	})
	switch {
	case err != nil:
		return Answer{}, fmt.Errorf("read answer: %w", err)
	case code != 1 && code != 2:
		return Answer{}, fmt.Errorf("read answer: code %d: %w", code, ErrUnknown)
	}
	a.Over = code == 2
	return a, nil
}

// nearest keeps the limit that a client meets first: one that is used up before
// one that is not, then the one with the least left.
func (a *Answer) nearest(s status) {
	better := !a.Known || s.over && !a.Over || s.over == a.Over && s.remaining < a.Remaining
	if s.known && better {
		a.Over, a.Limit, a.Remaining, a.Reset, a.Known = s.over, s.limit, s.remaining, s.reset, true
	}
}

func parseStatus(raw []byte) (s status, err error) {
	err = protofields.Each(raw, func(n protowire.Number, inner []byte, v uint64) error {
		switch {
		case n == 1 && inner == nil:
			s.over = v == 2
		case n == 2 && inner != nil:
			s.known = true
			return protofields.Each(inner, func(n protowire.Number, inner []byte, v uint64) error {
				if n == 1 && inner == nil {
					s.limit = uint32(min(v, math.MaxUint32))
				}
				return nil
			})
		case n == 3 && inner == nil:
			s.remaining = uint32(min(v, math.MaxUint32))
		case n == 4 && inner != nil:
			return protofields.Each(inner, func(n protowire.Number, inner []byte, v uint64) error {
				if n == 1 && inner == nil { // seconds
					s.reset = time.Duration(min(v, maxReset)) * time.Second
				}
				return nil
			})
		}
		return nil
	})
	return s, err
}

const maxReset = 365 * 24 * 3600 // seconds

func parseHeader(raw []byte) (h Entry, err error) {
	err = protofields.Each(raw, func(n protowire.Number, inner []byte, v uint64) error {
		switch {
		case inner == nil:
		case n == 1:
			h.Key = string(inner)
		case n == 2 || n == 3:
			h.Value = string(inner)
		}
		return nil
	})
	return h, err
}
