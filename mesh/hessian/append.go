package hessian

// AppendString appends s as both dialects write it, with a question mark for
// what is not ASCII. What has no room in one piece is left out.
func AppendString(dst []byte, s string) []byte {
	s = s[:min(len(s), 0xffff)]
	if len(s) <= 0x1f {
		dst = append(dst, byte(len(s)))
	} else {
		dst = append(dst, 'S', byte(len(s)>>8), byte(len(s)))
	}
	for i := range len(s) {
		c := s[i]
		if c >= 0x80 {
			c = '?'
		}
		dst = append(dst, c)
	}
	return dst
}

// AppendInt appends a small integer, -16 to 47.
func AppendInt(dst []byte, n int) []byte { return append(dst, byte(0x90+n)) }
