package crash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/test/installation"
	"hauberk.dev/vm"
)

const (
	namespace = "bank"
	// keeper is the workload that keeps the balances, in the memory of its
	// machine: what is proved of money holds while that machine lives.
	keeper = "ledger"
	// recoverWithin bounds the time from a kill to the next payment.
	recoverWithin = 90 * time.Second
)

// workloads of the bank.
var workloads = []string{"assistant", "ledger", "risk", "transfer", "vault", "web"}

// What is killed. A machine is killed by its monitor, and with it the guest's
// agent; it is the one thing that does not come back as it was.
const (
	supervisor = "supervisor"
	machine    = "machine"
)

var targets = []string{"hauberkd", "hauberk-node", "hauberk-mesh", supervisor, machine}

// TestCrash kills each program at random moments, 20 unless
// HAUBERK_CRASH_KILLS says otherwise, in an order of which HAUBERK_CRASH_SEED
// is the seed.
func TestCrash(t *testing.T) {
	c := newCrash(t)
	order := c.order(number(t, "HAUBERK_CRASH_KILLS", 20))
	load := startLoad(c.teller, c.random.Uint64())
	t.Cleanup(func() { load.stop() })
	for n, target := range order {
		time.Sleep(time.Duration(c.random.IntN(700)) * time.Millisecond)
		if !c.kill(target) {
			load.stop()
			t.Fatalf("kill %d of %d, of %s: see above", n+1, len(order), target)
		}
	}
	load.stop()
	c.table()
	c.settle(load)
	c.finish()
}

// number reads a setting of the test.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	text, ok := os.LookupEnv(name)
	if !ok {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil || n == 0 {
		t.Fatalf("%s is %q: want a number above 0", name, text)
	}
	return n
}

// crash is a run of the test.
type crash struct {
	t      *testing.T
	in     *installation.Installation
	teller *installation.Teller
	random *rand.Rand
	seed   uint64

	opening   map[string]int64
	resources map[string]string
	seen      []admin.LedgerEntry
	took      map[string][]time.Duration // by target, from kill to payment
}

func newCrash(t *testing.T) *crash {
	in := installation.New(t)
	seed := number(t, "HAUBERK_CRASH_SEED", uint64(time.Now().UnixNano()))
	t.Logf("HAUBERK_CRASH_SEED=%d", seed)
	c := &crash{t: t, in: in, seed: seed, random: rand.New(rand.NewPCG(seed, 0)),
		teller: in.Teller(5 * time.Second), took: map[string][]time.Duration{}}
	t.Cleanup(c.teller.Close)
	if r := in.Bank(10 * time.Minute); r.Code != 0 {
		t.Fatal(r)
	}
	c.resources = c.readResources()
	var err error
	for began := time.Now(); c.opening == nil; time.Sleep(100 * time.Millisecond) {
		if c.opening, err = c.teller.Balances(t.Context()); err != nil && time.Since(began) > recoverWithin {
			t.Fatal(err)
		}
	}
	if err := c.look(); err != nil {
		t.Fatal(err)
	}
	return c
}

// order shuffles the kills.
func (c *crash) order(kills uint64) (all []string) {
	for _, target := range targets {
		for range kills {
			all = append(all, target)
		}
	}
	c.random.Shuffle(len(all), func(a, b int) { all[a], all[b] = all[b], all[a] })
	return all
}

// kill kills a target, waits until everything works again, and checks that
// every other machine is the one it was.
func (c *crash) kill(target string) bool {
	before := c.machines()
	victim, pid, err := c.victim(target, before)
	if err != nil {
		c.t.Error(err)
		return false
	}
	began := time.Now()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		c.t.Errorf("kill %s: %v", victim, err)
		return false
	}
	if target == supervisor {
		for c.in.Lives(pid) && time.Since(began) < recoverWithin {
			time.Sleep(time.Millisecond) // a signal is no death yet
		}
		if r := c.in.Up(recoverWithin); r.Code != 0 {
			c.t.Error(r)
			return false
		}
	}
	if err := c.recovered(target, pid, began); err != nil {
		c.t.Errorf("after a kill of %s: %v", victim, err)
		return false
	}
	c.took[target] = append(c.took[target], time.Since(began))
	delete(before, victim)
	after := c.machines()
	for id, pid := range before {
		if after[id] != pid {
			c.t.Errorf("after a kill of %s: machine %s was process %d and is now %d", victim, id, pid, after[id])
		}
	}
	return !c.t.Failed()
}

// victim chooses the process to kill.
func (c *crash) victim(target string, machines map[string]int) (name string, pid int, err error) {
	if target != machine {
		pid, err := c.in.PID(target)
		return target, pid, err
	}
	list, err := c.in.Instances(namespace)
	if err != nil {
		return "", 0, err
	}
	list = slices.DeleteFunc(list, func(i admin.Instance) bool {
		return i.Phase != "Running" || i.Workload == keeper || machines[i.Name] == 0
	})
	if len(list) == 0 {
		return "", 0, errors.New("no machine to kill")
	}
	name = list[c.random.IntN(len(list))].Name
	return name, machines[name], nil
}

// machines that run, by instance.
func (c *crash) machines() map[string]int {
	all, err := vm.Orphans(filepath.Join(c.in.Run, "node", "vm"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.t.Fatal(err)
	}
	pids := map[string]int{}
	for _, o := range all {
		if o.Adoptable() {
			pids[o.ID] = o.Journal.PID
		}
	}
	return pids
}

// recovered waits until a killed program runs again, the node has been heard,
// every workload runs, and a payment goes through.
func (c *crash) recovered(target string, killed int, since time.Time) error {
	var err error
	for n := 0; time.Since(since) < recoverWithin; n++ {
		if err = c.whole(target, killed, since); err == nil {
			id := fmt.Sprintf("probe-%d-%d", since.UnixNano(), n)
			// There and back, so that the probes move nothing.
			there := installation.Payment{ID: id + "-a", From: "alice", To: "bob", Amount: 3}
			back := installation.Payment{ID: id + "-b", From: "bob", To: "alice", Amount: 3}
			if err = c.insist(there, since); err == nil {
				err = c.insist(back, since)
			}
			if err == nil {
				return c.look()
			}
		}
		time.Sleep(30 * time.Millisecond)
	}
	return fmt.Errorf("not recovered within %v: %w", recoverWithin, err)
}

// insist makes a payment, asking again with the same id.
func (c *crash) insist(p installation.Payment, since time.Time) (err error) {
	for ok := true; ok; ok = time.Since(since) < recoverWithin {
		if err = c.teller.Pay(context.Background(), p); err == nil {
			return nil
		}
		time.Sleep(30 * time.Millisecond)
	}
	return err
}

func (c *crash) whole(target string, killed int, since time.Time) error {
	if target != machine {
		if pid, err := c.in.PID(target); err != nil || pid == killed {
			return fmt.Errorf("%s does not run again: %w", target, err)
		}
	}
	st, err := c.in.Status()
	if err != nil {
		return err
	}
	for _, l := range st.Links {
		if l.State == "broken" {
			return fmt.Errorf("link %s is broken: %s", l.Name, l.Detail)
		}
	}
	if len(st.Nodes) != 1 || !st.Nodes[0].Ready || st.Nodes[0].LastSeen.Before(since) {
		return fmt.Errorf("the node is not ready: %+v", st.Nodes)
	}
	list, err := c.in.Instances(namespace)
	if err != nil {
		return err
	}
	here := c.machines()
	running := map[string]bool{}
	for _, i := range list {
		if i.Phase == "Running" && here[i.Name] != 0 {
			running[i.Workload] = true
		}
	}
	if got := slices.Sorted(maps.Keys(running)); !slices.Equal(got, workloads) {
		return fmt.Errorf("of %v only %v run", workloads, got)
	}
	return nil
}

// look remembers what the ledger holds, to find it there at the end.
func (c *crash) look() error {
	news, err := c.in.Ledger(uint64(len(c.seen)))
	if err != nil {
		return err
	}
	for _, e := range news {
		if e.Index != uint64(len(c.seen)) {
			return fmt.Errorf("ledger: entry %d comes after %d entries", e.Index, len(c.seen))
		}
		c.seen = append(c.seen, e)
	}
	return nil
}

// table prints how long it took to recover.
func (c *crash) table() {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "KILLED\tTIMES\tMEDIAN\tSLOWEST\t")
	for _, target := range targets {
		took := slices.Sorted(slices.Values(c.took[target]))
		fmt.Fprintf(w, "%s\t%d\t%v\t%v\t\n", target, len(took), took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
	}
	w.Flush()
	c.t.Logf("from kill -9 to the next payment, seed %d:\n%s", c.seed, &b)
}
