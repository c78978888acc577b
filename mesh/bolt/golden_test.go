package bolt

import (
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"
)

// Frames as sofa-bolt-node 2.0.1 writes them: heartbeats with id 2, and the
// call com.alipay.test.S:1.0#m("x"), answered with "ok", with id 1.
var (
	heartbeat1  = unhex("0101000001000000020100000bb80000000000000000")
	ack1        = unhex("0100000001000000020100000000000000000000")
	heartbeat2  = unhex("02010100000100000002010000000bb80000000000000000")
	heartbeat2c = unhex("02020100000100000002010100000bb80000000000000000b4e5214e")
	ack2c       = unhex("02020000000100000002010100000000000000000000df6c94ba")
	request1a   = append(unhex("0101000101000000010100000bb8002c0024000000c2"), sofaRequest()...)
	request2c   = append(append(unhex("02020100010100000001010100000bb8002c0024000000c2"), sofaRequest()...), unhex("9932b1cd")...)
	response1a  = append(unhex("010000020100000001010000002e000000000064"), sofaResponse()...)
	response2c  = append(append(unhex("0202000002010000000101010000002e000000000064"), sofaResponse()...), unhex("14ee9658")...)
)

func golden() map[string][]byte {
	return map[string][]byte{"heartbeat1": heartbeat1, "ack1": ack1, "heartbeat2": heartbeat2, "heartbeat2c": heartbeat2c, "ack2c": ack2c,
		"request1": request1a, "request2c": request2c, "response1": response1a, "response2c": response2c}
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// str is a short string of Hessian.
func str(s string) string { return string(rune(len(s))) + s }

func headerOf(pairs ...string) []byte {
	var h []byte
	for i := 0; i < len(pairs); i += 2 {
		h = appendHeader(h, pairs[i], pairs[i+1])
	}
	return h
}

// body is a SofaRequest with these fields, then the argument "x".
func body(fields ...string) []byte {
	var b strings.Builder
	b.WriteString("O\xbc" + classRequest)
	b.WriteByte(byte(0x90 + len(fields)/2))
	for i := 0; i < len(fields); i += 2 {
		b.WriteString(str(fields[i]))
	}
	b.WriteString("o\x90")
	for i := 1; i < len(fields); i += 2 {
		b.WriteString(fields[i])
	}
	return []byte(b.String() + "\x01x")
}

const sigs = "Vt\x00\x11[java.lang.Stringn\x01\x10java.lang.Stringz"

func ordinary() []byte {
	return body("methodName", str("m"), "methodArgSigs", sigs, "targetServiceUniqueName", str("com.alipay.test.S:1.0"), "targetAppName", "N", "requestProps", "N")
}

func sofaRequest() []byte {
	return append(append([]byte(classRequest), headerOf("service", "com.alipay.test.S:1.0")...), ordinary()...)
}

func sofaResponse() []byte {
	const p = "com.alipay.sofa.rpc.core.response.SofaResponse"
	return []byte(p + "O\xbe" + p + "\x94" + str("isError") + str("errorMsg") + str("appResponse") + str("responseProps") + "o\x90FN\x02okN")
}

// frame makes a request of version 1.
func frame(codec byte, class string, header, content []byte) []byte {
	b := unhex("010100010100000007")
	b = append(b, codec, 0, 0, 0x0b, 0xb8)
	b = binary.BigEndian.AppendUint16(b, uint16(len(class)))
	b = binary.BigEndian.AppendUint16(b, uint16(len(header)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(content)))
	return append(append(append(b, class...), header...), content...)
}

func mustParse(t testing.TB, b []byte) (Frame, Extent) {
	t.Helper()
	x, err := Size(b)
	if err != nil || x.Len != len(b) {
		t.Fatalf("size %+v of %d, %v", x, len(b), err)
	}
	return Parse(b, x), x
}
