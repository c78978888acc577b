// Package strictjson decodes JSON that decides something: bounded, with every
// field known, no field twice and nothing behind the value.
//
// It is for statements and policies, where a field that one reader sees and
// another does not is an attack. It is not for protocols that must let newer
// peers add fields.
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// maxDepth of nested objects and arrays.
const maxDepth = 32

// Decode reads exactly one JSON value of at most limit bytes into v.
func Decode(raw []byte, limit int, v any) error {
	if err := scan(raw, limit); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	return d.Decode(v)
}

// DecodeLoose is Decode for formats that allow fields of other makers: it is
// as strict about everything else.
func DecodeLoose(raw []byte, limit int, v any) error {
	if err := scan(raw, limit); err != nil {
		return err
	}
	return json.Unmarshal(raw, v)
}

// scan checks what encoding/json lets pass. Names that differ only in case
// count as the same, because encoding/json matches fields without regard to
// case and another reader may not.
func scan(raw []byte, limit int) error {
	if len(raw) > limit {
		return fmt.Errorf("is %d bytes, at most %d are allowed", len(raw), limit)
	}
	if !utf8.Valid(raw) {
		return errors.New("is not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := value(d, 0); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("has data behind the JSON value")
	}
	return nil
}

func value(d *json.Decoder, depth int) error {
	tok, err := d.Token()
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	delim, ok := tok.(json.Delim)
	if !ok {
		return nil
	}
	if depth == maxDepth {
		return fmt.Errorf("nests deeper than %d", maxDepth)
	}
	seen := map[string]bool{}
	for d.More() {
		if delim == '{' {
			if err := name(d, seen); err != nil {
				return err
			}
		}
		if err := value(d, depth+1); err != nil {
			return err
		}
	}
	_, err = d.Token() // the closing bracket
	return err
}

func name(d *json.Decoder, seen map[string]bool) error {
	tok, err := d.Token()
	if err != nil {
		return err
	}
	key, _ := tok.(string)
	folded := strings.ToLower(strings.ToUpper(key))
	if seen[folded] {
		return fmt.Errorf("has field %q twice", key)
	}
	seen[folded] = true
	return nil
}
