package inspect

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// Version of what Export writes. It rises with every change that an older
// reader would misread.
//
//	1  2026-11: first.
const Version = 1

// MaxSchema is how long an exported schema may be.
const MaxSchema = 16 << 20

type schema struct {
	Version  int                   `json:"version"`
	Requests uint64                `json:"requests"`
	Routes   []routeSchema         `json:"routes"`
	Callers  map[string]baseSchema `json:"callers,omitempty"`
	Typical  baseSchema            `json:"typical"`
}

type routeSchema struct {
	Method   string            `json:"method"`
	Path     string            `json:"path"`
	Requests uint64            `json:"requests"`
	Answered uint64            `json:"answered"`
	Failed   uint64            `json:"failed"`
	Sizes    map[int]uint32    `json:"sizes,omitempty"` // by bucket
	Largest  int64             `json:"largest"`
	P50      int64             `json:"p50"` // for people; not read
	P99      int64             `json:"p99"`
	Rate     averageSchema     `json:"rate"` // requests in ten seconds
	Callers  map[string]uint64 `json:"callers,omitempty"`
	Over     uint64            `json:"callersOver,omitempty"`
	Fields   []fieldSchema     `json:"fields,omitempty"`
	Omitted  uint64            `json:"fieldsOver,omitempty"`
}

type fieldSchema struct {
	Name  string `json:"name"`
	Types string `json:"types"`
	Count uint64 `json:"count"`
}

type averageSchema struct {
	Mean     float64 `json:"mean"`
	Variance float64 `json:"variance"`
	Count    uint32  `json:"count"`
}

type baseSchema struct {
	averageSchema
	Most float64 `json:"most"`
}

func (a average) schema() averageSchema { return averageSchema{a.mean, a.variance, a.count} }
func (a averageSchema) average() average {
	return average{a.Mean, a.Variance, min(a.Count, steady)}
}

// Export writes down what is known, so that it outlives this process.
func (s *Service) Export() ([]byte, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := schema{Version: Version, Requests: s.total.Load(), Callers: map[string]baseSchema{}, Typical: baseSchema{s.typical.average.schema(), s.typical.most}}
	for name, b := range s.normal {
		out.Callers[name] = baseSchema{b.average.schema(), b.most}
	}
	s.root.each(func(r *route) { out.Routes = append(out.Routes, r.schema()) })
	slices.SortFunc(out.Routes, func(a, b routeSchema) int {
		return cmp.Or(strings.Compare(a.Path, b.Path), strings.Compare(a.Method, b.Method))
	})
	b, err := json.MarshalIndent(out, "", " ")
	if err != nil {
		return nil, fmt.Errorf("export schema: %w", err)
	}
	return b, nil
}

func (n *node) each(f func(*route)) {
	for _, r := range n.routes {
		f(r)
	}
	for _, k := range n.kids {
		k.each(f)
	}
	if n.name != nil {
		n.name.each(f)
	}
}

func (r *route) schema() routeSchema {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := routeSchema{Method: r.method, Path: r.path, Requests: r.requests, Answered: r.answered, Failed: r.refused, Sizes: map[int]uint32{},
		Largest: r.sizes.most, P50: r.sizes.Quantile(.5), P99: r.sizes.Quantile(.99), Rate: r.rate.schema(), Callers: map[string]uint64{},
		Over: r.over, Omitted: r.omitted}
	for b, n := range r.sizes.counts {
		if n > 0 {
			out.Sizes[b] = n
		}
	}
	for name, n := range r.callers {
		out.Callers[name] = n
	}
	for _, f := range r.fields {
		out.Fields = append(out.Fields, fieldSchema{strings.ToValidUTF8(f.name, "\uFFFD"), f.types.String(), f.count})
	}
	slices.SortFunc(out.Fields, func(a, b fieldSchema) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Import takes over what Export has written, in place of what is known. A schema
// that is not whole and within bounds changes nothing.
func (s *Service) Import(b []byte) error {
	if len(b) > MaxSchema {
		return fmt.Errorf("import schema: %d bytes; at most %d", len(b), MaxSchema)
	}
	var in schema
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return fmt.Errorf("import schema: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("import schema: something follows it")
	}
	if in.Version != Version {
		return fmt.Errorf("import schema: version %d; %d is read", in.Version, Version)
	}
	if len(in.Routes) > MaxRoutes || len(in.Callers) > MaxCallers {
		return fmt.Errorf("import schema: %d routes and %d callers; at most %d and %d", len(in.Routes), len(in.Callers), MaxRoutes, MaxCallers)
	}
	fresh := New(*s.conf.Load())
	for i := range in.Routes {
		if err := fresh.take(&in.Routes[i]); err != nil {
			return fmt.Errorf("import schema: route %.32q %.128q: %w", in.Routes[i].Method, in.Routes[i].Path, err)
		}
	}
	for name, b := range in.Callers {
		if !b.sound() {
			return fmt.Errorf("import schema: caller %.128q: a number is none", name)
		}
		fresh.normal[name] = &baseline{b.average(), b.Most}
	}
	if !in.Typical.sound() {
		return fmt.Errorf("import schema: typical: a number is none")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.root, s.routes, s.normal, s.typical = fresh.root, fresh.routes, fresh.normal, baseline{in.Typical.average(), in.Typical.Most}
	s.total.Store(in.Requests)
	return nil
}

func (b baseSchema) sound() bool { return b.averageSchema.sound() && b.Most >= 0 }

func (a averageSchema) sound() bool {
	return a.Mean >= 0 && a.Variance >= 0 && !math.IsInf(a.Mean, 0) && !math.IsInf(a.Variance, 0)
}

func (s *Service) take(in *routeSchema) error {
	if !printable(in.Method, maxMethod) || !printable(in.Path, maxPath) {
		return fmt.Errorf("a method of %d bytes and a path of %d", len(in.Method), len(in.Path))
	}
	if len(in.Fields) > MaxFields || len(in.Callers) > MaxSeen {
		return fmt.Errorf("%d fields and %d callers; at most %d and %d", len(in.Fields), len(in.Callers), MaxFields, MaxSeen)
	}
	if !in.Rate.sound() || in.Largest < 0 {
		return fmt.Errorf("a number is none")
	}
	r := s.makeLocked(in.Method, in.Path)
	if r.requests > 0 || r.answered > 0 || len(r.fields) > 0 {
		return fmt.Errorf("it is there twice")
	}
	r.requests, r.answered, r.refused, r.over, r.omitted, r.rate = in.Requests, in.Answered, in.Failed, in.Over, in.Omitted, in.Rate.average()
	r.sizes.most = in.Largest
	for b, n := range in.Sizes {
		if b < 0 || b >= len(r.sizes.counts) {
			return fmt.Errorf("bucket %d of sizes", b)
		}
		r.sizes.counts[b] = n
		r.sizes.total += uint64(n)
	}
	for name, n := range in.Callers {
		r.callers[name] = n
	}
	for _, f := range in.Fields {
		t, err := parseTypes(f.Types)
		if err != nil || len(f.Name) > 4*maxPathField {
			return fmt.Errorf("field %.128q with types %.64q", f.Name, f.Types)
		}
		r.fields[hash([]byte(f.Name))] = &field{f.Name, t, f.Count}
	}
	return nil
}

func parseTypes(s string) (t Types, err error) {
	for _, one := range strings.Split(s, "|") {
		n := slices.Index(typeNames[:], one)
		if n < 0 {
			return 0, fmt.Errorf("type %.32q", one)
		}
		t |= 1 << n
	}
	return t, nil
}
