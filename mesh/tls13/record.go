package tls13

import (
	"crypto/tls"
	"errors"
	"fmt"
)

// Sizes of RFC 8446 5.
const (
	headerLen  = 5
	nonceLen   = 12
	tagLen     = 16
	maxPlain   = 16 << 10
	maxCipher  = maxPlain + 256
	maxMessage = 1<<24 - 1 // bytes of a handshake message, by its length field
)

// Kinds of records.
const (
	kindAlert     = 21
	kindHandshake = 22
	kindData      = 23
)

// Handshake messages that may come after the handshake.
const (
	messageTicket    = 4
	messageKeyUpdate = 24
)

// Alerts.
const (
	alertCloseNotify = 0
	alertUnexpected  = 10
	alertBadRecord   = 20
	alertOverflow    = 22
	alertIllegal     = 47
	alertDecode      = 50
	alertInternal    = 80
	alertUserCancel  = 90
)

// fault is what this end does not put up with.
type fault struct {
	alert uint8
	why   error
}

func (f *fault) Error() string { return f.why.Error() }
func (f *fault) Unwrap() error { return f.why }

func refuse(alert uint8, format string, args ...any) error {
	return &fault{alert, fmt.Errorf("read record: "+format, args...)}
}

// remote is an alert of the peer.
func remote(alert uint8) error { return fmt.Errorf("remote error: %w", tls.AlertError(alert)) }

// seal appends p as one record of a kind. b has room for it.
func (h *half) seal(b []byte, kind byte, p []byte) ([]byte, error) {
	if err := h.count(); err != nil {
		return nil, err
	}
	n := len(p) + 1 + tagLen
	at := len(b)
	b = append(b, kindData, 3, 3, byte(n>>8), byte(n))
	b = append(b, p...)
	b = append(b, kind)
	body := at + headerLen
	return h.aead.Seal(b[:body], h.nonce[:], b[body:], b[at:body]), nil
}

var errMAC = errors.New("read record: it is not the peer's")

// open decrypts a whole record in place.
func (h *half) open(record []byte) (kind byte, plain []byte, err error) {
	head, body := record[:headerLen], record[headerLen:]
	if head[0] != kindData {
		return 0, nil, refuse(alertUnexpected, "kind %d is not encrypted", head[0])
	}
	if err := h.count(); err != nil {
		return 0, nil, &fault{alertInternal, err}
	}
	plain, err = h.aead.Open(body[:0], h.nonce[:], body, head)
	if err != nil {
		return 0, nil, &fault{alertBadRecord, errMAC}
	}
	n := len(plain)
	for n > 0 && plain[n-1] == 0 { // padding
		n--
	}
	if n == 0 {
		return 0, nil, refuse(alertUnexpected, "it has no kind")
	}
	if len(plain) > maxPlain+1 {
		return 0, nil, refuse(alertOverflow, "%d bytes of text", len(plain)-1)
	}
	return plain[n-1], plain[:n-1], nil
}
