package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// Names is a message of DNS that a workload sent or was sent. It comes from the
// network and is not to be trusted; it takes no part in any verdict.
type Names struct {
	ID       uint16 `json:"id"`
	Answer   bool   `json:"answer,omitempty"`
	Protocol string `json:"protocol"`
	Port     uint16 `json:"port"` // the workload's own
	Size     int    `json:"size"`
	// Cut: not all of the message was recorded, or not all of it can be read.
	Cut       bool         `json:"cut,omitempty"`
	Failure   uint8        `json:"failure,omitempty"`
	Questions []NameRecord `json:"questions,omitempty"`
	Answers   []NameRecord `json:"answers,omitempty"`
}

// NameRecord is a question, or an answer's record.
type NameRecord struct {
	Name string `json:"name"`
	Type string `json:"type"`
	TTL  uint32 `json:"ttl,omitempty"`
	Data string `json:"data,omitempty"`
}

func (n NameRecord) String() string {
	return strings.TrimSpace(n.Name + " " + n.Type + " " + n.Data)
}

const (
	maxNameRecords = 64
	namesShown     = 1232
)

var errMessage = errors.New("not a message of DNS")

// parseNames reads what there is of a message. Whatever the bytes are, it ends,
// and holds no more than they do.
func parseNames(b []byte) (n Names, err error) {
	const head = 12
	if len(b) < head {
		return n, fmt.Errorf("read message of %d bytes: %w", len(b), errMessage)
	}
	be := binary.BigEndian
	n.ID, n.Answer, n.Failure = be.Uint16(b), b[2]&0x80 != 0, b[3]&15
	at := head
	for range min(be.Uint16(b[4:]), maxNameRecords) {
		name, next, ok := readName(b, at)
		if !ok || next+4 > len(b) {
			n.Cut = true
			return n, nil
		}
		n.Questions = append(n.Questions, NameRecord{Name: name, Type: nameType(be.Uint16(b[next:]))})
		at = next + 4
	}
	for range min(be.Uint16(b[6:]), maxNameRecords) {
		r, next, ok := readRecord(b, at)
		if !ok {
			n.Cut = true
			return n, nil
		}
		n.Answers = append(n.Answers, r)
		at = next
	}
	n.Cut = be.Uint16(b[4:]) > maxNameRecords || be.Uint16(b[6:]) > maxNameRecords
	return n, nil
}

func readRecord(b []byte, at int) (r NameRecord, next int, ok bool) {
	const fixed = 10
	name, at, ok := readName(b, at)
	if !ok || at+fixed > len(b) {
		return r, 0, false
	}
	be := binary.BigEndian
	kind, size := be.Uint16(b[at:]), int(be.Uint16(b[at+8:]))
	r = NameRecord{Name: name, Type: nameType(kind), TTL: be.Uint32(b[at+4:])}
	at += fixed
	if at+size > len(b) {
		return r, 0, false
	}
	data := b[at : at+size]
	switch {
	case kind == 1 && size == 4, kind == 28 && size == 16:
		addr, _ := netip.AddrFromSlice(data)
		r.Data = addr.String()
	case kind == 2 || kind == 5 || kind == 12:
		r.Data, _, _ = readName(b, at)
	case kind == 15 && size > 2:
		r.Data, _, _ = readName(b, at+2)
	case kind == 16 && size > 0:
		r.Data = fmt.Sprintf("%q", data[1:min(size, 1+int(data[0]))])
	default:
		r.Data = fmt.Sprintf("%d bytes", size)
	}
	return r, at + size, true
}

// readName reads a name, of which parts may stand elsewhere, before it.
func readName(b []byte, at int) (name string, next int, ok bool) {
	const longest = 255
	var labels []string
	end, size := 0, 0
	for at < len(b) {
		c := int(b[at])
		switch {
		case c == 0:
			if end == 0 {
				end = at + 1
			}
			return strings.Join(labels, ".") + ".", end, true
		case c >= 0xc0:
			if at+2 > len(b) {
				return "", 0, false
			}
			if end == 0 {
				end = at + 2
			}
			to := (c&0x3f)<<8 | int(b[at+1])
			if to >= at { // always backwards, so it ends
				return "", 0, false
			}
			at = to
		case c > 63 || at+1+c > len(b):
			return "", 0, false
		default:
			label := strings.ToValidUTF8(string(b[at+1:at+1+c]), "\uFFFD")
			if size += c + 1; size > longest {
				return "", 0, false
			}
			// A dot inside a label is not one between two.
			labels = append(labels, strings.ReplaceAll(label, ".", `\.`))
			at += 1 + c
		}
	}
	return "", 0, false
}

func nameType(t uint16) string {
	names := map[uint16]string{1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV", 64: "SVCB", 65: "HTTPS", 255: "ANY"}
	if n, ok := names[t]; ok {
		return n
	}
	return fmt.Sprintf("TYPE%d", t)
}

// names reads the message behind an event.
func (e *Event) names(record []byte, protocol uint16) error {
	size := int(uint32(e.Detail))
	n, err := parseNames(record)
	if err != nil {
		return fmt.Errorf("decode event: %w", err)
	}
	n.Size, n.Port, n.Cut = size, uint16(e.Detail>>32), n.Cut || size > len(record)
	n.Protocol = "udp"
	if protocol == 6 {
		n.Protocol = "tcp"
	}
	e.Names, e.Detail = &n, 0
	return nil
}

func (n *Names) String() string {
	if n.Answer {
		return fmt.Sprintf("for %v: %v", n.Questions, n.Answers)
	}
	return fmt.Sprint(n.Questions)
}
