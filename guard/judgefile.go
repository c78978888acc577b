package guard

import (
	"slices"
	"strings"
)

// file judges an act on a file: of each policy the rules of the deepest path that
// leads to it decide, and the strongest of what they say.
func (j *Judge) file(e Event, want uint8) Judgement {
	if len(j.c.files) == 0 {
		return Judgement{}
	}
	if e.Truncated || strings.HasPrefix(e.Path, "...") || strings.ContainsRune(e.Path, '\uFFFD') {
		return lacks("the whole path of the file")
	}
	var ref, lifted reference
	for _, g := range j.groups(e.Path) {
		all, some, known := j.group(g, e.Exe, want)
		if !known {
			return lacks("the program that did it, and a rule lets only some")
		}
		ref, lifted = j.strongerFile(ref, all), j.strongerFile(lifted, some)
	}
	ref = j.strongerFile(ref, lifted)
	if ref == 0 && want == wantWrite {
		if a := j.anchor(e.Path); a != 0 && !j.mounted {
			return lacks("whether it was moved or mounted on, and a protected path leads through it")
		}
	}
	if ref == 0 && !j.mounted && j.elsewhere(e.Path) {
		return lacks("the mount that the file is in")
	}
	return j.answer(ref, false)
}

// strongerFile is stronger of bpf/src/file.h: one that denies, else the one that
// was there.
func (j *Judge) strongerFile(old, rule reference) reference {
	if rule != 0 && (old == 0 || rule&denies > old&denies) {
		return rule
	}
	return old
}

// groups are the rules that decide about a path, one group of each policy.
func (j *Judge) groups(path string) (out [][]fileRule) {
	deepest := map[uint16]string{}
	var order []uint16
	for _, r := range j.c.files {
		if r.base|r.allow == 0 || !below(path, r.path) {
			continue
		}
		old, known := deepest[r.policy]
		if !known {
			order = append(order, r.policy)
		}
		if !known || len(r.path) > len(old) {
			deepest[r.policy] = r.path
		}
	}
	for _, p := range order {
		out = append(out, slices.DeleteFunc(slices.Clone(j.c.files), func(r fileRule) bool {
			return r.policy != p || r.path != deepest[p] || r.base|r.allow == 0
		}))
	}
	return out
}

// group is what the rules of one path of one policy say to a program, as
// setBytes of guest/guard/files.go lays it out: the rule that holds for everybody,
// and the one that is lifted for some, of whom the program is none.
func (j *Judge) group(rules []fileRule, exe string, want uint8) (everybody, others reference, known bool) {
	var base, all, some, mine uint8
	var exceptions reference
	for _, r := range rules {
		if r.allow == 0 {
			if r.base&want != 0 {
				everybody = j.strongerFile(everybody, r.ref)
			}
			continue
		}
		denied := r.base
		if denied == 0 {
			denied = wantWrite | wantRead
		}
		base |= denied
		exceptions = j.strongerFile(exceptions, r.ref)
		if r.list == 0 {
			all |= r.allow
			continue
		}
		some |= r.allow
		if j.trusts(r.list, exe) {
			mine |= r.allow
		}
	}
	switch base &^= all; {
	case base&want == 0:
	case some&want == 0:
		everybody = j.strongerFile(everybody, exceptions)
	case exe == "" || strings.HasPrefix(exe, "..."):
		return 0, 0, false
	case mine&want == 0:
		others = exceptions
	}
	return everybody, others, true
}

func (j *Judge) trusts(list uint16, exe string) bool {
	for _, p := range j.c.programLists[list-1] {
		if slices.Contains(j.aliases(p), exe) {
			return true
		}
	}
	return false
}

// anchor is a rule whose path leads through a path.
func (j *Judge) anchor(path string) reference {
	for _, r := range j.c.files {
		if r.path != path && below(r.path, path) && r.base|r.allow != 0 {
			return r.ref
		}
	}
	return 0
}

// elsewhere says whether a path may be the end of one that a rule is about: of what
// is changed on a mount of its own only the path from there is told.
func (j *Judge) elsewhere(path string) bool {
	return slices.ContainsFunc(j.c.files, func(r fileRule) bool {
		for i := 1; i < len(r.path); i++ {
			if tail := r.path[i:]; r.path[i] == '/' && (below(path, tail) || below(tail, path)) {
				return true
			}
		}
		return false
	})
}
