// Package proxyproto reads and writes the header by which a proxy tells the next
// one who its client is: the PROXY protocol, versions 1 and 2.
//
// Whoever may send it decides what addresses appear in logs and limits: to
// believe it of trusted networks only is up to the caller.
package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// MaxHeader is the longest header accepted: version 2 with some extensions.
const MaxHeader = 16 + 512

const maxV1 = 107

var signature = []byte("\r\n\r\n\x00\r\nQUIT\n")

// ErrMalformed is what is no header.
var ErrMalformed = errors.New("no PROXY protocol header")

// Header says who talks to whom. Invalid addresses mean that the proxy talks for
// itself.
type Header struct{ Source, Destination netip.AddrPort }

// Parse reads the header at the beginning of b. n is its length; 0 means that
// more must come.
func Parse(b []byte) (h Header, n int, err error) {
	switch {
	case len(b) >= len(signature) && bytes.Equal(b[:len(signature)], signature):
		return parse2(b)
	case len(b) < len(signature) && bytes.HasPrefix(signature, b):
		return h, 0, nil
	case bytes.HasPrefix(b, []byte("PROXY ")) || bytes.HasPrefix([]byte("PROXY "), b):
		return parse1(b)
	}
	return h, 0, ErrMalformed
}

func parse1(b []byte) (h Header, n int, err error) {
	end := bytes.IndexByte(b[:min(len(b), maxV1)], '\n')
	if end < 0 {
		if len(b) >= maxV1 {
			return h, 0, ErrMalformed
		}
		return h, 0, nil
	}
	line, ok := strings.CutSuffix(string(b[:end+1]), "\r\n")
	parts := strings.Split(line, " ")
	if !ok {
		return h, 0, ErrMalformed
	}
	if len(parts) >= 2 && parts[1] == "UNKNOWN" {
		return h, end + 1, nil
	}
	if len(parts) != 6 || parts[1] != "TCP4" && parts[1] != "TCP6" {
		return h, 0, ErrMalformed
	}
	source, err1 := address1(parts[2], parts[4], parts[1] == "TCP4")
	destination, err2 := address1(parts[3], parts[5], parts[1] == "TCP4")
	if err := errors.Join(err1, err2); err != nil {
		return h, 0, ErrMalformed
	}
	return Header{source, destination}, end + 1, nil
}

func address1(ip, port string, four bool) (netip.AddrPort, error) {
	a, err := netip.ParseAddr(ip)
	if err != nil || a.Is4() != four || a.Zone() != "" {
		return netip.AddrPort{}, ErrMalformed
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || port[0] == '0' && len(port) > 1 || port[0] == '+' {
		return netip.AddrPort{}, ErrMalformed
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), nil
}

func parse2(b []byte) (h Header, n int, err error) {
	if len(b) < 16 {
		return h, 0, nil
	}
	size := int(binary.BigEndian.Uint16(b[14:]))
	if b[12]>>4 != 2 || b[12]&15 > 1 || 16+size > MaxHeader {
		return h, 0, ErrMalformed
	}
	if len(b) < 16+size {
		return h, 0, nil
	}
	n, body := 16+size, b[16:16+size]
	if b[12]&15 == 0 { // LOCAL
		return h, n, nil
	}
	width := 0
	switch b[13] {
	case 0x11:
		width = 4
	case 0x21:
		width = 16
	default:
		return h, n, nil // not TCP: nobody we know
	}
	if len(body) < 2*width+4 {
		return h, 0, ErrMalformed
	}
	source, _ := netip.AddrFromSlice(body[:width])
	destination, _ := netip.AddrFromSlice(body[width : 2*width])
	ports := body[2*width:]
	h.Source = netip.AddrPortFrom(source.Unmap(), binary.BigEndian.Uint16(ports))
	h.Destination = netip.AddrPortFrom(destination.Unmap(), binary.BigEndian.Uint16(ports[2:]))
	return h, n, nil
}

// Append1 appends a header of version 1.
func Append1(dst []byte, h Header) []byte {
	s, d := h.Source.Addr().Unmap(), h.Destination.Addr().Unmap()
	if !s.IsValid() || !d.IsValid() || s.Is4() != d.Is4() {
		return append(dst, "PROXY UNKNOWN\r\n"...)
	}
	family := "TCP6"
	if s.Is4() {
		family = "TCP4"
	}
	return fmt.Appendf(dst, "PROXY %s %s %s %d %d\r\n", family, s.WithZone(""), d.WithZone(""), h.Source.Port(), h.Destination.Port())
}

// Append2 appends a header of version 2.
func Append2(dst []byte, h Header) []byte {
	s, d := h.Source.Addr().Unmap(), h.Destination.Addr().Unmap()
	dst = append(dst, signature...)
	if !s.IsValid() || !d.IsValid() || s.Is4() != d.Is4() {
		return append(dst, 0x20, 0, 0, 0) // LOCAL
	}
	family, size := byte(0x21), byte(36)
	if s.Is4() {
		family, size = 0x11, 12
	}
	dst = append(dst, 0x21, family, 0, size)
	dst = append(dst, s.AsSlice()...)
	dst = append(dst, d.AsSlice()...)
	dst = binary.BigEndian.AppendUint16(dst, h.Source.Port())
	return binary.BigEndian.AppendUint16(dst, h.Destination.Port())
}
