package guard

import "math/bits"

// Verification of Ed25519 signatures (RFC 8032), and nothing else of it: there is
// no secret here, so nothing need take the same time for all. The standard
// library's would bring os, fmt, reflect and math/big into PID 1. Tests compare
// the two.

// number is an element of the field of 2^255-19, little-endian, below 2^256 and
// not always below the field's order.
type number [4]uint64

var (
	fieldOrder = number{0xffffffffffffffed, ^uint64(0), ^uint64(0), 0x7fffffffffffffff}
	groupOrder = number{0x5812631a5cf5d3ed, 0x14def9dea2f79cd6, 0, 0x1000000000000000}
)

func load(b []byte) (n number) {
	c := &cursor{b: b}
	for i := range n {
		n[i] = c.u64()
	}
	return n
}

// below says whether n is less than m, of whatever they are.
func (n *number) below(m *number) bool {
	_, borrow := n.minus(m)
	return borrow != 0
}

func (n *number) minus(m *number) (d number, borrow uint64) {
	for i := range n {
		d[i], borrow = bits.Sub64(n[i], m[i], borrow)
	}
	return d, borrow
}

// small adds v, which may be up to 2^64 less 39.
func (n *number) small(v uint64) {
	carry := v
	for i := range n {
		n[i], carry = bits.Add64(n[i], carry, 0)
	}
	if carry != 0 { // 2^256 is 38 here; n is next to 0 now
		n[0] += 38
	}
}

func (n number) add(m number) number {
	var carry uint64
	for i := range n {
		n[i], carry = bits.Add64(n[i], m[i], carry)
	}
	n.small(38 * carry)
	return n
}

func (n number) sub(m number) number {
	d, borrow := n.minus(&m)
	for borrow != 0 {
		d, borrow = d.minus(&number{38})
	}
	return d
}

func (n number) mul(m number) (p number) {
	var wide [8]uint64
	for i := range n {
		var carry uint64
		for j := range m {
			hi, lo := bits.Mul64(n[i], m[j])
			var c uint64
			lo, c = bits.Add64(lo, wide[i+j], 0)
			hi += c
			lo, c = bits.Add64(lo, carry, 0)
			wide[i+j], carry = lo, hi+c
		}
		wide[i+4] = carry
	}
	var carry uint64
	for i := range p {
		hi, lo := bits.Mul64(wide[i+4], 38)
		var c uint64
		lo, c = bits.Add64(lo, carry, 0)
		hi += c
		lo, c = bits.Add64(lo, wide[i], 0)
		p[i], carry = lo, hi+c
	}
	p.small(38 * carry)
	return p
}

func (n number) pow(e number) number {
	p := number{1}
	for i := 255; i >= 0; i-- {
		p = p.mul(p)
		if e[i/64]>>(i%64)&1 != 0 {
			p = p.mul(n)
		}
	}
	return p
}

// whole gives the one number below the field's order that n stands for.
func (n number) whole() number {
	for !n.below(&fieldOrder) {
		n, _ = n.minus(&fieldOrder)
	}
	return n
}

func (n number) is(m number) bool { return n.whole() == m.whole() }

func (n number) inverse() number {
	e := fieldOrder
	e[0] -= 2
	return n.pow(e)
}

// half gives e>>by.
func half(e number, by uint) number {
	for i := range e {
		e[i] >>= by
		if i < 3 {
			e[i] |= e[i+1] << (64 - by)
		}
	}
	return e
}

// curve holds what is the same for all points.
type curve struct{ d, root number }

func newCurve() curve {
	minus := number{}.sub(number{121665})
	e := fieldOrder
	e[0]--
	return curve{minus.mul(number{121666}.inverse()), number{2}.pow(half(e, 2))}
}

// point is one of the curve, in extended coordinates.
type point struct{ x, y, z, t number }

// add is complete: it doubles, too.
func (c *curve) add(p, q point) point {
	a := p.y.sub(p.x).mul(q.y.sub(q.x))
	b := p.y.add(p.x).mul(q.y.add(q.x))
	k := p.t.mul(q.t).mul(c.d.add(c.d))
	d := p.z.mul(q.z)
	d = d.add(d)
	e, f, g, h := b.sub(a), d.sub(k), d.add(k), b.add(a)
	return point{e.mul(f), g.mul(h), f.mul(g), e.mul(h)}
}

// decode reads a point.
func (c *curve) decode(b []byte) (p point, ok bool) {
	y := load(b)
	odd := y[3] >> 63
	y[3] &^= 1 << 63
	one, square := number{1}, y.mul(y)
	u, v := square.sub(one), square.mul(c.d).add(one)
	v3 := v.mul(v).mul(v)
	e := fieldOrder
	e[0] -= 5
	x := u.mul(v3).mul(u.mul(v3.mul(v3).mul(v)).pow(half(e, 3)))
	switch w := v.mul(x).mul(x); {
	case w.is(u):
	case w.is(number{}.sub(u)):
		x = x.mul(c.root)
	default:
		return p, false
	}
	if x = x.whole(); x[0]&1 != odd {
		x = number{}.sub(x)
	}
	return point{x, y, one, x.mul(y)}, true
}

func (p *point) encode() (b []byte) {
	z := p.z.inverse()
	x, y := p.x.mul(z).whole(), p.y.mul(z).whole()
	y[3] |= x[0] << 63
	for _, v := range y {
		b = append64(b, v)
	}
	return b
}

// scalar takes what has 512 bits to what is below the group's order.
func scalar(wide [64]byte) (n number) {
	for i := 511; i >= 0; i-- {
		n = n.add(n) // far below 2^255
		n[0] |= uint64(wide[i/8] >> (i % 8) & 1)
		if !n.below(&groupOrder) {
			n, _ = n.minus(&groupOrder)
		}
	}
	return n
}

// verify says whether a signature of a message is by the holder of a key.
func verify(key, message, signature []byte) bool {
	if len(key) != 32 || len(signature) != 64 {
		return false
	}
	s := load(signature[32:])
	if !s.below(&groupOrder) {
		return false
	}
	c := newCurve()
	a, ok := c.decode(key)
	base := number{4}.mul(number{5}.inverse()).whole()
	b, okay := c.decode((&point{y: base, z: number{1}}).encode())
	if !ok || !okay {
		return false
	}
	k := scalar(sha512(signature[:32], key, message))
	a.x, a.t = number{}.sub(a.x), number{}.sub(a.t)
	both, sum := c.add(a, b), point{y: number{1}, z: number{1}}
	for i := 255; i >= 0; i-- {
		sum = c.add(sum, sum)
		switch s[i/64]>>(i%64)&1 | k[i/64]>>(i%64)&1<<1 {
		case 1:
			sum = c.add(sum, b)
		case 2:
			sum = c.add(sum, a)
		case 3:
			sum = c.add(sum, both)
		}
	}
	return string(sum.encode()) == string(signature[:32])
}
