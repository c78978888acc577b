package check

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/client"
	"hauberk.dev/cmd/hauberk/internal/deploy"
	"hauberk.dev/cmd/hauberk/internal/layout"
	"hauberk.dev/ledger"
)

// Target is what the checks look at and attack.
type Target struct {
	Client   *client.Client
	Deployer *deploy.Deployer
	Example  *deploy.Example
	// Gateway is the address of the mesh between nodes.
	Gateway     string
	TrustDomain string
	// Kubeconfig holds a certificate that the CA has issued to a person.
	Kubeconfig string
}

// The workloads of examples/bank.
const (
	front     = "web"       // takes payments from outside
	assistant = "assistant" // runs code nobody has read, and the attacks
	bookkeep  = "ledger"    // knows the balances
)

// workloads of the bank, each of which must run.
var workloads = []string{"assistant", "ledger", "risk", "transfer", "vault", "web"}

// bank holds what the checks find out about a run.
type bank struct {
	Target
	namespace string
	door      string // URL of the front
	// before are the incidents that were there before the attacks.
	before map[string]bool
}

// Bank is the suite for examples/bank.
func Bank(t Target) Suite {
	b := &bank{Target: t, namespace: t.Example.Namespace(), before: map[string]bool{}}
	for _, d := range t.Example.Doors() {
		if d.Workload == front {
			b.door = d.URL
		}
	}
	return Suite{
		Links: []Check{
			{"own", b.owned}, {"release", b.released}, {"launch", b.launched}, {"boot", b.booted},
			{"identity", b.identified}, {"talk", b.talks},
		},
		Attacks: b.attacks(),
		After:   []Check{{"break", b.broken}},
		Restore: b.restore,
	}
}

// restore replaces the sandboxes that the attacks have left frozen. Their
// story stays in the ledger.
func (b *bank) restore(ctx context.Context) error {
	return b.Client.Restart(ctx, b.namespace, assistant)
}

// running finds one instance of each workload that runs, waiting for those
// that are being replaced.
func (b *bank) running(ctx context.Context, names ...string) (map[string]admin.Instance, error) {
	for {
		list, err := b.Client.Instances(ctx, b.namespace)
		if err != nil {
			return nil, err
		}
		found := map[string]admin.Instance{}
		for _, i := range list {
			if i.Phase == "Running" && slices.Contains(names, i.Workload) {
				found[i.Workload] = i
			}
		}
		if len(found) == len(names) {
			return found, nil
		}
		select {
		case <-ctx.Done():
			missing := slices.DeleteFunc(slices.Clone(names), func(n string) bool { _, ok := found[n]; return ok })
			return nil, fmt.Errorf("no instance of %s runs: %w", strings.Join(missing, ", "), context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// proven finds a chapter of a link that the ledger proves and that says the
// words.
func (b *bank) proven(ctx context.Context, subject, link, words string) (admin.Chapter, error) {
	story, err := b.Client.Why(ctx, b.namespace, subject)
	if err != nil {
		return admin.Chapter{}, err
	}
	for _, c := range story.Chapter {
		if c.Link == link && c.Index >= 0 && strings.Contains(c.Text, words) {
			return c, nil
		}
	}
	return admin.Chapter{}, fmt.Errorf("the ledger holds nothing about %s of %s with %q", link, subject, words)
}

// each runs f for every workload and says what it saw of the last.
func (b *bank) each(ctx context.Context, f func(admin.Instance) (string, error)) (seen string, err error) {
	all, err := b.running(ctx, workloads...)
	if err != nil {
		return "", err
	}
	var errs []error
	for _, w := range slices.Sorted(maps.Keys(all)) {
		s, err := f(all[w])
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", all[w].Name, err))
			continue
		}
		seen = s
	}
	if len(errs) > 0 {
		return fmt.Sprintf("%d of %d instances", len(all)-len(errs), len(all)), errors.Join(errs...)
	}
	return fmt.Sprintf("%d instances; the last: %s", len(all), seen), nil
}

func (b *bank) owned(ctx context.Context) (string, error) {
	return b.each(ctx, func(i admin.Instance) (string, error) {
		c, err := b.proven(ctx, i.Name, "own", i.Application)
		return c.Text, err
	})
}

func (b *bank) released(ctx context.Context) (string, error) {
	return b.each(ctx, func(i admin.Instance) (string, error) {
		c, err := b.proven(ctx, i.Digest, "release", "released")
		return c.Text, err
	})
}

func (b *bank) launched(ctx context.Context) (string, error) {
	return b.each(ctx, func(i admin.Instance) (string, error) {
		c, err := b.proven(ctx, i.Name, "launch", i.Digest[:min(19, len(i.Digest))])
		return c.Text, err
	})
}

// booted compares kernels: the guest's own is not the one this runs on.
func (b *bank) booted(ctx context.Context) (string, error) {
	seen, err := b.each(ctx, func(i admin.Instance) (string, error) {
		c, err := b.proven(ctx, i.Name, "boot", "runs on "+i.Node)
		if err == nil && i.Guard == "absent" {
			err = errors.New("no Guard is attached in it")
		}
		return c.Text + ", Guard " + i.Guard, err
	})
	if err != nil {
		return seen, err
	}
	host, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return seen, err
	}
	guest, err := b.inside(ctx, "/bin/cat", "/proc/sys/kernel/random/boot_id")
	if err != nil {
		return seen, err
	}
	if guest == "" || guest == string(host) {
		return seen, fmt.Errorf("boot id %q inside the sandbox is this machine's", guest)
	}
	return seen + "; its kernel booted as " + strings.TrimSpace(guest), nil
}

// inside runs a command in the assistant's sandbox and returns what it wrote.
func (b *bank) inside(ctx context.Context, args ...string) (string, error) {
	if _, err := b.running(ctx, assistant); err != nil {
		return "", err
	}
	var out, errs bytes.Buffer
	code, err := b.Client.Exec(ctx, admin.Exec{Namespace: b.namespace, Workload: assistant, Args: args}, client.Stdio{Out: &out, Err: &errs})
	if err == nil && code != 0 {
		err = fmt.Errorf("%s: exit code %d: %.200q", args[0], code, errs.String())
	}
	return out.String(), err
}

func (b *bank) identified(ctx context.Context) (string, error) {
	serials := map[string]string{}
	return b.each(ctx, func(i admin.Instance) (string, error) {
		c, err := b.proven(ctx, i.Name, "identity", i.Serial)
		switch want := "/ns/" + i.Namespace + "/sa/" + i.Workload; {
		case err != nil:
			return "", err
		case !strings.HasSuffix(i.Identity, want):
			return "", fmt.Errorf("identity is %q, want spiffe://…%s", i.Identity, want)
		case i.Serial == "" || serials[i.Serial] != "":
			return "", fmt.Errorf("serial %q is also that of %q", i.Serial, serials[i.Serial])
		}
		serials[i.Serial] = i.Name
		return c.Text, nil
	})
}

// accounts of the bank.
var accounts = []string{"alice", "bob", "carol", "dave"}

func (b *bank) balances(ctx context.Context) (map[string]int64, int64, error) {
	amounts, total := map[string]int64{}, int64(0)
	for _, a := range accounts {
		var answer struct{ Amount int64 }
		code, body, err := b.http(ctx, http.MethodGet, "/balance/"+a, "")
		if err != nil {
			return nil, 0, err
		}
		if err := json.Unmarshal(body, &answer); err != nil || code != http.StatusOK {
			return nil, 0, fmt.Errorf("balance of %s: status %d: %.200q", a, code, body)
		}
		amounts[a] = answer.Amount
		total += answer.Amount
	}
	return amounts, total, nil
}

func (b *bank) http(ctx context.Context, method, path, body string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, b.door+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, data, err
}

// pay moves money through every hop and back, and counts it.
func (b *bank) pay(ctx context.Context, payments int) (string, error) {
	before, total, err := b.balances(ctx)
	if err != nil {
		return "", err
	}
	began := time.Now()
	for n := range payments {
		// There and back, so that money runs out for nobody.
		from, to := accounts[n%2], accounts[1-n%2]
		body := fmt.Sprintf(`{"id":"check-%d-%d","from":%q,"to":%q,"amount":7}`, began.UnixNano(), n, from, to)
		code, answer, err := b.http(ctx, http.MethodPost, "/pay", body)
		if err != nil {
			return "", err
		}
		if code != http.StatusOK || !bytes.Contains(answer, []byte(`"signature"`)) {
			return "", fmt.Errorf("payment %d: status %d: %.300q", n, code, answer)
		}
	}
	took := time.Since(began)
	after, now, err := b.balances(ctx)
	if err != nil {
		return "", err
	}
	moved := int64(payments%2) * 7
	if now != total || after["alice"] != before["alice"]-moved || after["bob"] != before["bob"]+moved {
		return "", fmt.Errorf("money was made or lost: %v became %v", before, after)
	}
	return fmt.Sprintf("%d payments through web, transfer, risk, ledger and vault in %d ms, %d in all accounts before and after",
		payments, took.Milliseconds(), now), nil
}

func (b *bank) talks(ctx context.Context) (string, error) {
	seen, err := b.pay(ctx, 9)
	if err != nil {
		return seen, err
	}
	code, _, err := b.http(ctx, http.MethodGet, "/admin", "")
	if err != nil || code != http.StatusForbidden {
		return seen, fmt.Errorf("GET /admin, which no AccessPolicy allows: status %d, %w", code, err)
	}
	return seen + "; what no AccessPolicy allows is answered 403", nil
}

// broken looks at what the attacks have left: incidents with receipts, a bank
// that still works, and a ledger that verifies offline.
func (b *bank) broken(ctx context.Context) (string, error) {
	list, err := b.Client.Incidents(ctx, b.namespace)
	if err != nil {
		return "", err
	}
	fresh, slowest := 0, int64(0)
	for _, i := range list {
		if b.before[i.Name] {
			continue
		}
		fresh++
		slowest = max(slowest, i.ContainedMillis)
		points := map[string]bool{}
		for _, r := range i.Receipts {
			points[r.Point] = true
		}
		if i.State != "Contained" || !points["mesh"] || !points["sandbox"] {
			return "", fmt.Errorf("incident %s is %s with receipts of %v", i.Name, i.State, slices.Sorted(maps.Keys(points)))
		}
		if _, err := b.proven(ctx, i.Name, "break", ""); err != nil {
			return "", err
		}
	}
	if fresh == 0 {
		return "", errors.New("the attacks opened no incident")
	}
	seen := fmt.Sprintf("%d incidents, each with receipts of mesh and sandbox, the slowest after %d ms", fresh, slowest)
	if _, err := b.pay(ctx, 1); err != nil {
		return seen, fmt.Errorf("a payment after the attacks: %w", err)
	}
	size, err := b.verifyLedger(ctx)
	if err != nil {
		return seen, err
	}
	return fmt.Sprintf("%s; payments go on; the ledger of %d entries verifies offline", seen, size), nil
}

// verifyLedger checks a copy, without the control plane.
func (b *bank) verifyLedger(ctx context.Context) (uint64, error) {
	tar, key, err := b.Client.LedgerTar(ctx)
	if err != nil {
		return 0, err
	}
	defer tar.Close()
	dir, err := os.MkdirTemp("", "hauberk-check-*")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := layout.Unpack(tar, dir); err != nil {
		return 0, err
	}
	report, err := ledger.VerifyDir(dir, key)
	return report.Size, err
}
