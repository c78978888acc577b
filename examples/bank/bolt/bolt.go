// Package bolt speaks the first version of SOFARPC's bolt protocol, as far as
// the bank needs it: requests and heartbeats, hessian content.
//
// It does not speak the second version, and it reads no content larger than
// 64 KiB.
package bolt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Types and commands of a frame.
const (
	typeResponse = 0
	typeRequest  = 1
	typeOneWay   = 2

	commandHeartbeat = 0
	commandRequest   = 1
	commandResponse  = 2

	codecHessian = 1
)

// Status of a response.
const (
	StatusOK          = 0
	StatusError       = 1
	StatusException   = 2
	StatusNoProcessor = 6
	StatusCodec       = 9
)

// Class names of what a frame carries.
const (
	requestClass  = "com.alipay.sofa.rpc.core.request.SofaRequest"
	responseClass = "com.alipay.sofa.rpc.core.response.SofaResponse"
)

const (
	requestHead  = 22
	responseHead = 20
	maxContent   = 64 << 10
	maxText      = 8 << 10 // of class and header
)

// frame is one message.
type frame struct {
	kind    byte
	command uint16
	id      uint32
	timeout int32  // of a request, milliseconds
	status  uint16 // of a response
	class   string
	header  []pair
	content []byte
}

// pair is one entry of a header.
type pair struct{ key, value string }

// append adds the frame's bytes to b.
func (f frame) append(b []byte) []byte {
	be := binary.BigEndian
	b = append(b, 1, f.kind)
	b = be.AppendUint16(b, f.command)
	b = append(b, 1)
	b = be.AppendUint32(b, f.id)
	b = append(b, codecHessian)
	if f.kind == typeResponse {
		b = be.AppendUint16(b, f.status)
	} else {
		b = be.AppendUint32(b, uint32(f.timeout))
	}
	header := appendHeader(nil, f.header)
	b = be.AppendUint16(b, uint16(len(f.class)))
	b = be.AppendUint16(b, uint16(len(header)))
	b = be.AppendUint32(b, uint32(len(f.content)))
	b = append(b, f.class...)
	b = append(b, header...)
	return append(b, f.content...)
}

func appendHeader(b []byte, header []pair) []byte {
	for _, p := range header {
		for _, s := range []string{p.key, p.value} {
			b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
			b = append(b, s...)
		}
	}
	return b
}

// readFrame reads one frame, refusing what is larger than the bank's calls are.
func readFrame(r io.Reader) (frame, error) {
	be := binary.BigEndian
	var buf [requestHead]byte
	head := buf[:responseHead]
	if _, err := io.ReadFull(r, head); err != nil {
		return frame{}, err
	}
	f := frame{kind: head[1], command: be.Uint16(head[2:]), id: be.Uint32(head[5:])}
	switch {
	case head[0] != 1:
		return frame{}, fmt.Errorf("read frame: protocol %d is not spoken here", head[0])
	case f.kind > typeOneWay:
		return frame{}, fmt.Errorf("read frame: unknown type %d", f.kind)
	case head[9] != codecHessian:
		return frame{}, fmt.Errorf("read frame: codec %d is not spoken here", head[9])
	}
	sizes := head[12:]
	if f.kind == typeResponse {
		f.status = be.Uint16(head[10:])
	} else {
		head = buf[:]
		if _, err := io.ReadFull(r, head[responseHead:]); err != nil {
			return frame{}, noEOF(err)
		}
		f.timeout, sizes = int32(be.Uint32(head[10:])), head[14:]
	}
	class, header, content := int(be.Uint16(sizes)), int(be.Uint16(sizes[2:])), be.Uint32(sizes[4:])
	if class > maxText || header > maxText || content > maxContent {
		return frame{}, fmt.Errorf("read frame: class of %d, header of %d, content of %d bytes is too large", class, header, content)
	}
	body := make([]byte, class+header+int(content))
	if _, err := io.ReadFull(r, body); err != nil {
		return frame{}, noEOF(err)
	}
	f.class, f.content = string(body[:class]), body[class+header:]
	var err error
	f.header, err = parseHeader(body[class : class+header])
	return f, err
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func parseHeader(b []byte) ([]pair, error) {
	var out []pair
	for len(b) > 0 {
		var p pair
		for _, s := range []*string{&p.key, &p.value} {
			if len(b) < 4 {
				return nil, errors.New("read frame: header is cut")
			}
			n := int32(binary.BigEndian.Uint32(b))
			b = b[4:]
			if n == -1 {
				continue // null
			}
			if n < 0 || int(n) > len(b) {
				return nil, errors.New("read frame: header is cut")
			}
			*s, b = string(b[:n]), b[n:]
		}
		out = append(out, p)
	}
	return out, nil
}
