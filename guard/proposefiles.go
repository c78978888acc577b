package guard

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"hauberk.dev/api/spec"
)

// maxSiblings is how many directories side by side are named before the one
// above them is named instead.
const maxSiblings = 8

// files lets what was written be written by those who did, and what was read be
// read; nothing else.
func (p *proposer) files() {
	writes := p.places(FactWrite)
	reads := p.readPlaces(writes)
	root := spec.GuardFile{Path: "/", Deny: "rw", Severity: spec.SeverityWarning}
	if reads == nil {
		root.Deny = "w"
	}
	p.out.Spec.Files = []spec.GuardFile{root}
	p.out.Evidence = append(p.out.Evidence, Evidence{Field: "files[0]", Text: "nothing else was " + map[string]string{"rw": "read or changed", "w": "changed"}[root.Deny]})
	for _, place := range slices.Sorted(maps.Keys(merge(reads, writes))) {
		facts, changed := writes[place]
		f, text := spec.GuardFile{Path: place, Deny: "w", Severity: spec.SeverityWarning}, readText(reads[place])
		if changed {
			f.Allow, f.By = "w", p.writers(facts)
			text = "changed by " + strings.Join(bys(facts), ", ")
		} else {
			facts = reads[place]
		}
		if place == "/" {
			continue
		}
		if len(p.out.Spec.Files) == maxProposedFiles {
			p.refuse("files", "used "+strconv.Quote(place)+", beyond what a policy can list", facts...)
			continue
		}
		p.evidence(fmt.Sprintf("files[%d]", len(p.out.Spec.Files)), text, facts...)
		p.out.Spec.Files = append(p.out.Spec.Files, f)
	}
}

func readText(facts []Fact) string {
	if len(facts) == 0 {
		return "every program looks up names, users and the time there"
	}
	return "read by " + strings.Join(bys(facts), ", ")
}

func merge(a, b map[string][]Fact) map[string][]Fact {
	out := maps.Clone(a)
	if out == nil {
		out = map[string][]Fact{}
	}
	maps.Copy(out, b)
	return out
}

// places folds the files of a kind into directories.
func (p *proposer) places(kind Kind) map[string][]Fact {
	out := map[string][]Fact{}
	for _, f := range p.facts[kind] {
		name, isDir := strings.CutSuffix(f.What, "/")
		if f.What == "/" {
			name, isDir = "/", true
		}
		if dir := parentOf(name); !isDir && mayFold(dir) {
			name = dir
		}
		if !sayable(name) {
			p.refuse("files", "used "+strconv.Quote(f.What)+", which no rule can name", f)
			continue
		}
		out[name] = append(out[name], f)
	}
	for folded := true; folded; {
		folded = foldSiblings(out)
	}
	return out
}

// foldSiblings puts one directory in the place of many in it.
func foldSiblings(places map[string][]Fact) bool {
	in := map[string][]string{}
	for name := range places {
		if dir := parentOf(name); mayFold(dir) {
			in[dir] = append(in[dir], name)
		}
	}
	folded := false
	for dir, names := range in {
		if len(names) <= maxSiblings {
			continue
		}
		for _, n := range names {
			places[dir] = append(places[dir], places[n]...)
			delete(places, n)
		}
		folded = true
	}
	return folded
}

// readPlaces are where files were read: whole trees of the image near the root,
// and directories elsewhere. Nil if reading cannot be restricted.
func (p *proposer) readPlaces(writes map[string][]Fact) map[string][]Fact {
	out := map[string][]Fact{}
	add := func(name string, facts ...Fact) { out[name] = append(out[name], facts...) }
	for _, f := range p.facts[FactRead] {
		if f.What == "/" {
			return nil // who lists the root is nobody's enemy, and its rule covers all
		}
		name := strings.TrimSuffix(f.What, "/")
		if !sayable(name) || name == "/" {
			return nil
		}
		add(readPlace(name), f)
	}
	for _, f := range p.facts[FactProgram] {
		if sayable(f.What) && f.What != "/" {
			add(readPlace(f.What), f) // the kernel reads it for who starts it
		}
	}
	if len(out) == 0 {
		return nil // reading was not watched
	}
	for _, name := range []string{"/etc"} { // names, users, the time zone
		add(name)
	}
	for name := range out {
		for dir := parentOf(name); dir != "/"; dir = parentOf(dir) {
			if out[dir] != nil && writes[name] == nil {
				out[dir] = append(out[dir], out[name]...)
				delete(out, name)
				break
			}
		}
	}
	return out
}

// readPlace is the tree that stands for a file that was read.
func readPlace(name string) string {
	parts := strings.Split(name, "/") // the first is empty
	top := "/" + parts[1]
	if len(parts) <= 3 || slices.Contains([]string{"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/usr", "/etc", "/tmp", "/run"}, top) {
		return top
	}
	return top + "/" + parts[2]
}

// writers are the programs that wrote, or none if not all of them can be named.
func (p *proposer) writers(facts []Fact) (by []string) {
	if len(p.facts[FactPreload]) > 0 {
		return nil // a program that loads more than itself is on no list
	}
	for _, f := range facts {
		if !sayable(f.By) {
			return nil
		}
		if !slices.Contains(by, f.By) {
			by = append(by, f.By)
		}
	}
	slices.Sort(by)
	if len(by) > maxBy {
		return nil
	}
	return by
}
