package crash

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"hauberk.dev/kube/kubetest"
	"hauberk.dev/test/installation"
)

// settle checks the money: what was acknowledged is booked, once; what was not
// is booked when asked for again, once; nothing else moved.
func (c *crash) settle(l *load) {
	want := maps.Clone(c.opening)
	acknowledged, open := 0, 0
	for _, m := range l.made {
		want[m.From] -= m.Amount
		want[m.To] += m.Amount
		if m.acknowledged {
			acknowledged++
			continue
		}
		open++
		if err := c.insist(m.Payment, time.Now()); err != nil {
			c.t.Errorf("a payment that was not acknowledged (%v), asked for again: %v", m.err, err)
		}
	}
	c.t.Logf("%d payments: %d acknowledged, %d asked for again", len(l.made), acknowledged, open)
	if acknowledged == 0 {
		c.t.Error("no payment was acknowledged: nothing was tried")
	}
	c.compare("after all payments", want)
	// A payment asked for twice is made once.
	for n := 0; n < len(l.made); n += 1 + len(l.made)/20 {
		if err := c.insist(l.made[n].Payment, time.Now()); err != nil {
			c.t.Error(err)
		}
	}
	c.compare("after asking again for what was paid", want)
}

func (c *crash) compare(when string, want map[string]int64) {
	got, err := c.teller.Balances(c.t.Context())
	if err != nil {
		c.t.Error(err)
		return
	}
	if !maps.Equal(got, want) {
		c.t.Errorf("%s accounts hold %v (sum %d), want %v (sum %d)", when, got, sum(got), want, sum(want))
	}
}

func sum(amounts map[string]int64) (total int64) {
	for a := range maps.Values(amounts) {
		total += a
	}
	return total
}

// finish checks the ledger and the resources, stops everything and counts what
// is left.
func (c *crash) finish() {
	if now := c.readResources(); !maps.Equal(now, c.resources) {
		c.t.Errorf("resources were\n%v\nand are now\n%v", c.resources, now)
	}
	var incidents []json.RawMessage
	if err := c.in.Ask("/v1/incidents", nil, &incidents); err != nil || len(incidents) > 0 {
		c.t.Errorf("a crash is no attack, but there are incidents: %s, %v", incidents, err)
	}
	tar := filepath.Join(c.in.Root, "ledger.tar")
	if r := c.in.Hauberk(time.Minute, "ledger", "export", tar); r.Code != 0 {
		c.t.Error(r)
	}
	c.remembered()
	if r := c.in.Hauberk(2*time.Minute, "down"); r.Code != 0 {
		c.t.Error(r)
	}
	c.verify(tar)
	c.verify(filepath.Join(c.in.State, "control", "ledger"), "--key="+tar+".key")
	c.leaks()
}

// remembered finds every entry that was ever seen where it was, unchanged.
func (c *crash) remembered() {
	now, err := c.in.Ledger(0)
	if err != nil {
		c.t.Error(err)
		return
	}
	if len(now) < len(c.seen) || len(c.seen) == 0 {
		c.t.Errorf("the ledger holds %d entries; %d were seen", len(now), len(c.seen))
		return
	}
	for n, e := range c.seen {
		if now[n].Index != e.Index || !bytes.Equal(now[n].Entry, e.Entry) {
			c.t.Errorf("ledger entry %d was %s and is now %s", e.Index, e.Entry, now[n].Entry)
		}
	}
}

// verify checks a copy of the ledger with nothing running.
func (c *crash) verify(copied string, flags ...string) {
	r := c.in.Hauberk(time.Minute, append([]string{"ledger", "verify", "-o", "json", copied}, flags...)...)
	var report struct{ Size int }
	if err := json.Unmarshal([]byte(r.Stdout), &report); err != nil || r.Code != 0 {
		c.t.Errorf("%s: %v", r, err)
		return
	}
	if report.Size < len(c.seen) {
		c.t.Errorf("%s verifies with %d entries; %d were seen", copied, report.Size, len(c.seen))
	}
	c.t.Logf("%s verifies: %d entries", filepath.Base(copied), report.Size)
}

// leaks prints and judges what is left behind.
func (c *crash) leaks() {
	count := map[string]int{}
	for _, l := range c.in.Leaks() {
		c.t.Errorf("left behind: %s", l)
		count[l.Kind]++
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "LEFT BEHIND\tCOUNT\t")
	for _, kind := range installation.Kinds {
		fmt.Fprintf(w, "%s\t%d\t\n", kind, count[kind])
	}
	w.Flush()
	c.t.Logf("after down:\n%s", &b)
}

// readResources reads what people have asked for, by kubectl.
func (c *crash) readResources() map[string]string {
	c.t.Helper()
	cmd := exec.CommandContext(c.t.Context(), kubetest.Kubectl(c.t), "--kubeconfig="+c.in.Kubeconfig(), "get", "-A", "-o", "json",
		"applications,workloads,guardpolicies,accesspolicies,releasepolicies")
	cmd.Env = append(os.Environ(), "HOME="+c.in.Root)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		c.t.Fatalf("kubectl get: %v: %s", err, &errs)
	}
	var list struct {
		Items []struct {
			Kind     string
			Metadata struct {
				Namespace, Name, UID string
				Generation           int64
			}
			Spec json.RawMessage
		}
	}
	if err := json.Unmarshal(out, &list); err != nil {
		c.t.Fatal(err)
	}
	all := map[string]string{}
	for _, o := range list.Items {
		m := o.Metadata
		all[o.Kind+" "+m.Namespace+"/"+m.Name] = fmt.Sprintf("%s generation %d %s", m.UID, m.Generation, o.Spec)
	}
	if len(all) == 0 {
		c.t.Fatal("the API lists no resources")
	}
	return all
}
