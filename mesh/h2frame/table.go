package h2frame

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/net/http2/hpack"
)

const (
	// TableSize is how large the table of header compression is unless it is
	// negotiated otherwise.
	TableSize = 4096

	staticTable = 61 // fields that everybody knows
	overhead    = 32 // that each field is counted with
)

// Field is a header field of a table. It may hold any bytes.
type Field struct {
	Name  []byte `json:"n"`
	Value []byte `json:"v"`
}

// Table reads a decoder's table out, the oldest field first, and how large it
// may be. The decoder is of no use afterwards.
func Table(d *hpack.Decoder) (table []Field, most uint32) {
	indexed := func(i int) (f hpack.HeaderField, ok bool) {
		d.SetEmitEnabled(true)
		d.SetEmitFunc(func(got hpack.HeaderField) { f, ok = got, true })
		d.Write(appendInt(nil, 0x80, 7, i))
		d.Close()
		return f, ok
	}
	for i := staticTable + 1; ; i++ {
		f, ok := indexed(i)
		if !ok {
			break
		}
		table = append(table, Field{Name: []byte(f.Name), Value: []byte(f.Value)})
	}
	slices.Reverse(table)
	// How large it may be is found by what it keeps.
	low, high := overhead-1, TableSize
	for low < high {
		n := (low + high + 1) / 2
		d.Write(appendLiteral(nil, nil, make([]byte, n-overhead)))
		d.Close()
		if _, kept := indexed(staticTable + 1); kept {
			low = n
		} else {
			high = n - 1
		}
	}
	if low < overhead {
		low = 0
	}
	return table, uint32(low)
}

// SetTable gives a new decoder, whose table has TableSize, what Table has read.
func SetTable(d *hpack.Decoder, table []Field, most uint32) error {
	d.SetEmitEnabled(false)
	defer d.SetEmitEnabled(true)
	size := 0
	var b []byte
	for _, f := range table {
		if size += len(f.Name) + len(f.Value) + overhead; size > TableSize {
			return fmt.Errorf("header table over %d bytes", TableSize)
		}
		b = appendLiteral(b, f.Name, f.Value)
	}
	if most > TableSize {
		return fmt.Errorf("header table of %d bytes", most)
	}
	_, err := d.Write(b)
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	d.SetMaxDynamicTableSize(most)
	return nil
}

// appendLiteral appends a field that is to go into the table (RFC 7541, 6.2.1).
func appendLiteral(b, name, value []byte) []byte {
	b = append(b, 0x40)
	b = append(appendInt(b, 0, 7, len(name)), name...)
	return append(appendInt(b, 0, 7, len(value)), value...)
}

// appendInt appends a number with a prefix of so many bits (RFC 7541, 5.1).
func appendInt(b []byte, first byte, bits, n int) []byte {
	most := 1<<bits - 1
	if n < most {
		return append(b, first|byte(n))
	}
	b = append(b, first|byte(most))
	for n -= most; n >= 0x80; n >>= 7 {
		b = append(b, byte(n)|0x80)
	}
	return append(b, byte(n))
}
