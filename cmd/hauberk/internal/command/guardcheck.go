package command

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"hauberk.dev/api/node"
	"hauberk.dev/cmd/hauberk/internal/show"
	"hauberk.dev/guard"
	"hauberk.dev/guard/trail"
)

// readDocuments reads the policies of files, or ready ones by name.
func (s *session) readDocuments(names []string) (out []policyDocument, err error) {
	for _, name := range names {
		if r, ok := guard.FindReady(name); ok {
			out = append(out, policyDocument{file: name, name: r.Name})
			out[len(out)-1].spec.GuardPolicy = r.Spec
			continue
		}
		raw, err := s.readPolicyFile(name)
		if err != nil {
			return nil, err
		}
		docs, err := parseDocuments(name, raw)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, docs...)
	}
	return out, nil
}

func (s *session) readPolicyFile(name string) ([]byte, error) {
	if name != "-" {
		return readBounded(name)
	}
	raw, err := io.ReadAll(io.LimitReader(s.In, maxPolicyFile+1))
	if err == nil && len(raw) > maxPolicyFile {
		err = fmt.Errorf("standard input: more than %d bytes", maxPolicyFile)
	}
	return raw, err
}

func policiesOf(docs []policyDocument) (out []node.NamedGuardPolicy) {
	for _, d := range docs {
		out = append(out, d.named())
	}
	return out
}

// checked is what became of checking one policy.
type checked struct {
	File    string         `json:"file"`
	Policy  string         `json:"policy"`
	OK      bool           `json:"ok"`
	Kernels []string       `json:"kernels,omitempty"` // that can hold it
	Notes   []string       `json:"notes,omitempty"`
	Faults  []checkedFault `json:"faults,omitempty"`
}

type checkedFault struct {
	Line  int    `json:"line,omitempty"`
	Field string `json:"field,omitempty"`
	Value string `json:"value,omitempty"`
	Fix   string `json:"fix"`
}

func (s *session) guardCheck() *cobra.Command {
	return &cobra.Command{
		Use: "check FILE...", Short: "Say whether policies can be held, and what is wrong with those that cannot",
		Long: `Check compiles every policy of the files as a node does, alone and then all of them
together, for each kernel that guests have. Each fault names the line, the field,
its value and what to write instead; several are told at once. It asks no control
plane: that workloads and files exist which a policy names is not checked.

Exit code: 0 if every policy can be held, 1 if not.`,
		Example: "  hauberk guard check policy.yaml\n  hauberk guard ready web | hauberk guard check -",
		Args:    args(1, -1, "a FILE of GuardPolicy documents, or - for standard input"),
		RunE: func(c *cobra.Command, files []string) error {
			list := s.checkFiles(files)
			if err := s.print(list, func(w io.Writer) error { return checkedText(w, list) }); err != nil {
				return err
			}
			if slices.ContainsFunc(list, func(r checked) bool { return !r.OK }) {
				return &exitError{exitFailed, nil}
			}
			return nil
		},
	}
}

func (s *session) checkFiles(files []string) (out []checked) {
	var all []policyDocument
	for _, file := range files {
		docs, err := s.readDocuments([]string{file})
		if err != nil {
			out = append(out, checked{File: file, Faults: []checkedFault{{Fix: strings.TrimPrefix(err.Error(), file+": ")}}})
			continue
		}
		for i := range docs {
			out = append(out, checkOne(docs[i].file, docs[i].name, docs[i:i+1]))
		}
		all = append(all, docs...)
	}
	bad := slices.ContainsFunc(out, func(r checked) bool { return !r.OK })
	if len(all) > 1 && !bad {
		if together := checkOne("", "all of them together", all); !together.OK {
			out = append(out, together)
		}
	}
	return out
}

// checkOne compiles policies that hold together.
func checkOne(file, name string, docs []policyDocument) checked {
	r := checked{File: file, Policy: name}
	g, facts := guard.Offline(policiesOf(docs))
	c, err := guard.Compile(g, facts)
	if err == nil {
		r.OK, r.Kernels, r.Notes = true, guard.Kernels(), c.Unsupported
		return r
	}
	for _, f := range guard.Faults(err) {
		fault := checkedFault{Field: "spec." + f.Field, Value: f.Value, Fix: f.Fix}
		for _, d := range docs {
			if d.name == f.Policy && d.node != nil {
				fault.Line = lineOf(d.node, "spec."+f.Field)
			}
		}
		r.Faults = append(r.Faults, fault)
	}
	if len(r.Faults) == 0 {
		r.Faults = []checkedFault{{Fix: err.Error()}}
	}
	return r
}

func checkedText(w io.Writer, list []checked) error {
	for _, r := range list {
		name := strings.Trim(r.File+": "+r.Policy, ": ")
		if r.OK {
			fmt.Fprintf(w, "%s: can be held on kernels %s\n", show.Clean(name), strings.Join(r.Kernels, " and "))
		}
		for _, n := range r.Notes {
			fmt.Fprintf(w, "  note: %s\n", show.Clean(n))
		}
		for _, f := range r.Faults {
			at := name
			if f.Line > 0 {
				at = r.File + ":" + strconv.Itoa(f.Line)
			}
			if f.Field == "" {
				fmt.Fprintf(w, "%s: %s\n", show.Clean(at), show.Clean(f.Fix))
				continue
			}
			fmt.Fprintf(w, "%s: %s %s\n  fix: %s\n", show.Clean(at), f.Field, strconv.QuoteToGraphic(f.Value), show.Clean(f.Fix))
		}
	}
	return nil
}

// lineOf finds the line of a field such as spec.net.egress[0].cidr, or of what is
// nearest above it.
func lineOf(at *yaml.Node, field string) int {
	if at.Kind == yaml.DocumentNode && len(at.Content) > 0 {
		at = at.Content[0]
	}
	line := at.Line
	for _, part := range strings.FieldsFunc(field, func(r rune) bool { return r == '.' || r == '[' || r == ']' }) {
		next, keyLine := child(at, part)
		if next == nil {
			return line
		}
		at, line = next, keyLine
	}
	return line
}

func child(at *yaml.Node, part string) (*yaml.Node, int) {
	if at.Kind == yaml.SequenceNode {
		if i, err := strconv.Atoi(part); err == nil && i < len(at.Content) {
			return at.Content[i], at.Content[i].Line
		}
		return nil, 0
	}
	for i := 0; at.Kind == yaml.MappingNode && i+1 < len(at.Content); i += 2 {
		if at.Content[i].Value == part {
			return at.Content[i+1], at.Content[i].Line
		}
	}
	return nil, 0
}

func (s *session) guardExplain() *cobra.Command {
	return &cobra.Command{
		Use: "explain FILE...", Short: "Say in words what policies allow and deny",
		Long: `Explain says, section by section, what the policies of the files let a workload do
and what they deny it, when all of them hold together: what one denies no other
allows. It asks the same question of every thing a policy names and of one that
none names, and answers as the kernel would. Ready policies can be named, too.`,
		Example: "  hauberk guard explain policy.yaml\n  hauberk guard explain baseline egress.yaml",
		Args:    args(1, -1, "a FILE of GuardPolicy documents, or the name of a ready policy"),
		RunE: func(c *cobra.Command, files []string) error {
			docs, err := s.readDocuments(files)
			if err != nil {
				return err
			}
			list, err := guard.Explain(policiesOf(docs))
			if err != nil {
				return err
			}
			return s.print(list, func(w io.Writer) error { return explainText(w, list) })
		},
	}
}

func explainText(w io.Writer, list []guard.Finding) error {
	for _, section := range guard.Sections {
		mine := slices.DeleteFunc(slices.Clone(list), func(f guard.Finding) bool { return f.Section != section })
		fmt.Fprintf(w, "%s\n", section)
		if !slices.ContainsFunc(mine, func(f guard.Finding) bool { return f.Verdict != "allowed" }) {
			fmt.Fprintf(w, "  not restricted\n")
			continue
		}
		for _, verdict := range []string{"denied", "killed", "reported", "unknown", "allowed"} {
			for _, line := range alike(mine, verdict) {
				fmt.Fprintf(w, "  %-8s  %s\n", verdict, show.Clean(line))
			}
		}
	}
	return nil
}

// alike puts findings of one verdict into lines: operations and capabilities, of
// which there are many, into one for each policy.
func alike(list []guard.Finding, verdict string) (out []string) {
	lines := map[string]int{}
	for _, f := range list {
		if f.Verdict != verdict {
			continue
		}
		by := ""
		if f.Policy != "" {
			by = " (" + f.Policy + ")"
		}
		for _, many := range []string{"the operation ", "using the capability "} {
			word, ok := strings.CutPrefix(f.Act, many)
			if !ok {
				continue
			}
			if at, known := lines[many+by]; known {
				out[at] = strings.TrimSuffix(out[at], by) + ", " + word + by
				f.Act = ""
				continue
			}
			lines[many+by] = len(out)
		}
		if f.Act != "" {
			out = append(out, f.Act+by)
		}
	}
	return out
}

func (s *session) guardDiff() *cobra.Command {
	return &cobra.Command{
		Use: "diff OLD NEW", Short: "Say what gets stricter and what looser if one policy takes the place of another",
		Long: `Diff asks of everything that either file's policies name, and of one thing that none
names, what they allow before and after, and prints where the answers differ.
Each file may hold several policies, which hold together; a ready policy can be
named instead of a file.`,
		Example: "  hauberk guard diff old.yaml new.yaml\n  hauberk guard diff baseline web",
		Args:    args(2, 2, "OLD and NEW"),
		RunE: func(c *cobra.Command, files []string) error {
			before, err := s.readDocuments(files[:1])
			if err != nil {
				return err
			}
			after, err := s.readDocuments(files[1:])
			if err != nil {
				return err
			}
			list, err := guard.Diff(policiesOf(before), policiesOf(after))
			if err != nil {
				return err
			}
			return s.print(list, func(w io.Writer) error { return diffText(w, list) })
		},
	}
}

func diffText(w io.Writer, list []guard.Change) error {
	if len(list) == 0 {
		_, err := fmt.Fprintln(w, "nothing changes")
		return err
	}
	for _, stricter := range []bool{true, false} {
		word := map[bool]string{true: "stricter", false: "looser"}[stricter]
		for _, c := range list {
			if c.Stricter == stricter {
				fmt.Fprintf(w, "%-8s  %s: %s: %s -> %s (%s)\n", word, c.Section, show.Clean(c.Act), c.Before, c.After, show.Clean(c.Policy))
			}
		}
	}
	return nil
}

// tried is what policies would make of records.
type tried struct {
	Records   uint64     `json:"records"`
	Denied    []triedAct `json:"newlyDenied"`
	Allowed   []triedAct `json:"newlyAllowed"`
	Unknown   []triedAct `json:"unknown"`
	Unchanged uint64     `json:"unchanged"`
	// Lost records, whose acts are not judged.
	Lost uint64 `json:"lost,omitempty"`
}

type triedAct struct {
	Text    string `json:"text"`
	Op      string `json:"op"`
	Program string `json:"program,omitempty"`
	Count   uint64 `json:"count"`
	Policy  string `json:"policy,omitempty"`
	Rule    string `json:"rule,omitempty"`
	Lacks   string `json:"lacks,omitempty"` // the fact that the record has not
}

func (s *session) guardTest() *cobra.Command {
	var events []string
	c := &cobra.Command{
		Use: "test --events FILE FILE...", Short: "Say what policies would have made of what happened",
		Long: `Test judges recorded events by the policies of the files, as the kernel would, and
prints what would change: what went through and would be denied, and what was
denied and would go through. Where a record lacks a fact that the policies ask
for, it says which. Record events with:

  hauberk events bank/web -o json > events.jsonl

Exit code: 0 if nothing would newly be denied, 1 if something would.`,
		Example: "  hauberk guard test --events events.jsonl policy.yaml\n  hauberk events bank/web -o json | hauberk guard test --events - web",
		Args:    args(1, -1, "a FILE of GuardPolicy documents, or the name of a ready policy"),
		RunE: func(c *cobra.Command, files []string) error {
			if len(events) == 0 {
				return usage(c, fmt.Errorf("%s needs --events FILE", c.CommandPath()))
			}
			docs, err := s.readDocuments(files)
			if err != nil {
				return err
			}
			t, err := s.tryEvents(events, policiesOf(docs))
			if err != nil {
				return err
			}
			if err := s.print(t, func(w io.Writer) error { return triedText(w, t) }); err != nil {
				return err
			}
			if len(t.Denied) > 0 {
				return &exitError{exitFailed, nil}
			}
			return nil
		},
	}
	c.Flags().StringArrayVar(&events, "events", nil, "file of recorded events, JSON lines, or - for standard input; may be repeated")
	_ = c.MarkFlagFilename("events", "jsonl", "json")
	return c
}

func (s *session) tryEvents(files []string, policies []node.NamedGuardPolicy) (t tried, err error) {
	g, facts := guard.Offline(policies)
	j, err := guard.NewJudge(g, guard.JudgeFacts{CompileFacts: facts})
	if err != nil {
		return t, err
	}
	for _, name := range files {
		in := s.In
		if name != "-" {
			f, err := os.Open(name)
			if err != nil {
				return t, err
			}
			defer f.Close()
			in = f
		}
		if err := trail.Scan(in, func(r trail.Record) error { t.try(j, r); return nil }); err != nil {
			return t, fmt.Errorf("--events %s: %w", name, err)
		}
	}
	return t, nil
}

// try judges one record. What was only reported had gone through.
func (t *tried) try(j *guard.Judge, r trail.Record) {
	e, ok := r.Event()
	if r.Verdict == trail.VerdictLost {
		t.Lost += r.Count
	}
	if !ok {
		return // it only counts, and what it counts was judged
	}
	t.Records++
	j.Learn(e)
	after := j.Whole(e)
	was, is := e.Verdict >= guard.Denied, after.Verdict >= guard.Denied
	act := triedAct{Text: r.Text, Op: r.Op, Program: e.Exe, Count: max(r.Count, 1), Policy: after.Rule.Policy, Rule: after.Rule.Text, Lacks: after.Lacks}
	switch {
	case after.Verdict == guard.Unknown:
		t.Unknown = addAct(t.Unknown, act, e)
	case was == is:
		t.Unchanged++
	case is:
		t.Denied = addAct(t.Denied, act, e)
	default:
		act.Policy, act.Rule = r.Policy, r.RuleText
		t.Allowed = addAct(t.Allowed, act, e)
	}
}

// maxTried bounds how many different acts are told.
const maxTried = 10_000

func addAct(list []triedAct, a triedAct, e guard.Event) []triedAct {
	// Who did it is told by number as well; the number makes no two acts different.
	a.Text = strings.Replace(a.Text, fmt.Sprintf(" (pid %d, uid %d)", e.PID, e.UID), "", 1)
	i := slices.IndexFunc(list, func(o triedAct) bool { return o.Text == a.Text && o.Program == a.Program && o.Rule == a.Rule })
	if i >= 0 {
		list[i].Count += a.Count
		return list
	}
	if len(list) >= maxTried {
		return list
	}
	return append(list, a)
}

func triedText(w io.Writer, t tried) error {
	for _, group := range []struct {
		word string
		list []triedAct
	}{{"would be denied", t.Denied}, {"would be allowed", t.Allowed}, {"not known", t.Unknown}} {
		for _, a := range group.list {
			why := a.Lacks
			if why != "" {
				why = "the record does not say " + why
			} else {
				why = a.Rule + " (" + a.Policy + ")"
			}
			fmt.Fprintf(w, "%s, %d times: %s\n  %s\n", group.word, a.Count, show.Clean(a.Text), show.Clean(why))
		}
	}
	if t.Lost > 0 {
		fmt.Fprintf(w, "%d records were lost: what they would have told of is not judged\n", t.Lost)
	}
	_, err := fmt.Fprintf(w, "%d records: %d would newly be denied, %d newly allowed, %d are not known, %d stay as they are\n",
		t.Records, len(t.Denied), len(t.Allowed), len(t.Unknown), t.Unchanged)
	return err
}
