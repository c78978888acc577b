package guard

import (
	"strconv"
	"syscall"
)

// The section of a policy that is about files, as package guard compiles it.
const (
	sectionFiles = 32

	maxFileRules = 16 << 10
	maxLists     = 16 << 10
	maxListed    = 16

	wantWrite = 1
	wantRead  = 2

	exceptions  = 16
	exceptSize  = 20
	fileSetSize = 16 + exceptions*exceptSize // struct fileset of guard/bpf/src/policy.h
	nameSize    = 256                        // of its struct name, NUL included
)

// fileRule is one rule about a path. base is what nobody may do but whom the
// rule allows it; 0 stands for all, if something is allowed.
type fileRule struct {
	policy, list uint16
	base, allow  uint8
	ref, watch   uint32
	path         string
}

// says whether the rule decides who may do what; else it only records.
func (r *fileRule) decides() bool { return r.base|r.allow != 0 }

// denied is what the rule denies to somebody.
func (r *fileRule) denied() uint8 {
	if r.base == 0 && r.allow != 0 {
		return wantWrite | wantRead
	}
	return r.base
}

// parseFiles reads the section: lists of programs, then rules.
func (p *policy) parseFiles(data []byte) error {
	c := &cursor{b: data}
	for range c.count(c.u32(), maxLists) {
		var list []string
		for range c.count(c.u16(), maxListed) {
			list = append(list, c.text())
		}
		p.lists = append(p.lists, list)
		if c.bad {
			break
		}
	}
	for range c.count(c.u32(), maxFileRules) {
		r := fileRule{policy: uint16(c.u16()), list: uint16(c.u16())}
		if b := c.take(2); b != nil {
			r.base, r.allow = b[0], b[1]
		}
		r.ref, r.watch, r.path = c.u32(), c.u32(), c.text()
		if r.base|r.allow > wantWrite|wantRead || int(r.list) > len(p.lists) {
			c.bad = true
		}
		if c.bad {
			break
		}
		p.files = append(p.files, r)
	}
	if c.bad || len(c.b) != 0 {
		return fail("read", "rules for files of guard policy", syscall.EBADMSG)
	}
	return nil
}

// fileWishes is what rules want of a place.
type fileWishes struct {
	rules  []int  // of the policy's files, those whose path this is
	anchor uint32 // the place must not come to be: a protected path would lead through it
}

// group is what decides for one policy: all its rules of one path.
type group struct {
	policy uint16
	rules  []int
}

// fileSet is what holds for an object: a group of each policy that says
// something, and the rule that wants changes recorded.
type fileSet struct {
	groups []*group
	watch  uint32
}

// with gives the set of a place below: its rules take the place of those that
// their policies had above.
func (s fileSet) with(n *next, rules []int) fileSet {
	if len(rules) == 0 {
		return s
	}
	byPolicy := map[uint16][]int{}
	for _, i := range rules {
		r := &n.p.files[i]
		if r.watch != 0 {
			s.watch = stronger(s.watch, r.watch)
		}
		if r.decides() {
			byPolicy[r.policy] = append(byPolicy[r.policy], i)
		}
	}
	if len(byPolicy) == 0 {
		return s
	}
	old := s.groups
	s.groups = nil
	for _, g := range old {
		if _, replaced := byPolicy[g.policy]; !replaced {
			s.groups = append(s.groups, g)
		}
	}
	for _, i := range rules { // in the order of the rules, whatever that of the map is
		policy := n.p.files[i].policy
		if list := byPolicy[policy]; list != nil {
			s.groups = append(s.groups, n.group(policy, list))
			delete(byPolicy, policy)
		}
	}
	return s
}

// join gives what holds for an object that is at two places.
func (s fileSet) join(other fileSet) fileSet {
	s.watch = stronger(s.watch, other.watch)
	groups := append([]*group(nil), s.groups...)
	for _, g := range other.groups {
		known := false
		for _, have := range s.groups {
			known = known || have == g
		}
		if !known {
			groups = append(groups, g)
		}
	}
	s.groups = groups
	return s
}

func (s fileSet) empty() bool { return len(s.groups) == 0 && s.watch == 0 }

// group gives the one group of these rules.
func (n *next) group(policy uint16, rules []int) *group {
	var key []byte
	for _, i := range rules {
		key = append32(key, uint32(i))
	}
	g := n.groups[string(key)]
	if g == nil {
		g = &group{policy, rules}
		n.groups[string(key)] = g
	}
	return g
}

// holding is what an object or a name is held to by the policy on its way.
type holding struct {
	set    fileSet
	anchor uint32
	home   uint32 // id of the directory it is in
	homes  int    // in how many it was found
}

// protectFiles finds what the rules' paths lead to in a root and says what
// holds there.
func (n *next) protectFiles(root int) error {
	if len(n.p.files) == 0 {
		return nil
	}
	top := &place{}
	for i := range n.p.files {
		if err := n.protect(root, top, i); err != nil {
			return fail("protect", strconv.Quote(n.p.files[i].path), err)
		}
	}
	return n.settle(top, fileSet{})
}

// protect walks to what a rule is about, and keeps what leads there in place.
func (n *next) protect(root int, top *place, index int) error {
	r := &n.p.files[index]
	anchor := uint32(0)
	if r.denied() != 0 {
		anchor = r.ref
	}
	w := walker{root: root, top: top}
	w.step = func(fd int, at *place, last bool) error {
		m, err := n.g.take(fd)
		if err != nil {
			return fail("mark", strconv.Quote(at.name), err)
		}
		at.mark = m
		if last {
			at.rules = append(at.rules, index)
			return nil
		}
		h := n.holding(m)
		h.anchor = stronger(h.anchor, anchor)
		return nil
	}
	w.absent = func(at *place, rest string) error {
		n.note(r.ref, absentName, 0)
		if onlySlashes(rest) {
			at.rules = append(at.rules, index)
		} else {
			at.anchor = stronger(at.anchor, anchor)
		}
		return nil
	}
	return n.lost(r.ref, w.walk(r.path))
}

// settle says what holds at every place that rules speak of.
func (n *next) settle(at *place, set fileSet) error {
	set = set.with(n, at.rules)
	if len(at.rules) > 0 {
		if at.mark != nil {
			n.hold(at, set)
		}
		n.holdName(at, set)
	} else if at.anchor != 0 {
		n.holdName(at, fileSet{})
	}
	if len(at.rules) == 0 && at.mounted && at.mark != nil && !set.empty() {
		n.hold(at, set)
	}
	for _, c := range at.in {
		if err := n.settle(c, set); err != nil {
			return err
		}
	}
	return nil
}

func (n *next) holding(m *mark) *holding {
	h := n.held[m]
	if h == nil {
		h = &holding{}
		n.held[m] = h
	}
	return h
}

// hold holds an object to a set, besides what other places hold it to.
func (n *next) hold(at *place, set fileSet) {
	h := n.holding(at.mark)
	h.set = h.set.join(set)
	if at.up == nil || at.up.mark == nil {
		return
	}
	if home := at.up.mark.id; h.home != home {
		h.home = home
		h.homes++
	}
}

// holdName holds whatever comes to bear the name to the set, too.
func (n *next) holdName(at *place, set fileSet) {
	if at.up == nil || at.up.mark == nil || len(at.name) >= nameSize {
		return
	}
	dir := n.meaning(at.up.mark)
	if dir.names == 0 {
		n.sets++
		dir.names = n.sets
	}
	var key [4 + nameSize]byte
	put32(key[:], dir.names)
	copy(key[4:], at.name)
	h := n.names[string(key[:])]
	if h == nil {
		h = &holding{}
		n.names[string(key[:])] = h
	}
	h.set = h.set.join(set)
	h.anchor = stronger(h.anchor, at.anchor)
}

// meaning gives what an object means to the policy on its way.
func (n *next) meaning(m *mark) *meaning {
	m.slot[n.slot].generation = n.p.generation
	return &m.slot[n.slot]
}

// mean writes down what was found out about every object.
func (n *next) mean() error {
	for m, h := range n.held {
		id, err := n.setID(h.set)
		if err != nil {
			return err
		}
		s := n.meaning(m)
		s.rules, s.anchor = id, h.anchor
		if h.homes == 1 {
			s.home = h.home
		}
	}
	return nil
}

// setID gives the number of a set in the map of sets; 0 is the empty one.
func (n *next) setID(s fileSet) (uint32, error) {
	if s.empty() {
		return 0, nil
	}
	b := n.setBytes(s)
	if id, ok := n.setIDs[string(b)]; ok {
		return id, nil
	}
	id := uint32(len(n.setIDs) + 1)
	n.setIDs[string(b)] = id
	return id, nil
}

// setBytes is struct fileset. What has no room in it is denied to everybody, and
// said to be lost.
func (n *next) setBytes(s fileSet) []byte {
	var write, read, count uint32
	deny := func(what uint8, ref uint32) {
		if what&wantWrite != 0 {
			write = stronger(write, ref)
		}
		if what&wantRead != 0 {
			read = stronger(read, ref)
		}
	}
	var except [exceptions * exceptSize]byte
	for _, g := range s.groups {
		var base, all, some uint8
		var ref uint32
		var lists []*fileRule
		for _, i := range g.rules {
			r := &n.p.files[i]
			if r.allow == 0 {
				deny(r.base, r.ref)
				continue
			}
			base |= r.denied()
			ref = stronger(ref, r.ref)
			if r.list == 0 {
				all |= r.allow
				continue
			}
			some |= r.allow
			lists = append(lists, r)
		}
		base &^= all
		if int(count)+len(lists) > exceptions {
			n.note(ref, absentLost, syscall.E2BIG)
			some, lists = 0, nil
		}
		deny(base&^some, ref)
		if base &= some; base == 0 {
			continue
		}
		for i, r := range lists {
			e := except[count*exceptSize:]
			put32(e, uint32(r.list))
			put32(e[4:], uint32(r.allow))
			if i == len(lists)-1 {
				if base&wantWrite != 0 {
					put32(e[8:], ref)
				}
				if base&wantRead != 0 {
					put32(e[12:], ref)
				}
				put32(e[16:], 1)
			}
			count++
		}
	}
	b := append32(append32(append32(append32(nil, write), read), s.watch&^denies), count)
	return append(b, except[:]...)
}

// trust finds the programs that rules name, in a root's image.
func (n *next) trust(root guardedRoot) error {
	for i, list := range n.p.lists {
		ref := n.strongest(uint16(i + 1))
		for _, path := range list {
			key, err := n.find(root, path)
			if err != nil {
				return fail("find program", strconv.Quote(path), err)
			}
			if key == "" {
				n.noteList(uint16(i + 1))
				continue
			}
			for _, k := range [...]string{trustedKey(0, key), trustedKey(uint32(i+1), key)} {
				n.trusted[k] = stronger(n.trusted[k], ref)
			}
		}
	}
	return nil
}

// noteList says that some rules' list names a program that is not there: it may
// do nothing, and neither may who is not on the list.
func (n *next) noteList(list uint16) {
	for i := range n.p.files {
		if r := &n.p.files[i]; r.list == list {
			n.note(r.ref, absentName, 0)
		}
	}
}

// strongest is the rule that a list's programs are guarded by.
func (n *next) strongest(list uint16) (ref uint32) {
	for i := range n.p.files {
		if r := &n.p.files[i]; r.list == list {
			ref = stronger(ref, r.ref)
		}
	}
	return ref
}

// trustedKey is struct listed_program of guard/bpf/src/policy.h.
func trustedKey(list uint32, object string) string {
	return string(append(append32(nil, list), object[:4]...)) + object[8:]
}

// fillFiles fills the maps of names, sets and programs.
func (n *next) fillFiles() (err error) {
	if n.inner.names, err = n.create("names", len(n.names)); err != nil {
		return err
	}
	for key, h := range n.names {
		id, err := n.setID(h.set)
		if err != nil {
			return err
		}
		if err := updateMap(n.inner.names, []byte(key), append32(append32(nil, id), h.anchor)); err != nil {
			return fail("protect", "name", err)
		}
	}
	if n.inner.filesets, err = n.create("filesets", len(n.setIDs)); err != nil {
		return err
	}
	for set, id := range n.setIDs {
		if err := updateMap(n.inner.filesets, append32(nil, id), []byte(set)); err != nil {
			return fail("protect", "files", err)
		}
	}
	if n.inner.trusted, err = n.create("trusted", len(n.trusted)); err != nil {
		return err
	}
	for key, ref := range n.trusted {
		if err := updateMap(n.inner.trusted, []byte(key), append32(nil, ref)); err != nil {
			return fail("trust", "program", err)
		}
	}
	return nil
}
