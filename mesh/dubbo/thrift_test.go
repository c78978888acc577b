package dubbo

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

// thrift makes a frame with the id 7.
func thrift(service, message string) []byte {
	head := appendThriftString([]byte{0xda, 0xbc, 0, 0, 0, 0, 0, 0, thriftVersion}, service)
	head = binary.BigEndian.AppendUint64(head, 7)
	binary.BigEndian.PutUint16(head[6:], uint16(len(head)))
	size := uint32(len(head) + len(message))
	binary.BigEndian.PutUint32(head[2:], size)
	return append(append(binary.BigEndian.AppendUint32(nil, size), head...), message...)
}

const (
	strictCall = "\x80\x01\x00\x01\x00\x00\x00\x01m\x00\x00\x00\x09\x00"
	looseCall  = "\x00\x00\x00\x01m\x01\x00\x00\x00\x09\x00"
)

func TestThrift(t *testing.T) {
	for name, message := range map[string]string{"strict": strictCall, "loose": looseCall} {
		b := thrift("com.test.S", message)
		for i := range len(b) {
			n, _, err := ThriftSize(b[:i])
			if err != nil || n != 0 && n != len(b) {
				t.Fatalf("%s: %d bytes of %d: %d, %v", name, i, len(b), n, err)
			}
		}
		n, head, err := ThriftSize(b)
		if err != nil {
			t.Fatal(name, err)
		}
		f, err := ParseThrift(b, n, head)
		if err != nil || string(f.Service) != "com.test.S" || f.ID != 7 {
			t.Fatalf("%s: %+v, %v", name, f, err)
		}
		m, err := f.Head()
		if err != nil || m.Kind != KindCall || !m.TwoWay || string(m.Method) != "m" || m.Sequence != 9 {
			t.Errorf("%s: %+v, %v", name, m, err)
		}
		answer := AppendThriftError(nil, &f, &m, "denied")
		n, head, err = ThriftSize(answer)
		if err != nil || n != len(answer) {
			t.Fatalf("%s: the answer %x: %d, %v", name, answer, n, err)
		}
		r, err := ParseThrift(answer, n, head)
		if err != nil || r.ID != 7 || !bytes.Contains(r.Message, []byte("\x0b\x00\x01\x00\x00\x00\x06denied")) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
		if m, err := r.Head(); err != nil || m.Kind != KindOther || string(m.Method) != "m" || m.Sequence != 9 {
			t.Errorf("%s: %+v, %v", name, m, err)
		}
	}
}

func TestThriftRefuses(t *testing.T) {
	good := thrift("com.test.S", strictCall)
	change := func(at int, to ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[at:], to)
		return b
	}
	for name, b := range map[string][]byte{
		"magic": change(5, 0xbb), "two sizes": change(9, 1), "size": change(0, 0xff, 0xff, 0xff, 0xff, 0xda, 0xbc, 0xff, 0xff, 0xff, 0xff),
		"head too short": change(10, 0, 4), "head too long": change(10, 0xff), "version": change(12, 2), "service longer than the head": change(16, 0xff),
	} {
		n, head, err := ThriftSize(b)
		if err == nil {
			_, err = ParseThrift(b, n, head)
		}
		var syntax *SyntaxError
		if !errors.As(err, &syntax) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, message := range map[string]string{"empty": "", "cut off": strictCall[:8], "version": "\x80\x02" + strictCall[2:], "long method": "\x80\x01\x00\x01\x00\x00\xff\xff",
		"no method": "\x80\x01\x00\x01\x00\x00\x00\x00\x00\x00\x00\x09", "type": "\x80\x01\x00\x05" + strictCall[4:], "not UTF-8": "\x80\x01\x00\x01\x00\x00\x00\x01\xff\x00\x00\x00\x09"} {
		b := thrift("com.test.S", message)
		n, head, err := ThriftSize(b)
		if err != nil {
			t.Fatal(name, err)
		}
		f, err := ParseThrift(b, n, head)
		if err != nil {
			t.Fatal(name, err)
		}
		if m, err := f.Head(); err == nil {
			t.Errorf("%s: %+v", name, m)
		}
	}
}

func FuzzThrift(f *testing.F) {
	f.Add(thrift("com.test.S", strictCall))
	f.Add(thrift("com.test.S", looseCall))
	f.Add(thrift("", ""))
	f.Fuzz(func(t *testing.T, in []byte) {
		n, head, err := ThriftSize(in)
		if err != nil || n == 0 || len(in) < head {
			return
		}
		frame, err := ParseThrift(in, n, head)
		if err != nil {
			return
		}
		m, err := frame.Head()
		if err != nil {
			return
		}
		b := AppendThriftError(nil, &frame, &m, "no")
		size, head, err := ThriftSize(b)
		if err != nil || size != len(b) {
			t.Fatalf("the answer %x: %d, %v", b, size, err)
		}
		if back, err := ParseThrift(b, size, head); err != nil || back.ID != frame.ID {
			t.Fatalf("the answer %x: %+v, %v", b, back, err)
		}
	})
}
