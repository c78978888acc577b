package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"hauberk.dev/api/admin"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/contain"
	"hauberk.dev/evidence"
	"hauberk.dev/kube"
	"hauberk.dev/ledger"
	"hauberk.dev/release"
)

func (c *Control) gateOptions(signer *evidence.KeySigner) release.Options {
	return release.Options{
		Applications: gateView{c}, Policies: gateView{c}, Store: c.content, Recorder: c.log, Signer: signer,
		Name: "https://" + c.conf.TrustDomain + "/gate", Epoch: c.book.Epoch, Clock: c.now, Scratch: c.path(scratch),
	}
}

// gateView shows the gate the resources it decides by, straight from the
// store: a release right after its Application must see it.
type gateView struct{ c *Control }

// Application finds an application.
func (v gateView) Application(ctx context.Context, namespace, name string) (spec.Application, error) {
	o, err := kube.Get[v1alpha1.Application](ctx, v.c.store, namespace, name)
	if kube.NotFound(err) {
		return spec.Application{}, fmt.Errorf("application %s/%s: %w", namespace, name, fs.ErrNotExist)
	}
	if err != nil {
		return spec.Application{}, err
	}
	return o.Spec, nil
}

// ReleasePolicies lists the policies of a namespace.
func (v gateView) ReleasePolicies(ctx context.Context, namespace string) ([]release.Policy, error) {
	all, err := kube.List[v1alpha1.ReleasePolicy](ctx, v.c.store, namespace)
	if err != nil {
		return nil, err
	}
	out := make([]release.Policy, 0, len(all))
	for _, o := range all {
		out = append(out, release.Policy{Name: o.Name, Spec: o.Spec})
	}
	return out, nil
}

// release puts a submission before the gate.
func (c *Control) release(ctx context.Context, namespace, application, image string, tar io.Reader) (admin.Released, error) {
	d, err := c.gate.Release(ctx, release.Submission{Namespace: namespace, Application: application, Image: image, Actor: "admin", Tar: tar})
	if err != nil {
		return admin.Released{}, explainRefusal(err)
	}
	c.look()
	out := admin.Released{Image: d.Image(), Digest: d.Digest, Application: d.Application, Index: d.Index}
	for _, check := range d.Checks {
		out.Checks = append(out.Checks, check.Name+": "+check.Detail)
	}
	return out, nil
}

// explainRefusal gives people the gate's own words and the fix.
func explainRefusal(err error) error {
	var r *release.Refusal
	if !errors.As(err, &r) {
		return err
	}
	message := r.Message
	if r.Index >= 0 {
		message += fmt.Sprintf(" (recorded: hauberk why %d)", r.Index)
	}
	return &admin.Error{Reason: r.Reason, Message: message, Fix: r.Fix}
}

func refusalReason(err error) string {
	var r *release.Refusal
	if errors.As(err, &r) {
		return r.Reason
	}
	return "ReleaseUnknown"
}

// recordLaunchRefusal notes that a workload may not be launched: once per
// reason, however often it is tried.
func (c *Control) recordLaunchRefusal(ctx context.Context, k key, wl workload, why error) error {
	text := fmt.Sprintf("launch of %s refused: image %s: %v", k, wl.spec.Image, why)
	last, err := c.log.Find(ledger.Query{Kind: kindLaunchDenied, Namespace: k.Namespace, Workload: k.Name, Limit: 1})
	if err != nil {
		return err
	}
	if len(last) == 1 && last[0].Entry.Text == text {
		return nil
	}
	body, err := json.Marshal(map[string]string{"image": wl.spec.Image, "reason": refusalReason(why)})
	if err != nil {
		return fmt.Errorf("record refusal: %w", err)
	}
	return c.record(ctx, contain.Record{Kind: kindLaunchDenied, Namespace: k.Namespace, Application: wl.spec.Application,
		Workload: k.Name, Text: text, Body: body})
}

func ledgerBoot(instance string) ledger.Query {
	return ledger.Query{Kind: kindBoot, Instance: instance, Limit: 1}
}
