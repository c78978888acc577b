// Package protofields reads messages of protobuf field by field, where the
// package that defines them would bring too much along.
//
// It knows no message: which field is which, and what is out of bounds, is for who
// reads.
package protofields

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// Each calls f for each field of a message: inner is that of a field of bytes, and
// nil for others, v the value of a number. It stops at the first error.
func Each(raw []byte, f func(n protowire.Number, inner []byte, v uint64) error) error {
	for len(raw) > 0 {
		n, kind, took := protowire.ConsumeTag(raw)
		if took < 0 {
			return errors.New("it is no message")
		}
		raw = raw[took:]
		var inner []byte
		var v uint64
		switch kind {
		case protowire.VarintType:
			v, took = protowire.ConsumeVarint(raw)
		case protowire.BytesType:
			if inner, took = protowire.ConsumeBytes(raw); inner == nil {
				inner = []byte{}
			}
		default:
			took = protowire.ConsumeFieldValue(n, kind, raw)
		}
		if took < 0 {
			return fmt.Errorf("field %d is broken", n)
		}
		raw = raw[took:]
		if err := f(n, inner, v); err != nil {
			return err
		}
	}
	return nil
}
