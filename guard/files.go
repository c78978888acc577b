package guard

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// Sections of the blob, as guest/guard reads them.
const (
	sectionFiles = 32
	sectionOpen  = 33
)

const (
	wantWrite = 1
	wantRead  = 2

	maxBy = 16 // as many lists of programs as one object can have
)

// fileRule is a rule about a path, as guest/guard has it.
type fileRule struct {
	policy, list uint16
	base, allow  uint8
	ref, watch   reference
	path         string
}

var wants = map[string]uint8{"": 0, "r": wantRead, "w": wantWrite, "rw": wantRead | wantWrite}

// filesOf reads the rules for files of the policy being read, which is the
// index-th.
func (c *compiler) filesOf(index int, p node.NamedGuardPolicy) {
	seen := map[string]int{} // lists of programs, by path
	for i, f := range p.Spec.Files {
		field := fmt.Sprintf("files[%d]", i)
		faults := len(c.faults)
		c.severity(field+".severity", f.Severity)
		c.path(field+".path", f.Path)
		c.fileWords(field, f)
		if len(c.faults) > faults {
			continue
		}
		c.file(index, field, f)
		if f.By != nil {
			if seen[f.Path]++; seen[f.Path] == maxBy+1 {
				c.fault(field+".by", f.Path, "want at most 16 lists of programs for one path")
			}
		}
	}
}

// fileWords checks what a rule says of its path.
func (c *compiler) fileWords(field string, f spec.GuardFile) {
	for _, v := range [...][2]string{{".deny", f.Deny}, {".allow", f.Allow}} {
		if _, ok := wants[v[1]]; !ok {
			c.fault(field+v[0], v[1], "want r, w or rw")
		}
	}
	switch {
	case f.Bait && (f.Allow != "" || f.By != nil):
		c.fault(field+".bait", f.Path, "bait is for nobody: leave out by and allow")
	case f.By != nil && len(f.By) == 0:
		c.fault(field+".by", "", "want at least one program; leave it out to allow all of them")
	case f.By != nil && f.Allow == "":
		c.fault(field+".allow", "", "by says who has what allow says: set allow")
	case f.Deny == "" && f.Allow == "" && !f.FIM && !f.Bait:
		c.fault(field, f.Path, "set deny, allow, fim or bait")
	}
	if len(f.By) > maxBy {
		c.fault(field+".by", fmt.Sprint(len(f.By)), "want at most 16 programs")
	}
	for i, p := range f.By {
		c.path(fmt.Sprintf("%s.by[%d]", field, i), p)
	}
}

// file makes the rule of a path.
func (c *compiler) file(policy int, field string, f spec.GuardFile) {
	r := fileRule{policy: uint16(policy), base: wants[f.Deny], allow: wants[f.Allow], path: f.Path}
	severity := f.Severity
	if f.Bait {
		r.base = wantRead | wantWrite
		if severity == "" {
			severity = spec.SeverityCritical
		}
	}
	enforce := c.enforce
	c.enforce = enforce && !f.Audit
	defer func() { c.enforce = enforce }()
	if r.base|r.allow != 0 {
		r.ref = c.fieldRule(field, f.Path+" "+fileText(f), severity)
		if f.By != nil {
			r.list = c.programList(f.By)
		}
	}
	if f.FIM {
		r.watch = c.fieldRule(field+".fim", f.Path+" is watched for changes", f.Severity) &^ denies
		if r.ref == 0 {
			r.ref = r.watch
		}
	}
	c.files = append(c.files, r)
}

// fileText says what a rule denies, in words.
func fileText(f spec.GuardFile) string {
	what := map[string]string{"r": "read", "w": "changed", "rw": "read or changed"}
	switch {
	case f.Bait:
		return "is bait, which nobody may read or change"
	case f.Allow == "" && f.Deny == "rw":
		return "may be neither read nor changed"
	case f.Allow == "":
		return "may not be " + what[f.Deny]
	}
	by := "anybody"
	if f.By != nil {
		by = strings.Join(f.By, ", ")
	}
	text := "may only be " + what[f.Allow] + " by " + by
	if f.Deny != "" && f.Deny != "rw" {
		text += ", where it may not be " + what[f.Deny] + " by others"
	}
	return text
}

// programList gives the number of a list of programs, from 1.
func (c *compiler) programList(programs []string) uint16 {
	programs = slices.Sorted(slices.Values(programs))
	i := slices.IndexFunc(c.programLists, func(l []string) bool { return slices.Equal(l, programs) })
	if i < 0 {
		i = len(c.programLists)
		c.programLists = append(c.programLists, programs)
	}
	return uint16(i + 1)
}

// fieldRule makes a rule that knows which field of its policy it is.
func (c *compiler) fieldRule(field, text string, severity spec.Severity) reference {
	r := c.rule(text, severity)
	c.rules[len(c.rules)-1].Field = field
	return r
}

// fileSections adds the sections for files, if there is something to say.
func (c *compiler) fileSections() {
	le := binary.LittleEndian
	if len(c.open) > 0 {
		b := le.AppendUint32(nil, uint32(len(c.open)))
		for _, s := range c.open {
			b = le.AppendUint32(le.AppendUint32(b, s[0]), s[1])
		}
		c.sections = append(c.sections, section{sectionOpen, b})
	}
	if len(c.files) == 0 {
		return
	}
	// Where two rules are about one object the guest keeps the first of equal
	// strength.
	slices.SortStableFunc(c.files, func(a, b fileRule) int { return c.compare(a.ref, b.ref) })
	b := le.AppendUint32(nil, uint32(len(c.programLists)))
	for _, list := range c.programLists {
		b = le.AppendUint16(b, uint16(len(list)))
		for _, p := range list {
			b = appendText(b, p)
		}
	}
	b = le.AppendUint32(b, uint32(len(c.files)))
	for _, r := range c.files {
		b = append(le.AppendUint16(le.AppendUint16(b, r.policy), r.list), r.base, r.allow)
		b = appendText(le.AppendUint32(le.AppendUint32(b, uint32(r.ref)), uint32(r.watch)), r.path)
	}
	c.sections = append(c.sections, section{sectionFiles, b})
}

// reads says whether some rule denies reading to somebody.
func (c *compiler) reads() bool {
	return slices.ContainsFunc(c.files, func(r fileRule) bool {
		return r.base&wantRead != 0 || r.base == 0 && r.allow != 0
	})
}
