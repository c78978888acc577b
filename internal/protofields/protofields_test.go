package protofields_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"hauberk.dev/internal/protofields"
)

func message() []byte {
	b := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 300)
	b = protowire.AppendBytes(protowire.AppendTag(b, 2, protowire.BytesType), []byte("x"))
	b = protowire.AppendBytes(protowire.AppendTag(b, 3, protowire.BytesType), nil)
	return protowire.AppendFixed64(protowire.AppendTag(b, 4, protowire.Fixed64Type), 7)
}

func TestEach(t *testing.T) {
	said := ""
	err := protofields.Each(message(), func(n protowire.Number, inner []byte, v uint64) error {
		said += fmt.Sprintf("%d %q %v %d;", n, inner, inner == nil, v)
		return nil
	})
	if want := `1 "" true 300;2 "x" false 0;3 "" false 0;4 "" true 0;`; err != nil || said != want {
		t.Errorf("%s, %v, want %s", said, err, want)
	}
	stop := errors.New("stop")
	if err := protofields.Each(message(), func(protowire.Number, []byte, uint64) error { return stop }); err != stop {
		t.Errorf("got %v", err)
	}
	whole := message()
	for n := 1; n < len(whole); n++ {
		fields := 0
		err := protofields.Each(whole[:n], func(protowire.Number, []byte, uint64) error { fields++; return nil })
		if err == nil && fields > 3 {
			t.Errorf("%d bytes of %d are a message", n, len(whole))
		}
	}
}

func FuzzEach(f *testing.F) {
	f.Add(message())
	f.Fuzz(func(t *testing.T, raw []byte) {
		_ = protofields.Each(raw, func(_ protowire.Number, inner []byte, _ uint64) error {
			if len(inner) > 0 && !bytes.Contains(raw, inner) {
				t.Errorf("%q is not of %q", inner, raw)
			}
			return nil
		})
	})
}
