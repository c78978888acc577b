// Package deploy brings an example up: it builds its images, has its accounts
// sign for them, releases them, applies its resources, and waits until they
// run.
//
// The accounts' keys lie on this machine, which makes it a demonstration: in
// earnest each of them signs on a machine of their own, and hauberk release
// takes what they have signed.
package deploy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/api/spec"
	"hauberk.dev/cmd/hauberk/internal/client"
	"hauberk.dev/cmd/hauberk/internal/layout"
	"hauberk.dev/cmd/hauberk/internal/progress"
	"hauberk.dev/evidence"
	"hauberk.dev/id"
	"hauberk.dev/image/build"
)

// maxYAML bounds each file of resources.
const maxYAML = 4 << 20

const (
	runningWithin = 5 * time.Minute
	answersWithin = time.Minute
	pollEvery     = 200 * time.Millisecond
	askWithin     = 5 * time.Second // why something does not run
	// faultFor is how long a fault must last: what was contained may be about
	// to be replaced.
	faultFor = 10 * time.Second
)

// Example is what a directory holds: a recipe for images in its one JSON file,
// resources in its YAML files, in which ${KEY_account} stands for the public
// key of an account, and other placeholders for what the caller sets.
type Example struct {
	Dir    string
	Recipe build.Recipe
	docs   []*document
}

// Door is a port of a workload that is open on this machine.
type Door struct {
	Workload string
	URL      string
}

// Deployer brings examples up.
type Deployer struct {
	Client   *client.Client
	Progress *progress.Log
	Accounts string // directory of the accounts' keys
	Layouts  string // directory images are built into
	// Settings replace placeholders, such as WEB_PORT.
	Settings map[string]string
}

// Open reads an example. It makes the keys of the accounts it names, and
// changes nothing else.
func (d *Deployer) Open(dir string) (*Example, error) {
	name, err := recipeFile(dir)
	if err != nil {
		return nil, err
	}
	recipe, err := build.ReadRecipe(name)
	if err != nil {
		return nil, err
	}
	x := &Example{Dir: dir, Recipe: recipe}
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil || len(files) == 0 {
		return nil, fmt.Errorf("read example: no *.yaml in %s", dir)
	}
	for _, f := range files {
		docs, err := d.readDocuments(f)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", f, err)
		}
		x.docs = append(x.docs, docs...)
	}
	return x, nil
}

func recipeFile(dir string) (string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(files) != 1 {
		return "", fmt.Errorf("read example: %d files *.json in %s, want the one that lists its images: name a directory such as examples/bank", len(files), dir)
	}
	return files[0], nil
}

func (d *Deployer) readDocuments(name string) ([]*document, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxYAML+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxYAML {
		return nil, fmt.Errorf("more than %d bytes", maxYAML)
	}
	text, err := substitute(string(raw), d.setting)
	if err != nil {
		return nil, err
	}
	return documents([]byte(text))
}

// setting is what a placeholder stands for, as YAML.
func (d *Deployer) setting(name string) (string, error) {
	if account, ok := strings.CutPrefix(name, "KEY_"); ok {
		s, err := d.signer(account)
		if err != nil {
			return "", err
		}
		return strconv.Quote(string(s.Key().PEM())), nil
	}
	v, ok := d.Settings[name]
	if !ok {
		return "", fmt.Errorf("nothing is set for ${%s}: set it with --set %s=VALUE", name, name)
	}
	return v, nil
}

// Doors lists the ports that workloads publish.
func (x *Example) Doors() (doors []Door) {
	for _, d := range x.docs {
		for _, p := range d.Spec.Ports {
			if d.Kind == "Workload" && p.Publish != 0 {
				scheme := "http"
				if p.Protocol != "http" {
					scheme = "tcp"
				}
				doors = append(doors, Door{d.Metadata.Name, fmt.Sprintf("%s://127.0.0.1:%d", scheme, p.Publish)})
			}
		}
	}
	return doors
}

// Namespace of the example.
func (x *Example) Namespace() string { return x.Recipe.Namespace }

// Deploy brings the example up. It can be done again: what is there stays.
func (d *Deployer) Deploy(ctx context.Context, x *Example) error {
	// Workloads come last: one without a release is refused, and that refusal
	// would be in the ledger for ever.
	if err := d.apply(ctx, x, "policies", func(doc *document) bool { return doc.Kind != "Workload" }); err != nil {
		return err
	}
	for _, img := range x.Recipe.Images {
		if err := d.release(ctx, x, img); err != nil {
			return err
		}
	}
	if err := d.apply(ctx, x, "workloads", func(doc *document) bool { return doc.Kind == "Workload" }); err != nil {
		return err
	}
	if err := d.running(ctx, x); err != nil {
		return err
	}
	for _, door := range x.Doors() {
		if err := d.answers(ctx, door); err != nil {
			return err
		}
	}
	return nil
}

func (d *Deployer) apply(ctx context.Context, x *Example, what string, pass func(*document) bool) error {
	end := d.Progress.Step("applying %s", what)
	raw, err := encode(x.docs, pass)
	if err != nil {
		return err
	}
	_, err = d.Client.Apply(ctx, raw)
	return end(err)
}

// signer is the key of an account, made at the first use.
func (d *Deployer) signer(account string) (*evidence.KeySigner, error) {
	if !filepath.IsLocal(account) || strings.ContainsRune(account, '/') {
		return nil, fmt.Errorf("account %q: not a name for a file", account)
	}
	key, err := id.LoadOrCreateKey(filepath.Join(d.Accounts, account+".pem"))
	if err != nil {
		return nil, fmt.Errorf("key of account %s: %w", account, err)
	}
	return evidence.NewSigner(key, account)
}

// release builds an image, signs for it as builder, reviewer and owner, and
// submits it to the gate.
func (d *Deployer) release(ctx context.Context, x *Example, img build.Image) error {
	built, err := d.Build(ctx, x, img)
	if err != nil {
		return err
	}
	end := d.Progress.Step("releasing %s", img.Name)
	if err := d.sign(x, img, built); err != nil {
		return err
	}
	_, err = Submit(ctx, d.Client, x.Recipe.Namespace, img.Application, img.Name, built.Layout)
	return end(err)
}

// Build builds one image of an example and signs its provenance.
func (d *Deployer) Build(ctx context.Context, x *Example, img build.Image) (build.Built, error) {
	end := d.Progress.Step("building %s", img.Name)
	signer, err := d.holder(x, img.Application, spec.RoleBuilder, "")
	if err != nil {
		return build.Built{}, err
	}
	src, modified, err := build.Checkout(ctx, x.Dir, x.Recipe.Repository, x.Recipe.Author)
	if err != nil {
		return build.Built{}, err
	}
	if err := os.MkdirAll(d.Layouts, 0o700); err != nil {
		return build.Built{}, err
	}
	built, err := build.Build(ctx, build.Spec{
		Dir: x.Dir, Image: img, Output: d.Layout(img.Name),
		Source: src, Modified: modified, Builder: x.Recipe.Builder, Signer: signer,
	})
	return built, end(err)
}

// Layout is the directory an image is built into.
func (d *Deployer) Layout(image string) string {
	return filepath.Join(d.Layouts, strings.NewReplacer("/", "_", ":", "_").Replace(image))
}

// sign puts the review and the approval beside the provenance.
func (d *Deployer) sign(x *Example, img build.Image, built build.Built) error {
	reviewer, err := d.holder(x, img.Application, spec.RoleReviewer, x.Recipe.Author)
	if err != nil {
		return err
	}
	owner, err := d.holder(x, img.Application, spec.RoleOwner, "")
	if err != nil {
		return err
	}
	revision, err := revision(built)
	if err != nil {
		return err
	}
	now := time.Now().UTC().Truncate(time.Second)
	review, err := evidence.SignStatement(img.Name, built.Digest, evidence.Review{
		Reviewer: reviewer.Key().Subject, Author: x.Recipe.Author, Revision: revision, ReviewedOn: now}, reviewer)
	if err != nil {
		return err
	}
	approval, err := evidence.SignStatement(img.Name, built.Digest, evidence.Approval{
		Owner: owner.Key().Subject, Application: img.Application, ApprovedOn: now}, owner)
	if err != nil {
		return err
	}
	dir := filepath.Join(built.Layout, "evidence")
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "review-reviewer.json"), append(review.Raw(), '\n'), 0o644),
		os.WriteFile(filepath.Join(dir, "approval-owner.json"), append(approval.Raw(), '\n'), 0o644))
}

// holder is the signer of an application's account with a role.
func (d *Deployer) holder(x *Example, application string, role spec.Role, not string) (*evidence.KeySigner, error) {
	name, err := holder(x.docs, x.Recipe.Namespace, application, role, not)
	if err != nil {
		return nil, err
	}
	return d.signer(name)
}

func revision(built build.Built) (string, error) {
	st, err := evidence.ParseStatement(built.Provenance.Payload)
	if err != nil {
		return "", err
	}
	return sourceRevision(st)
}

// Submit sends the layout in dir to the gate.
func Submit(ctx context.Context, c *client.Client, namespace, application, image, dir string) (admin.Released, error) {
	r, w := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := layout.Pack(w, os.DirFS(dir))
		w.CloseWithError(err)
		packed <- err
	}()
	answer, err := c.Release(ctx, namespace, application, image, r)
	r.Close() // a gate that refused early does not read on
	if broken := <-packed; broken != nil && !errors.Is(broken, io.ErrClosedPipe) {
		return admin.Released{}, broken
	}
	return answer, err
}

// running waits until every workload of the example runs. What cannot come
// good by waiting ends the wait.
func (d *Deployer) running(ctx context.Context, x *Example) error {
	ctx, cancel := context.WithTimeout(ctx, runningWithin)
	defer cancel()
	want := map[string]int{}
	for _, doc := range x.docs {
		if doc.Kind == "Workload" {
			want[doc.Metadata.Name] = replicas(doc)
		}
	}
	end := d.Progress.Step("waiting for %d workloads to run", len(want))
	lastGood := time.Now()
	for {
		list, err := d.Client.Instances(ctx, x.Recipe.Namespace)
		if err != nil {
			return err
		}
		missing, fault := judge(want, list)
		switch {
		case len(missing) == 0:
			return end(nil)
		case fault == nil:
			lastGood = time.Now()
		case time.Since(lastGood) > faultFor:
			return end(fault)
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("wait for %s to run: %w", strings.Join(missing, ", "), ctx.Err()), fault, d.standing(ctx, x.Recipe.Namespace, missing))
		case <-time.After(pollEvery):
		}
	}
}

// standing is what the control plane says of workloads that do not run.
func (d *Deployer) standing(ctx context.Context, namespace string, workloads []string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), askWithin)
	defer cancel()
	var all []error
	for _, w := range workloads {
		if story, err := d.Client.Why(ctx, namespace, w); err == nil {
			all = append(all, errors.New(story.Answer))
		}
	}
	return errors.Join(all...)
}

// answers waits until what is behind a door that speaks HTTP answers: a process
// that has been started may not be listening yet.
func (d *Deployer) answers(ctx context.Context, door Door) error {
	if !strings.HasPrefix(door.URL, "http:") {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, answersWithin)
	defer cancel()
	end := d.Progress.Step("waiting for %s to answer at %s", door.Workload, door.URL)
	for {
		err := ask(ctx, door.URL)
		if err == nil {
			return end(nil)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s to answer at %s within %v: %w", door.Workload, door.URL, answersWithin, err)
		case <-time.After(pollEvery):
		}
	}
}

// ask says what a server's own faults are; any other answer will do.
func ask(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	if resp.StatusCode >= http.StatusInternalServerError {
		return fmt.Errorf("%s: %q", resp.Status, said)
	}
	return err
}

func replicas(doc *document) int {
	if doc.Spec.Replicas == nil {
		return 1
	}
	return *doc.Spec.Replicas
}

// judge names the workloads of which too few instances run, and why the first
// of them will not come good by waiting, if nothing else of it is on its way.
func judge(want map[string]int, list []admin.Instance) (missing []string, fault error) {
	running, coming, bad := map[string]int{}, map[string]int{}, map[string]admin.Instance{}
	for _, i := range list {
		switch i.Phase {
		case "Running":
			running[i.Workload]++
		case "Refused", "Contained", "Failed":
			bad[i.Workload] = i
		default:
			coming[i.Workload]++
		}
	}
	for w, n := range want {
		if running[w] < n {
			missing = append(missing, w)
		}
	}
	slices.Sort(missing)
	for _, w := range missing {
		if i, ok := bad[w]; ok && coming[w] == 0 {
			return missing, &admin.Error{
				Message: fmt.Sprintf("workload %s: instance %s is %s: %s", w, i.Name, i.Phase, i.Message),
				Fix:     fmt.Sprintf("see hauberk why %s/%s; replace a contained instance with hauberk restart %s/%s", i.Namespace, w, i.Namespace, w),
			}
		}
	}
	return missing, nil
}
