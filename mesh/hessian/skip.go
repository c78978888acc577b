package hessian

// Skip passes over one value, with all that is in it.
func (r *Reader) Skip() error {
	if r.depth == MaxDepth {
		return r.fault("values are nested deeper than %d", MaxDepth)
	}
	r.depth++
	defer func() { r.depth-- }()
	tag, err := r.byte()
	for err == nil && tag == r.definition() {
		// A class is defined where its first object stands.
		if _, _, err = r.class(nil); err == nil {
			tag, err = r.byte()
		}
	}
	if err != nil {
		return err
	}
	if r.stringTag(tag) {
		return r.skipString(tag)
	}
	if n, ok := r.plain(tag); ok {
		_, err := r.take(n)
		return err
	}
	if r.draft {
		return r.skipDraft(tag)
	}
	return r.skipFinal(tag)
}

func (r *Reader) skipString(tag byte) error {
	s, last, err := r.piece(tag)
	for err == nil {
		if r.Text != nil {
			r.Text(s)
		}
		if last {
			return nil
		}
		s, last, err = r.next()
	}
	return err
}

// plain tells how many bytes follow the tag of a value of fixed size.
func (r *Reader) plain(tag byte) (int, bool) {
	switch {
	case tag == 'N', tag == 'T', tag == 'F', tag >= 0x80 && tag <= 0xbf, tag >= 0xd8 && tag <= 0xef:
		return 0, true
	case tag >= 0x20 && tag <= 0x2f: // bytes
		return int(tag - 0x20), true
	case tag >= 0xc0 && tag <= 0xcf, tag >= 0xf0:
		return 1, true
	case tag >= 0xd0 && tag <= 0xd7, tag >= 0x38 && tag <= 0x3f:
		return 2, true
	case tag == 'I':
		return 4, true
	case tag == 'L', tag == 'D':
		return 8, true
	case r.draft:
		return plainDraft(tag)
	}
	switch tag {
	case 0x5b, 0x5c: // 0.0 and 1.0
		return 0, true
	case 0x5d:
		return 1, true
	case 0x5e:
		return 2, true
	case 0x4b, 0x59, 0x5f: // minutes, a long and a double of four bytes
		return 4, true
	case 0x4a: // milliseconds
		return 8, true
	}
	return 0, false
}

func plainDraft(tag byte) (int, bool) {
	switch tag {
	case 'g', 'h': // 0.0 and 1.0
		return 0, true
	case 'i', 'J': // a double of one byte, a reference
		return 1, true
	case 'j', 'K':
		return 2, true
	case 'k', 'w', 'R':
		return 4, true
	case 'd': // milliseconds
		return 8, true
	}
	return 0, false
}

func (r *Reader) skipFinal(tag byte) error {
	switch {
	case tag == 'Q':
		_, err := r.Int()
		return err
	case tag == 'A', tag == 'B', tag >= 0x34 && tag <= 0x37:
		return r.skipBytes(tag)
	case tag == 'U', tag == 'M':
		if err := r.typeName(); err != nil {
			return err
		}
		return r.skipToEnd(tag == 'M', -1)
	case tag == 'W', tag == 'H':
		return r.skipToEnd(tag == 'H', -1)
	case tag == 'V', tag >= 0x70 && tag <= 0x77:
		if err := r.typeName(); err != nil {
			return err
		}
	case tag != 'X' && (tag < 0x78 || tag > 0x7f):
		class, err := r.instance(tag)
		if err != nil {
			return err
		}
		return r.skipN(int(r.fields[class]))
	}
	n := int(tag & 7)
	if tag == 'V' || tag == 'X' {
		var err error
		if n, err = r.count(len(r.b)); err != nil {
			return err
		}
	}
	return r.skipN(n)
}

func (r *Reader) skipDraft(tag byte) error {
	switch tag {
	case 'b', 'B':
		return r.skipBytes(tag)
	case 'M':
		if err := r.typeName(); err != nil {
			return err
		}
		return r.skipToEnd(true, -1)
	case 'V':
		if err := r.typeName(); err != nil {
			return err
		}
		n, err := r.length()
		if err != nil {
			return err
		}
		return r.skipToEnd(false, n)
	case 'v':
		if _, err := r.Int(); err != nil { // the type
			return err
		}
		n, err := r.count(len(r.b))
		if err != nil {
			return err
		}
		return r.skipN(n)
	}
	class, err := r.instance(tag)
	if err != nil {
		return err
	}
	return r.skipN(int(r.fields[class]))
}

// skipBytes passes over a binary value in pieces.
func (r *Reader) skipBytes(tag byte) error {
	for {
		var n int
		var err error
		switch {
		case tag >= 0x20 && tag <= 0x2f:
			n = int(tag - 0x20)
		case !r.draft && tag >= 0x34 && tag <= 0x37:
			var low byte
			low, err = r.byte()
			n = int(tag-0x34)<<8 | int(low)
		case tag == 'B', r.draft && tag == 'b', !r.draft && tag == 'A':
			n, err = r.uint16()
		default:
			return r.unknown("a further piece of bytes", tag)
		}
		if err == nil {
			_, err = r.take(n)
		}
		if err != nil || tag != 'A' && tag != 'b' {
			return err
		}
		if tag, err = r.byte(); err != nil {
			return err
		}
	}
}

// typeName passes over the type of a list or a map, which the draft may leave
// out.
func (r *Reader) typeName() error {
	if !r.draft {
		if r.IsString() {
			name, err := r.String()
			r.named(name)
			return err
		}
		_, err := r.Int()
		return err
	}
	tag, err := r.peek()
	if err != nil {
		return err
	}
	switch tag {
	case 't':
		r.at++
		n, err := r.uint16()
		if err == nil {
			var name []byte
			name, err = r.chars(n)
			r.named(name)
		}
		return err
	case 'u':
		r.at++
		_, err := r.Int()
		return err
	case 'T':
		// A type for some readers, the value true for others.
		return r.fault("a type begins with %#02x", tag)
	}
	return nil
}

// length reads the length of a list of the draft, -1 if it is left out.
func (r *Reader) length() (int, error) {
	tag, err := r.peek()
	if err != nil {
		return 0, err
	}
	switch tag {
	case 'n':
		r.at++
		c, err := r.byte()
		return int(c), err
	case 'l':
		r.at++
		b, err := r.take(4)
		if err != nil {
			return 0, err
		}
		n := int(int32(uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])))
		if n < 0 || n > len(r.b) {
			return 0, r.fault("a list of %d values", n)
		}
		return n, nil
	}
	return -1, nil
}

func (r *Reader) skipN(n int) error {
	for range n {
		if err := r.Skip(); err != nil {
			return err
		}
	}
	return nil
}

// skipToEnd passes over the values of a list, or the pairs of a map, and the
// end. A list that says how long it is must be: some readers go by that, and
// some by the end.
func (r *Reader) skipToEnd(pairs bool, want int) error {
	for n := 0; ; n++ {
		more, err := r.More()
		if err != nil {
			return err
		}
		if !more {
			if want >= 0 && n != want {
				return r.fault("a list of %d values has %d", want, n)
			}
			return nil
		}
		if err := r.Skip(); err != nil {
			return err
		}
		if pairs {
			if err := r.Skip(); err != nil {
				return err
			}
		}
	}
}
