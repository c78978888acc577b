// Package svidlink hands certificates with their keys, and authorities, from the
// program that is told of them to the proxy that proves itself with them, over a
// Unix socket between processes of one user.
//
// Keys are in messages only: no file has them, and a socket's buffers are not
// swapped out as the pages of a shared memory are. What is written here is cleared
// when it has been sent or replaced. The package fetches nothing and judges no
// certificate.
package svidlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Bounds of a message.
const (
	MaxMessage    = 16 << 20
	maxIdentities = 1024
	maxBundles    = 1024
	maxText       = 2048
	maxChain      = 256 << 10
	maxKey        = 16 << 10
	maxBundle     = 1 << 20

	version = 1
)

// Set is all there is at a moment.
type Set struct {
	Identities []Identity // the first of a source is its default
	Bundles    []Bundle
	Why        string // where they come from is away or refuses, and why; "" if not
}

// Identity is a chain and its key.
type Identity struct {
	Name  string // a SPIFFE id, or what a control plane calls it
	Hint  string // what it is for, "" if nobody says
	Chain []byte // DER, leaf first
	Key   []byte // PKCS #8
}

// Bundle is authorities.
type Bundle struct {
	Name string // spiffe://<trust domain>, or what a control plane calls it
	DER  []byte
}

// Check says why no set can have it.
func (d *Identity) Check() error {
	if len(d.Name) > maxText || len(d.Hint) > maxText || len(d.Chain) > maxChain || len(d.Key) > maxKey {
		return fmt.Errorf("%.100q: a name of %d bytes, a hint of %d, a chain of %d, a key of %d; at most %d, %d, %d and %d",
			d.Name, len(d.Name), len(d.Hint), len(d.Chain), len(d.Key), maxText, maxText, maxChain, maxKey)
	}
	return nil
}

// Check says why no set can have it.
func (b *Bundle) Check() error {
	if len(b.Name) > maxText || len(b.DER) > maxBundle {
		return fmt.Errorf("%.100q: a name of %d bytes, authorities of %d; at most %d and %d", b.Name, len(b.Name), len(b.DER), maxText, maxBundle)
	}
	return nil
}

// Clear zeroes the keys.
func (s *Set) Clear() {
	for i := range s.Identities {
		clear(s.Identities[i].Key)
	}
}

// Clone is a copy with keys of its own.
func (s *Set) Clone() *Set {
	c := &Set{Identities: append([]Identity(nil), s.Identities...), Bundles: append([]Bundle(nil), s.Bundles...), Why: s.Why}
	for i := range c.Identities {
		c.Identities[i].Key = append([]byte(nil), c.Identities[i].Key...)
	}
	return c
}

// size of the message, to allocate once: a buffer that grows leaves copies.
func (s *Set) size() int {
	n := 4 + 1 + 2 + len(s.Why) + 4
	for i := range s.Identities {
		d := &s.Identities[i]
		n += 2 + len(d.Name) + 2 + len(d.Hint) + 4 + len(d.Chain) + 4 + len(d.Key)
	}
	for _, b := range s.Bundles {
		n += 2 + len(b.Name) + 4 + len(b.DER)
	}
	return n
}

// check says why a set cannot be handed over: all of it is within the bounds, or
// nobody would take it.
func (s *Set) check() error {
	if n := s.size(); n > MaxMessage {
		return fmt.Errorf("hand identities over: %d bytes; at most %d", n, MaxMessage)
	}
	if len(s.Identities) > maxIdentities || len(s.Bundles) > maxBundles {
		return fmt.Errorf("hand identities over: %d and %d bundles; at most %d and %d", len(s.Identities), len(s.Bundles), maxIdentities, maxBundles)
	}
	for i := range s.Identities {
		if err := s.Identities[i].Check(); err != nil {
			return fmt.Errorf("hand identities over: %w", err)
		}
	}
	for i := range s.Bundles {
		if err := s.Bundles[i].Check(); err != nil {
			return fmt.Errorf("hand identities over: %w", err)
		}
	}
	if len(s.Why) > maxText {
		return fmt.Errorf("hand identities over: a reason of %d bytes; at most %d", len(s.Why), maxText)
	}
	return nil
}

// Marshal is the message, its length first. Whoever has sent it clears it.
func (s *Set) Marshal() ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	n := s.size()
	b := binary.BigEndian.AppendUint32(make([]byte, 0, n), uint32(n-4))
	b = append(b, version)
	b = text(b, s.Why)
	b = binary.BigEndian.AppendUint16(b, uint16(len(s.Identities)))
	for i := range s.Identities {
		d := &s.Identities[i]
		b = field(field(text(text(b, d.Name), d.Hint), d.Chain), d.Key)
	}
	b = binary.BigEndian.AppendUint16(b, uint16(len(s.Bundles)))
	for _, d := range s.Bundles {
		b = field(text(b, d.Name), d.DER)
	}
	return b, nil
}

func text(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

func field(b, p []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(p))), p...)
}

var errShort = errors.New("read identities: the message ends before what it announces")

// Parse reads a message without its length. Keys are slices of b: who clears the
// set has cleared b of them.
func Parse(b []byte) (*Set, error) {
	if len(b) > MaxMessage {
		return nil, fmt.Errorf("read identities: %d bytes; at most %d", len(b), MaxMessage)
	}
	r := reader{b: b}
	if v := r.take(1); v != nil && v[0] != version {
		return nil, fmt.Errorf("read identities: version %d; want %d: both programs must be of one release", v[0], version)
	}
	s := &Set{Why: r.text()}
	for range r.count(maxIdentities) {
		s.Identities = append(s.Identities, Identity{Name: r.text(), Hint: r.text(), Chain: r.bytes(maxChain), Key: r.bytes(maxKey)})
	}
	for range r.count(maxBundles) {
		s.Bundles = append(s.Bundles, Bundle{Name: r.text(), DER: r.bytes(maxBundle)})
	}
	if r.err == nil && len(r.b) > 0 {
		r.err = fmt.Errorf("read identities: %d bytes follow", len(r.b))
	}
	if r.err != nil {
		return nil, r.err
	}
	return s, nil
}

type reader struct {
	b   []byte
	err error
}

func (r *reader) take(n int) []byte {
	if r.err == nil && n > len(r.b) {
		r.err = errShort
	}
	if r.err != nil {
		return nil
	}
	p := r.b[:n:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) count(most int) int {
	p := r.take(2)
	if p == nil {
		return 0
	}
	n := int(binary.BigEndian.Uint16(p))
	if n > most {
		r.err = fmt.Errorf("read identities: a list of %d; at most %d", n, most)
		return 0
	}
	return n
}

func (r *reader) text() string {
	p := r.take(2)
	if p == nil {
		return ""
	}
	n := int(binary.BigEndian.Uint16(p))
	if n > maxText {
		r.err = fmt.Errorf("read identities: a text of %d bytes; at most %d", n, maxText)
		return ""
	}
	return string(r.take(n))
}

func (r *reader) bytes(most int) []byte {
	p := r.take(4)
	if p == nil {
		return nil
	}
	n := binary.BigEndian.Uint32(p)
	if n > uint32(most) {
		r.err = fmt.Errorf("read identities: a field of %d bytes; at most %d", n, most)
		return nil
	}
	return r.take(int(n))
}

// receive reads one message whole. The buffer is the set's own.
func receive(from io.Reader, length [4]byte) (*Set, error) {
	n := binary.BigEndian.Uint32(length[:])
	if n > MaxMessage {
		return nil, fmt.Errorf("read identities: %d bytes; at most %d", n, MaxMessage)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(from, b); err != nil {
		clear(b)
		return nil, fmt.Errorf("read identities: %w", err)
	}
	s, err := Parse(b)
	if err != nil {
		clear(b)
	}
	return s, err
}
