package stages

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protowire"

	"hauberk.dev/internal/protofields"
)

// maxProfile bounds a profile once unpacked.
const maxProfile = 64 << 20

type sample struct {
	functions          []string // innermost first
	count, nanoseconds int64
}

// profile is what of github.com/google/pprof/proto/profile.proto matters here.
type profile struct {
	samples   []([2][]uint64)     // locations and values
	locations map[uint64][]uint64 // functions by location, innermost first
	functions map[uint64]uint64   // place of a name by function
	strings   []string
}

func decode(raw []byte) ([]sample, error) {
	z, err := gzip.NewReader(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("unpack profile: %w", err)
	}
	plain, err := io.ReadAll(io.LimitReader(z, maxProfile+1))
	if err != nil {
		return nil, fmt.Errorf("unpack profile: %w", err)
	}
	if len(plain) > maxProfile {
		return nil, fmt.Errorf("unpack profile: above %d bytes", maxProfile)
	}
	p := profile{locations: map[uint64][]uint64{}, functions: map[uint64]uint64{}}
	if err := protofields.Each(plain, p.field); err != nil {
		return nil, fmt.Errorf("read profile: %w", err)
	}
	return p.resolve()
}

func (p *profile) field(n protowire.Number, inner []byte, _ uint64) error {
	switch n {
	case 2:
		var s [2][]uint64
		err := protofields.Each(inner, func(n protowire.Number, inner []byte, v uint64) (err error) {
			if n == 1 || n == 2 {
				s[n-1], err = numbers(s[n-1], inner, v)
			}
			return err
		})
		p.samples = append(p.samples, s)
		return err
	case 4:
		return p.location(inner)
	case 5:
		var id, name uint64
		err := protofields.Each(inner, func(n protowire.Number, _ []byte, v uint64) error {
			switch n {
			case 1:
				id = v
			case 2:
				name = v
			}
			return nil
		})
		p.functions[id] = name
		return err
	case 6:
		p.strings = append(p.strings, string(inner))
	}
	return nil
}

func (p *profile) location(raw []byte) error {
	var id uint64
	var functions []uint64
	err := protofields.Each(raw, func(n protowire.Number, inner []byte, v uint64) error {
		switch n {
		case 1:
			id = v
		case 4: // a line
			return protofields.Each(inner, func(n protowire.Number, _ []byte, v uint64) error {
				if n == 1 {
					functions = append(functions, v)
				}
				return nil
			})
		}
		return nil
	})
	p.locations[id] = functions
	return err
}

// numbers adds one number, or those packed into a field.
func numbers(to []uint64, inner []byte, v uint64) ([]uint64, error) {
	if inner == nil {
		return append(to, v), nil
	}
	for len(inner) > 0 {
		v, n := protowire.ConsumeVarint(inner)
		if n < 0 {
			return nil, errors.New("a packed number is broken")
		}
		to, inner = append(to, v), inner[n:]
	}
	return to, nil
}

func (p *profile) resolve() (out []sample, err error) {
	for _, raw := range p.samples {
		if len(raw[1]) != 2 {
			return nil, fmt.Errorf("read profile: a sample of %d values is not of a CPU profile", len(raw[1]))
		}
		s := sample{count: int64(raw[1][0]), nanoseconds: int64(raw[1][1])}
		for _, l := range raw[0] {
			for _, f := range p.locations[l] {
				if name := p.functions[f]; name < uint64(len(p.strings)) {
					s.functions = append(s.functions, p.strings[name])
				}
			}
		}
		out = append(out, s)
	}
	return out, nil
}
