package trail

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"

	"hauberk.dev/guard"
)

// maxLabels bounds how many workloads have metrics of their own. The others
// are counted together.
const maxLabels = 1000

// Metrics counts events by workload, operation and verdict or outcome, never
// by anything that a workload can make more of.
type Metrics struct {
	mu        sync.Mutex
	workloads map[string]bool
	acts      map[[3]string]uint64 // workload, operation, verdict
	outcomes  map[[3]string]uint64 // workload, operation, outcome
}

// workloadLocked is the label of a workload.
func (m *Metrics) workloadLocked(s Sandbox) string {
	if m.acts == nil {
		m.workloads, m.acts, m.outcomes = map[string]bool{}, map[[3]string]uint64{}, map[[3]string]uint64{}
	}
	name := s.Namespace + "/" + s.Workload
	if !m.workloads[name] {
		if len(m.workloads) == maxLabels {
			return "others"
		}
		m.workloads[name] = true
	}
	return name
}

// Add counts a record.
func (m *Metrics) Add(r Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.Verdict != VerdictLost {
		m.acts[[3]string{m.workloadLocked(r.Sandbox), known(r.Op), r.Verdict}] += r.Count
	}
}

// known keeps the operations few, whatever a guest says.
func known(op string) string {
	for _, n := range names {
		if n == op {
			return op
		}
	}
	return "other"
}

// Tally counts what became of the acts of a sandbox since before.
func (m *Metrics) Tally(s Sandbox, before, now map[guard.Op]guard.Tally) {
	m.mu.Lock()
	defer m.mu.Unlock()
	workload := m.workloadLocked(s)
	for op, n := range now {
		was := before[op]
		for _, v := range []struct {
			outcome  string
			now, was uint64
		}{{"sent", n.Sent, was.Sent}, {"merged", n.Merged, was.Merged}, {"lost", n.Lost, was.Lost}, {"held", n.Held, was.Held}} {
			if v.now > v.was {
				m.outcomes[[3]string{workload, known(OpName(op)), v.outcome}] += v.now - v.was
			}
		}
	}
}

// WriteTo writes all counts in the text format of Prometheus.
func (m *Metrics) WriteTo(w io.Writer) (int64, error) {
	m.mu.Lock()
	var b strings.Builder
	family(&b, "hauberk_guard_acts_total", "Acts that the Guard told of, with those a record only counts.", "verdict", m.acts)
	family(&b, "hauberk_guard_records_total", "What became of records in the guest: sent, merged into a count, lost, held back by the policy's limit.", "outcome", m.outcomes)
	m.mu.Unlock()
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}

func family(b *strings.Builder, name, help, label string, counts map[[3]string]uint64) {
	fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s counter\n", name, help, name)
	keys := slices.SortedFunc(maps.Keys(counts), func(x, y [3]string) int { return slices.Compare(x[:], y[:]) })
	for _, k := range keys {
		fmt.Fprintf(b, "%s{workload=%s,op=%s,%s=%s} %d\n", name, quote(k[0]), quote(k[1]), label, quote(k[2]), counts[k])
	}
}

func quote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}
