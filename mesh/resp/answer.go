package resp

// Answers follows what a server says, element by element: a line, a string, or the
// head of an aggregate, whose elements follow. It counts what is to come of an
// answer, and holds nothing of it.
type Answers struct {
	left uint32 // elements of the answer, 0 between answers
	push bool   // it is one that nobody asked for
	line bool   // in a line that goes on
	end  End

	// What Measure has found.
	kind byte
	add  int // elements after it
	size int
	more bool // the line goes on after it
}

// Measure tells how long the element, or the part of a line, is that begins with b,
// and 0 if more of b is needed.
func (a *Answers) Measure(b []byte) (size int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	a.add, a.more, a.size = 0, false, 0
	if a.line {
		size, a.more, err = line(b)
		return size, err
	}
	a.kind = b[0]
	n := 0
	switch a.kind {
	case '+', '-', ':', '_', '#', ',', '(':
		size, a.more, err = line(b)
		return size, err
	case '$', '=', '!':
		n, size, err = number(b, MaxBulk, a.kind == '$')
		if err != nil || size == 0 || n < 0 {
			return size, err
		}
		a.size = size + n + 2
		return a.size, nil
	case '*', '~', '%', '|', '>':
		if a.kind == '>' && a.left > 0 {
			return 0, malformed("a push within an answer")
		}
		n, size, err = number(b, MaxElements/2, a.kind == '*')
		if err != nil || size == 0 {
			return 0, err
		}
		if a.add = max(n, 0); a.kind == '%' || a.kind == '|' {
			a.add *= 2
		}
		if int(a.left)+a.add > MaxElements {
			return 0, malformed("an answer of more than %d elements", MaxElements)
		}
		return size, nil
	}
	return 0, malformed("an answer that begins with %q", b[:1])
}

// Begin is called when what Measure has found passes, Add with its bytes.
func (a *Answers) Begin() {
	if a.left == 0 {
		a.left, a.push = 1, a.kind == '>'
	}
	a.end.Begin(a.size)
	if a.line = a.more; a.line {
		return
	}
	a.left += uint32(a.add)
	if a.kind != '|' { // what it tells of comes after it
		a.left--
	}
}

func (a *Answers) Add(b []byte) error { return a.end.Add(b) }

// Within tells whether an answer has begun of which elements are to come, Push
// whether the last one that has begun was not asked for.
func (a *Answers) Within() bool { return a.left > 0 }
func (a *Answers) Push() bool   { return a.push }

// Progress is how far it has come, for Resume.
func (a *Answers) Progress() [3]uint32 {
	p := [3]uint32{a.left, 0, a.end.Left()}
	if a.push {
		p[1] |= 1
	}
	if a.line {
		p[1] |= 2
	}
	return p
}

func (a *Answers) Resume(p [3]uint32) {
	a.left, a.push, a.line = min(p[0], MaxElements), p[1]&1 != 0, p[1]&2 != 0
	if a.line && a.left == 0 {
		a.left = 1
	}
	a.end.Resume(p[2])
}
