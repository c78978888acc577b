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
	"time"
	"unicode"
)

// Version of what Export writes. It rises with every change that an older
// reader would misread.
//
//	1  2026-11: first; still read.
//	2  2026-11: since when it was learnt; hashes of names that are not text.
const Version = 2

// MaxSchema is how long an exported schema may be.
const MaxSchema = 16 << 20

type schema struct {
	Version  int                   `json:"version"`
	Since    time.Time             `json:"since,omitzero"`
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
	Hash  uint64 `json:"hash,omitempty"` // of the name as it came, where Name is not that
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

// Begin says since when what is normal is learnt: from New on, unless Import takes
// over what was learnt for longer.
func (s *Service) Begin(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.since = at.UTC().Round(0)
}

// Learnt is since when what is normal is learnt, and from how many requests.
func (s *Service) Learnt() (since time.Time, requests uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.since, s.total.Load()
}

// Export writes down what is known, so that it outlives this process: names of
// routes, callers and arguments, types, counts and sizes, and no value. Requests
// go on meanwhile.
func (s *Service) Export() ([]byte, error) {
	out := schema{Version: Version, Callers: map[string]baseSchema{}}
	var routes []*route
	s.mu.RLock()
	out.Since, out.Requests, out.Typical = s.since, s.total.Load(), baseSchema{s.typical.average.schema(), s.typical.most}
	for name, b := range s.normal {
		out.Callers[name] = baseSchema{b.average.schema(), b.most}
	}
	s.root.each(func(r *route) { routes = append(routes, r) })
	s.mu.RUnlock()
	for _, r := range routes {
		out.Routes = append(out.Routes, r.schema())
	}
	slices.SortFunc(out.Routes, func(a, b routeSchema) int {
		return cmp.Or(strings.Compare(a.Path, b.Path), strings.Compare(a.Method, b.Method))
	})
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(out); err != nil {
		return nil, fmt.Errorf("export schema: %w", err)
	}
	return b.Bytes(), nil
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
	for h, f := range r.fields {
		one := fieldSchema{Name: legible(f.name), Types: f.types.String(), Count: f.count}
		if hash([]byte(one.Name)) != h {
			one.Hash = h
		}
		out.Fields = append(out.Fields, one)
	}
	slices.SortFunc(out.Fields, func(a, b fieldSchema) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), cmp.Compare(a.Hash, b.Hash))
	})
	return out
}

// legible is a name without what JSON would make much longer.
func legible(name string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(name, "?"))
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
	if in.Version != Version && in.Version != 1 {
		return fmt.Errorf("import schema: version %d; 1 to %d are read", in.Version, Version)
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
		if len(name) > maxCaller || !b.sound() {
			return fmt.Errorf("import schema: caller %.128q: a number is none, or the name is too long", name)
		}
		fresh.normal[name] = &baseline{b.average(), b.Most}
	}
	if !in.Typical.sound() {
		return fmt.Errorf("import schema: typical: a number is none")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.root, s.routes, s.normal, s.typical = fresh.root, fresh.routes, fresh.normal, baseline{in.Typical.average(), in.Typical.Most}
	if !in.Since.IsZero() {
		s.since = in.Since
	}
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
		if len(name) > maxCaller {
			return fmt.Errorf("a caller's name of %d bytes", len(name))
		}
		r.callers[name] = n
	}
	for _, f := range in.Fields {
		t, err := parseTypes(f.Types)
		if err != nil || len(f.Name) > 4*maxPathField {
			return fmt.Errorf("field %.128q with types %.64q", f.Name, f.Types)
		}
		h := f.Hash
		if h == 0 {
			h = hash([]byte(f.Name))
		}
		r.fields[h] = &field{f.Name, t, f.Count}
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
