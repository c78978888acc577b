package guard

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// scenario is a policy and what is tried under it. All scenarios run in one
// machine, one after the other, three times: without the Guard, where every
// attack must work, else it proves nothing; under the policy in audit mode,
// where it works and is told; and enforced, where it is refused and told.
type scenario struct {
	name   string
	policy spec.GuardPolicy
	also   []spec.GuardPolicy // that hold at once
	// image is what it needs of the image besides what all have.
	image map[string][]byte
	// before are steps of the machine that prepare it.
	before  []string
	attacks []attempt
	// spoils are attacks that change what others run: they come last of all.
	spoils []attempt
	// watched is what works in all three and is told of all the same.
	watched []watchedAct
	// benign is what works in all three and is told of in none.
	benign []string
	// quiet is refused, or would be, without a word: programs do such things
	// without meaning harm.
	quiet []string
}

// scenarios is the corpus. Names of attacks are those of testdata/attack and
// unique over all of it: "name=2" is another run of "name".
func scenarios() []scenario {
	all := attempts()
	return append([]scenario{
		{
			name: "strict", policy: strict(), before: []string{"file /shm/a/b/secret", "file /tmp/kept"},
			attacks: all[:len(all)-2], spoils: all[len(all)-2:], benign: benign, quiet: quiet,
		},
		{name: "programs", policy: programsPolicy(), attacks: programsAttempts(), benign: programsBenign},
		filesScenario(),
		netScenario(),
		crowdScenario(),
		{name: "interpreters", policy: interpretersPolicy(), attacks: interpretersAttempts(), benign: interpretersBenign},
		waysScenario(), watchScenario(),
		{name: "volumes", policy: volumesPolicy(), attacks: volumesAttempts(), benign: volumesBenign},
	}, append(clearScenarios(), callScenarios()...)...)
}

// files of the image that the corpus needs.
func corpusFiles() map[string][]byte {
	files := imageFiles()
	for _, name := range waysFiles() {
		files["srv/ways/"+name], files["srv/watched/"+name] = []byte("kept"), []byte(watchedText)
	}
	files["srv/both/x"], files["srv/watched/over"] = []byte("kept"), []byte(watchedText)
	for _, s := range scenarios() {
		maps.Copy(files, s.image)
	}
	return files
}

func steps(guarded bool) (out []string) {
	list := scenarios()
	for _, s := range list {
		out = append(out, s.before...)
		if guarded {
			out = append(out, "policy ."+s.name)
		}
		for _, a := range s.attacks {
			out = append(out, "run "+a.run)
		}
		for _, w := range s.watched {
			out = append(out, "run "+w.run)
		}
		for _, b := range slices.Concat(s.benign, s.quiet) {
			out = append(out, "run "+b)
		}
	}
	for _, s := range list {
		if guarded && len(s.spoils) > 0 {
			out = append(out, "policy ."+s.name+"-again")
		}
		for _, a := range s.spoils {
			out = append(out, "run "+a.run)
		}
	}
	return out
}

// policies compiles each scenario's policy, in the order in which they are put
// in force, as blobs for the image and by the name of the scenario.
func policies(t *testing.T, files map[string][]byte, mode string) (by map[string][]*Compiled) {
	t.Helper()
	by = map[string][]*Compiled{}
	generation := uint64(6)
	for _, again := range []string{"", "-again"} {
		for _, s := range scenarios() {
			generation++
			p := s.policy
			p.Mode = mode
			all := []node.NamedGuardPolicy{{Name: s.name, Spec: p}}
			for _, also := range s.also {
				also.Mode = mode
				all = append(all, node.NamedGuardPolicy{Name: s.name, Spec: also})
			}
			c := compileNamed(t, generation, all...)
			files["."+s.name+again] = c.Blob
			by[s.name] = append(by[s.name], &c)
		}
	}
	return by
}

// TestAttacks runs the corpus three ways.
func TestAttacks(t *testing.T) {
	r := report{Kernel: flavour(), rows: map[string]*row{}}
	if !t.Run("open", func(t *testing.T) { r.open(t) }) {
		t.Error("what does not work on an open machine proves nothing of one that is guarded")
	}
	t.Run("audit", func(t *testing.T) { r.guarded(t, "audit") })
	t.Run("enforce", func(t *testing.T) { r.guarded(t, "enforce") })
	r.write(t)
}

// row is what came of one attack or benign act.
type row struct {
	Name       string `json:"name"`
	Items      string `json:"items,omitempty"`
	Scenario   string `json:"scenario"`
	Benign     bool   `json:"benign,omitempty"`
	Rule       string `json:"rule,omitempty"`
	Attributed bool   `json:"attributed,omitempty"` // in audit and when enforced
	Open       string `json:"open"`
	Audit      string `json:"audit"`
	Enforce    string `json:"enforce"`
}

// report is what the three runs showed.
type report struct {
	Kernel string `json:"kernel"`
	Rows   []*row `json:"rows"`
	rows   map[string]*row
}

func (r *report) row(s scenario, run string, benign bool) *row {
	n := name(run)
	if r.rows[n] == nil {
		r.rows[n] = &row{Name: run, Scenario: s.name, Benign: benign}
		r.Rows = append(r.Rows, r.rows[n])
	}
	return r.rows[n]
}

func (r *report) open(t *testing.T) {
	o := boot(t, false, corpusFiles(), steps(false)...)
	for _, s := range scenarios() {
		for _, a := range slices.Concat(s.attacks, s.spoils) {
			w := r.row(s, a.run, false)
			w.Items, w.Open = a.items, "works"
			if got := o.ran[name(a.run)]; !strings.HasPrefix(got, "exit 0 ") {
				t.Errorf("%s: %s; want it to work", a.run, got)
				w.Open = "FAILS"
			}
		}
		for _, w := range s.watched {
			row := r.row(s, w.run, true)
			if row.Open = "works"; !strings.HasPrefix(o.ran[name(w.run)], "exit 0 ") {
				t.Errorf("%s: %s; want it to work", w.run, o.ran[name(w.run)])
				row.Open = "FAILS"
			}
		}
		for _, b := range slices.Concat(s.benign, s.quiet) {
			want := "exit 0 "
			if strings.HasPrefix(b, "securityxattr") && os.Getenv("HAUBERK_TEST_KERNEL") != "" {
				want = "exit 10 refused: operation not permitted" // later kernels mended this by themselves
			}
			w := r.row(s, b, true)
			w.Open = "works"
			if got := o.ran[name(b)]; !strings.HasPrefix(got, want) {
				t.Errorf("%s: %s; want %s", b, got, want)
				w.Open = "FAILS"
			}
		}
	}
}

func (r *report) guarded(t *testing.T, mode string) {
	files := corpusFiles()
	by := policies(t, files, mode)
	list := append([]string{"run nothing"}, steps(true)...)
	o := boot(t, true, files, append(list, "status")...)
	t.Log(o.policies)
	if got := o.ran["nothing"]; !strings.HasPrefix(got, "exit 12 notstarted operation not permitted") {
		t.Errorf("before a policy: %s; want it refused", got)
	}
	if e := o.events["nothing"]; len(e) != 1 || e[0].Rule != 1 || e[0].Verdict != Denied {
		t.Errorf("before a policy: events %v; want one of rule 1", e)
	}
	for _, s := range scenarios() {
		for i, list := range [][]attempt{s.attacks, s.spoils} {
			for _, a := range list {
				r.attack(t, mode, s, by[s.name][i], a, o)
			}
		}
		for _, w := range s.watched {
			r.watched(t, mode, s, by[s.name][0], w, o)
		}
		for _, b := range s.benign {
			r.benign(t, mode, s, b, o)
		}
		for _, q := range s.quiet {
			if got := o.ran[name(q)]; !strings.HasPrefix(got, "exit 10 ") {
				t.Errorf("%s: %s; want it refused", q, got)
			}
			wantNoWord(t, q, o)
			r.set(mode, r.row(s, q, true), "refused silently")
		}
	}
	checkStatus(t, o, by)
	for _, s := range scenarios() {
		for _, c := range by[s.name] {
			holdJudge(t, s, mode, c, o)
		}
	}
}

func checkStatus(t *testing.T, o outcome, by map[string][]*Compiled) {
	t.Helper()
	if len(o.status) != 1 {
		t.Fatalf("%d answers about the Guard's state, want 1", len(o.status))
	}
	last := o.status[0]
	known := false
	for _, compiled := range by {
		for _, c := range compiled {
			known = known || c.Generation == last.Generation && c.Digest == last.Digest
		}
	}
	if !known || last.Lost != 0 || last.Programs != len(last.Tags) || last.Programs < 40 {
		t.Errorf("status %+v; want the last policy, nothing lost, all programs attached", last)
	}
	checkSequence(t, o, last.Sequence)
}

func (r *report) set(mode string, w *row, text string) {
	if mode == "audit" {
		w.Audit = text
	} else {
		w.Enforce = text
	}
}

// attack checks one under a policy. Rules that are built in deny in every mode.
func (r *report) attack(t *testing.T, mode string, s scenario, c *Compiled, a attempt, o outcome) {
	t.Helper()
	w := r.row(s, a.run, false)
	got := o.ran[name(a.run)]
	for _, e := range o.events[name(a.run)] {
		rule, ok := c.Rule(e.Rule)
		if !ok || e.Op != a.op || e.Generation != c.Generation || e.Verdict == Allowed {
			continue
		}
		// What is always refused is so in audit mode too, by a rule of its own.
		if !strings.Contains(rule.Text, a.rule) && (mode != "audit" || rule.Policy != builtIn) {
			continue
		}
		w.Rule = rule.Text
		w.Attributed = attributed(t, s, a, c, e, o) && (mode == "audit" || w.Attributed)
		want, verdict := "exit 10 ", Denied
		if mode == "audit" && rule.Policy != builtIn {
			want, verdict = "exit 0 ", Reported
		}
		r.set(mode, w, e.Verdict.String())
		if !strings.HasPrefix(got, want) || e.Verdict < verdict || verdict == Reported && e.Verdict != Reported {
			t.Errorf("%s: %s, and %s; want %s and %s", a.run, got, e, want, verdict)
			r.set(mode, w, "FAILS")
		}
		return
	}
	r.set(mode, w, "FAILS")
	t.Errorf("%s: %s; no event of operation %d by rule %q in %v", a.run, got, a.op, a.rule, o.events[name(a.run)])
}

func (r *report) benign(t *testing.T, mode string, s scenario, b string, o outcome) {
	t.Helper()
	w := r.row(s, b, true)
	r.set(mode, w, "works")
	if got := o.ran[name(b)]; !strings.HasPrefix(got, "exit 0 ") {
		t.Errorf("%s: %s; want it to work", b, got)
		r.set(mode, w, "FAILS")
	}
	wantNoWord(t, b, o)
}

// write leaves the report where make guard-attacks looks for it.
func (r *report) write(t *testing.T) {
	attacks, benign, known := 0, 0, 0
	for _, w := range r.Rows {
		if w.Benign {
			benign++
		} else {
			attacks++
		}
		if w.Attributed {
			known++
		}
	}
	t.Logf("%s: %d attacks, %d attributed, %d benign acts", r.Kernel, attacks, known, benign)
	dir := os.Getenv("HAUBERK_ATTACKS")
	if dir == "" {
		return
	}
	raw, err := json.MarshalIndent(r, "", " ")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "corpus.json"), raw, 0o644)
	}
	if err != nil {
		t.Error(err)
	}
}
