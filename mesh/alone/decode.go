package alone

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Fault is one thing that is wrong with a configuration.
type Fault struct {
	Line  int    `json:"line,omitempty"` // 0: not known
	Field string `json:"field"`
	Why   string `json:"why"` // and what to write instead
}

// Faults is everything that is wrong with a configuration.
type Faults struct {
	File string
	All  []Fault
}

func (f *Faults) Error() string {
	var b strings.Builder
	for i, x := range f.All {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "%s:%d: ", f.File, x.Line)
		if x.Field != "" {
			b.WriteString(x.Field + ": ")
		}
		b.WriteString(x.Why)
	}
	return b.String()
}

// Load reads and checks a file. Paths in it are relative to the file's own
// directory. The error is *Faults if the file could be read.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	return Parse(filepath.Base(path), dir, b)
}

// Parse reads and checks what a file of that name in dir says.
func Parse(name, dir string, b []byte) (*Config, error) {
	r := &reading{lines: map[string]int{}}
	c := &Config{dir: dir, sum: fmt.Sprintf("%x", sha256.Sum256(b))}
	r.document(c, b)
	c.defaults()
	if len(r.faults) == 0 {
		c.absolute(dir)
		r.check(c)
	}
	if len(r.faults) > 0 {
		return nil, &Faults{File: name, All: r.faults}
	}
	return c, nil
}

// absolute makes paths independent of where the proxy runs.
func (c *Config) absolute(dir string) {
	fix := func(p *string) {
		if *p != "" && *p != "-" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	fix(&c.Admin)
	fix(&c.Identities)
	fix(&c.AccessLog.Path)
	if l := c.AccessLog.Collector; l != nil && l.TLS != nil {
		fix(&l.TLS.CA)
	}
	if t := c.Traces; t != nil && t.Collector != nil && t.Collector.TLS != nil {
		fix(&t.Collector.TLS.CA)
	}
	for _, l := range c.Listeners {
		if l.TLS != nil {
			for i := range l.TLS.Certificates {
				fix(&l.TLS.Certificates[i].Chain)
				fix(&l.TLS.Certificates[i].Key)
			}
			if l.TLS.Clients != nil {
				fix(&l.TLS.Clients.CA)
			}
		}
	}
	for _, h := range c.Hosts {
		for _, r := range h.Routes {
			if r.Static != nil {
				fix(&r.Static.Root)
			}
			if r.Transcode != nil {
				fix(&r.Transcode.Descriptors)
			}
		}
	}
	for _, u := range c.Upstreams {
		if u.TLS != nil {
			fix(&u.TLS.CA)
			if u.TLS.Certificate != nil {
				fix(&u.TLS.Certificate.Chain)
				fix(&u.TLS.Certificate.Key)
			}
		}
	}
}

// reading is one reading of a configuration: what was found, and where.
type reading struct {
	faults []Fault
	lines  map[string]int // of a field, by its path
}

func (r *reading) fault(field, format string, args ...any) {
	line, at := 0, field
	for line == 0 && at != "" { // of a field that is not there: of what should hold it
		line = r.lines[at]
		at = at[:max(strings.LastIndexAny(at, ".["), 0)]
	}
	r.faults = append(r.faults, Fault{line, field, fmt.Sprintf(format, args...)})
}

func (r *reading) document(c *Config, b []byte) {
	if len(b) > maxConfig {
		r.fault("", "over %d MiB", maxConfig>>20)
		return
	}
	d := yaml.NewDecoder(bytes.NewReader(b))
	var doc yaml.Node
	switch err := d.Decode(&doc); {
	case errors.Is(err, io.EOF):
		r.fault("", "empty; begin with version: 1")
		return
	case err != nil:
		r.fault("", "%v", strings.TrimPrefix(err.Error(), "yaml: "))
		return
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		r.fault("", "a second document; one file holds one configuration")
		return
	}
	r.node(doc.Content[0], reflect.ValueOf(c).Elem(), "")
}

// node reads n into v, and notes everything that does not fit.
func (r *reading) node(n *yaml.Node, v reflect.Value, at string) {
	if at != "" {
		r.lines[at] = n.Line
	}
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		r.fault(at, "anchors and aliases are not taken; write the value where it is meant")
		return
	}
	switch v.Interface().(type) {
	case Duration, Size:
		r.quantity(n, v, at)
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		p := reflect.New(v.Type().Elem())
		r.node(n, p.Elem(), at)
		v.Set(p)
	case reflect.Struct:
		r.mapping(n, v, at)
	case reflect.Map:
		r.pairs(n, v, at)
	case reflect.Slice:
		r.list(n, v, at)
	case reflect.Int:
		i, err := strconv.Atoi(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil {
			r.fault(at, "%s is no whole number", shown(n))
			return
		}
		v.SetInt(int64(i))
	case reflect.Float64:
		f, err := strconv.ParseFloat(n.Value, 64)
		if n.Kind != yaml.ScalarNode || err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
			r.fault(at, "%s is no number", shown(n))
			return
		}
		v.SetFloat(f)
	case reflect.Bool:
		if n.Kind != yaml.ScalarNode || n.Value != "true" && n.Value != "false" {
			r.fault(at, "%s is neither true nor false", shown(n))
			return
		}
		v.SetBool(n.Value == "true")
	case reflect.String:
		if n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" {
			r.fault(at, "%s is no text", shown(n))
			return
		}
		v.SetString(n.Value)
	}
}

func (r *reading) list(n *yaml.Node, v reflect.Value, at string) {
	if n.Kind != yaml.SequenceNode {
		r.fault(at, "%s is no list; write each entry on a line of its own, after a dash", shown(n))
		return
	}
	s := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, e := range n.Content {
		r.node(e, s.Index(i), fmt.Sprintf("%s[%d]", at, i))
	}
	v.Set(s)
}

func (r *reading) pairs(n *yaml.Node, v reflect.Value, at string) {
	if n.Kind != yaml.MappingNode {
		r.fault(at, "%s is no set of name: value", shown(n))
		return
	}
	v.Set(reflect.MakeMap(v.Type()))
	for i := 0; i < len(n.Content); i += 2 {
		key, e := n.Content[i], reflect.New(v.Type().Elem()).Elem()
		if v.MapIndex(reflect.ValueOf(key.Value)).IsValid() {
			r.fault(at, "%q is there twice", key.Value)
		}
		r.node(n.Content[i+1], e, at+"."+key.Value)
		v.SetMapIndex(reflect.ValueOf(key.Value), e)
	}
}

func (r *reading) mapping(n *yaml.Node, v reflect.Value, at string) {
	if n.Kind != yaml.MappingNode && !(n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null") {
		r.fault(at, "%s is no set of fields; it takes %s", shown(n), strings.Join(fieldNames(v.Type()), ", "))
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		path := strings.TrimPrefix(at+"."+key.Value, ".")
		r.lines[path] = key.Line
		index := fieldOf(v.Type(), key.Value)
		switch {
		case index < 0:
			r.fault(path, "no such field; %s takes %s", named(at), strings.Join(fieldNames(v.Type()), ", "))
		case seen[key.Value]:
			r.fault(path, "is there twice")
		default:
			r.node(n.Content[i+1], v.Field(index), path)
			r.lines[path] = key.Line
		}
		seen[key.Value] = true
	}
}

func named(at string) string {
	if at == "" {
		return "the file"
	}
	return at
}

func fieldOf(t reflect.Type, key string) int {
	for i := range t.NumField() {
		if name, ok := t.Field(i).Tag.Lookup("yaml"); ok && name == key {
			return i
		}
	}
	return -1
}

func fieldNames(t reflect.Type) (names []string) {
	for i := range t.NumField() {
		if name, ok := t.Field(i).Tag.Lookup("yaml"); ok {
			names = append(names, name)
		}
	}
	return names
}

// shown is a value in a message.
func shown(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a set of fields"
	case yaml.SequenceNode:
		return "a list"
	}
	return fmt.Sprintf("%.60q", n.Value)
}

// units of sizes.
var units = []struct {
	suffix string
	bytes  int64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"", 1}}

// quantity reads a duration or a size.
func (r *reading) quantity(n *yaml.Node, v reflect.Value, at string) {
	if _, ok := v.Interface().(Duration); ok {
		d, err := time.ParseDuration(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil || d <= 0 {
			r.fault(at, "%s is no duration above zero; write for example 30s or 5m", shown(n))
			return
		}
		v.SetInt(int64(d))
		return
	}
	for _, u := range units {
		digits, ok := strings.CutSuffix(n.Value, u.suffix)
		if !ok {
			continue
		}
		i, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
		if n.Kind != yaml.ScalarNode || err != nil || i <= 0 || i > math.MaxInt64/u.bytes {
			break
		}
		v.SetInt(i * u.bytes)
		return
	}
	r.fault(at, "%s is no size above zero; write for example 512, 16KiB or 10MiB", shown(n))
}
