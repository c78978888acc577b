package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path"
	"slices"
	"strings"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/control/rollout"
	"hauberk.dev/guard"
	"hauberk.dev/image"
	"hauberk.dev/ledger"
	"hauberk.dev/registry"
)

// guestGateway is the name server of every guest, as package netns has it.
var guestGateway = netip.AddrFrom4([4]byte{169, 254, 1, 1})

const (
	kindRefused = "guard.refused"
	// maxIndexes bounds how many images are remembered.
	maxIndexes = 64
)

// refusal is what the pre-check said of a content.
type refusal struct {
	object          int64
	digest, message string
}

// refuse records once that a content was not taken. What was in force before
// it stays in force.
func (c *Control) refuse(ctx context.Context, n rollout.Name, object int64, digest string, why error) error {
	r := refusal{object, digest, clip(why.Error(), maxDetail)}
	if c.refusals[n] == r {
		return nil
	}
	stays := "nothing of it is in force"
	if p := c.rollouts.Policy(n); p.Current != nil {
		stays = fmt.Sprintf("generation %d stays in force", p.Current.Number)
	}
	e := ledger.Entry{Time: c.now().UTC(), Kind: kindRefused, Actor: "hauberkd", Subject: n.String(), Namespace: n.Namespace,
		Text: fmt.Sprintf("guard policy %s: the pre-check refused content %.12s, and %s: %s", n, digest, stays, r.message)}
	if _, err := c.log.Append(ctx, e); err != nil {
		return fmt.Errorf("record %s: %w", e.Kind, err)
	}
	namespace := n.Namespace
	if n.Floor {
		namespace = rollout.Cluster
	}
	c.untold.add(rollout.Record{Kind: kindRefused, Policy: n.String(), Namespace: namespace, Text: e.Text, Body: []byte(`{"act":"refuse"}`)})
	c.refusals[n] = r
	return nil
}

// images finds what is known of an image.
type images func(repository, digest string) *image.Index

// preCheck says what is wrong with a content, before any guest has it: it is
// compiled with all else that holds for every workload it selects, and looked
// at beside what the workload needs to start. All faults are said at once.
func (w world) preCheck(n rollout.Name, s spec.ClusterGuardPolicy, images images) error {
	s.Rollout = nil
	name := n.Name
	if n.Floor {
		name = n.String()
	}
	alone := w.guard(rollout.Subject{Namespace: n.Namespace}, rollout.State{})
	alone.Generation, alone.Policies = 1, []wire.NamedGuardPolicy{{Name: name, Spec: s.GuardPolicy}}
	if _, err := guard.Compile(alone, guard.CompileFacts{Gateway: guestGateway}); err != nil {
		return err
	}
	var errs []error
	book := w.book.With(n, s)
	for _, k := range sortedKeys(w.workloads) {
		wl := w.workloads[k]
		of := w.subject(key{Namespace: k.Namespace}, instance{workload: k.Name}, wl)
		if !rollout.Selects(n, s.Select, of) {
			continue
		}
		g := w.guard(of, book)
		g.Generation = 1
		if _, err := guard.Compile(g, guard.CompileFacts{Gateway: guestGateway}); err != nil {
			errs = append(errs, fmt.Errorf("with all else that holds for workload %s: %w", k, err))
			continue
		}
		errs = append(errs, w.starts(k, wl, name, s.GuardPolicy, images))
	}
	return errors.Join(errs...)
}

// starts says what of a policy would keep a workload from starting. A policy
// that only reports keeps nobody from anything.
func (w world) starts(k key, wl workload, name string, p spec.GuardPolicy, images images) error {
	if p.Mode == "audit" || p.Mode == "learn" {
		return nil
	}
	errs := ports(wl, p.Net)
	for _, i := range w.instances {
		if i.workload != k.Name {
			continue
		}
		if x := images(i.repository, i.digest); x != nil {
			errs = append(errs, programs(x, wl.spec, p.Exec)...)
			errs = append(errs, settings(x, wl.spec, p.Files)...)
		}
		break
	}
	for n, err := range errs {
		errs[n] = fmt.Errorf("policy %q would keep workload %s from starting: %w", name, k, err)
	}
	return errors.Join(errs...)
}

// ports finds ports of the workload on which nobody could reach it.
func ports(wl workload, n *spec.GuardNet) (errs []error) {
	if n == nil || n.Ingress == nil || n.Audit {
		return nil
	}
	for _, p := range wl.spec.Ports {
		open := slices.ContainsFunc(n.Ingress, func(i spec.GuardIngress) bool {
			return i.Protocol != "udp" && slices.Contains(i.Ports, p.Port)
		})
		if !open {
			errs = append(errs, fmt.Errorf("net.ingress: it listens on port %d, which no entry names: add {ports: [%d]}", p.Port, p.Port))
		}
	}
	return errs
}

// command is what a workload starts, as its node finds it.
func command(x *image.Index, wl spec.Workload) []string {
	args := wl.Command
	if len(args) == 0 {
		args = x.Config.Entrypoint
		if len(wl.Args) == 0 {
			args = slices.Concat(args, x.Config.Cmd)
		}
	}
	return slices.Concat(args, wl.Args)
}

// searched is where a program without a slash is looked for.
var searched = [...]string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// startOf finds the program that a workload starts.
func startOf(x *image.Index, wl spec.Workload) (image.Program, bool) {
	args := command(x, wl)
	if len(args) == 0 {
		return image.Program{}, false
	}
	if strings.Contains(args[0], "/") {
		name := args[0]
		if !path.IsAbs(name) {
			name = path.Join("/", x.Config.WorkingDir, name)
		}
		return x.Program(name)
	}
	for _, dir := range searched {
		if p, ok := x.Program(dir + "/" + args[0]); ok {
			return p, true
		}
	}
	return image.Program{}, false
}

// programs finds programs of the workload's start that may not run.
func programs(x *image.Index, wl spec.Workload, e *spec.GuardExec) (errs []error) {
	first, ok := startOf(x, wl)
	if e == nil || !ok || e.Audit {
		return nil
	}
	same := func(rule string, p image.Program) bool {
		if sum, ok := strings.CutPrefix(rule, "sha256:"); ok {
			return sum == p.SHA256
		}
		real, ok := x.Real(rule)
		return ok && real == p.Path
	}
	chain := []image.Program{first}
	for p := first; p.Interpreter != "" && len(chain) < 5; {
		next, ok := x.Program(p.Interpreter)
		if !ok {
			break
		}
		chain, p = append(chain, next), next
	}
	for _, p := range chain {
		for n, d := range e.Deny {
			if same(d, p) {
				errs = append(errs, fmt.Errorf("exec.deny[%d]: %q is the program %s that it starts: take it out of the list", n, d, p.Path))
			}
		}
		listed := slices.ContainsFunc(e.Allow, func(a spec.GuardProgram) bool {
			return a.SHA256 != "" && a.SHA256 == p.SHA256 || a.Path != "" && same(a.Path, p)
		})
		if len(e.Allow) > 0 && !listed {
			errs = append(errs, fmt.Errorf("exec.allow: the program %s that it starts is not in the list: add {path: %s}", p.Path, p.Path))
		}
	}
	return append(errs, inline(x, first, command(x, wl), e)...)
}

// inline finds code in the arguments of the workload's own start.
func inline(x *image.Index, first image.Program, args []string, e *spec.GuardExec) (errs []error) {
	if e.Scripts == nil || e.Scripts.Inline != "deny" || len(args) < 2 || !slices.Contains([]string{"-c", "-e"}, args[1]) {
		return nil
	}
	for _, name := range e.Scripts.Interpreters {
		if real, ok := x.Real(name); ok && real == first.Path {
			errs = append(errs, fmt.Errorf("exec.scripts.inline: it starts with %q: write the code into a file of the image", strings.Join(args[:2], " ")))
		}
	}
	return errs
}

// settings finds files that the workload's start names or needs, and that it
// may not read.
func settings(x *image.Index, wl spec.Workload, files []spec.GuardFile) (errs []error) {
	first, ok := startOf(x, wl)
	if !ok {
		return nil
	}
	needs := []string{first.Path, "/etc/resolv.conf", "/etc/hosts"}
	for _, a := range command(x, wl)[1:] {
		if _, after, ok := strings.Cut(a, "="); ok && strings.HasPrefix(a, "-") {
			a = after
		}
		if !path.IsAbs(a) {
			continue
		}
		if real, ok := x.Real(a); ok {
			needs = append(needs, real)
		}
	}
	for _, need := range slices.Compact(needs) {
		n, rule := deepest(x, files, need)
		if n < 0 || rule.Audit || !hides(x, rule, first) {
			continue
		}
		errs = append(errs, fmt.Errorf("files[%d].path: %q covers %s, which it must read: deny w only, or name a deeper path", n, rule.Path, need))
	}
	return errs
}

// deepest is the rule that decides about a file.
func deepest(x *image.Index, files []spec.GuardFile, name string) (int, spec.GuardFile) {
	best, depth := -1, -1
	for n, f := range files {
		at := f.Path
		if real, ok := x.Real(at); ok {
			at = real
		}
		if at != "/" && at != name && !strings.HasPrefix(name, at+"/") || len(at) <= depth {
			continue
		}
		best, depth = n, len(at)
	}
	if best < 0 {
		return best, spec.GuardFile{}
	}
	return best, files[best]
}

// hides tells whether a rule keeps a program from reading what it covers.
func hides(x *image.Index, f spec.GuardFile, p image.Program) bool {
	if f.Allow != "" {
		mine := len(f.By) == 0 || slices.ContainsFunc(f.By, func(by string) bool { real, ok := x.Real(by); return ok && real == p.Path })
		return !mine || !strings.Contains(f.Allow, "r")
	}
	return f.Bait || strings.Contains(f.Deny, "r")
}

// blobs reads an image of the control plane's own registry.
type blobs struct {
	content    *registry.Store
	repository string
	manifest   string
}

// Open implements image.Blobs.
func (b blobs) Open(ctx context.Context, digest string) (io.ReadCloser, error) {
	if digest == b.manifest {
		_, raw, err := b.content.Manifest(ctx, b.repository, digest)
		return io.NopCloser(strings.NewReader(string(raw))), err
	}
	r, _, err := b.content.Blob(ctx, b.repository, digest)
	return r, err
}

// images reads the index of an image, once. What cannot be read is not known,
// which is no reason to refuse a policy.
func (c *Control) images(repository, digest string) *image.Index {
	name := repository + "@" + digest
	if x, ok := c.indexes[name]; ok {
		return x
	}
	dir := c.path(scratch, "index")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		c.note(fmt.Errorf("index image: %w", err))
		return nil
	}
	x, err := image.ReadIndex(context.Background(), blobs{c.content, repository, digest}, digest, dir)
	if err != nil {
		c.note(fmt.Errorf("pre-check without the files of %s: %w", name, err))
	}
	if len(c.indexes) >= maxIndexes {
		clear(c.indexes)
	}
	c.indexes[name] = x
	return x
}
