package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metainternal "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage"
	storageerrors "k8s.io/apiserver/pkg/storage/errors"
	"k8s.io/apiserver/pkg/util/dryrun"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	restclient "k8s.io/client-go/rest"
)

// prepareNamespace gives a namespace the finalizer that keeps it until it is
// empty, and keeps ordinary updates away from it and from the status.
func prepareNamespace(obj, old runtime.Object) {
	ns := obj.(*corev1.Namespace)
	if was, ok := old.(*corev1.Namespace); ok {
		ns.Spec, ns.Status = was.Spec, was.Status
		return
	}
	ns.Spec.Finalizers = []corev1.FinalizerName{corev1.FinalizerKubernetes}
	ns.Status = corev1.NamespaceStatus{Phase: corev1.NamespaceActive}
}

func namespaceAttributes(obj runtime.Object) (labels.Set, fields.Set, error) {
	l, f, err := storage.DefaultClusterScopedAttr(obj)
	if ns, ok := obj.(*corev1.Namespace); ok && err == nil {
		f["status.phase"] = string(ns.Status.Phase)
	}
	return l, f, err
}

// addNamespaces adds the storage of namespaces and of the parts of one.
func addNamespaces(to map[string]rest.Storage, store *registry.Store, short []string) {
	store.ShouldDeleteDuringUpdate = emptied
	to["namespaces"] = namespaces{stored{store, short}}
	how := store.UpdateStrategy.(strategy)
	part := func(keep func(obj, old *corev1.Namespace)) rest.Storage {
		s, h := *store, how
		h.prepare = func(obj, old runtime.Object) { keep(obj.(*corev1.Namespace), old.(*corev1.Namespace)) }
		s.UpdateStrategy = h
		return namespacePart{&s}
	}
	to["namespaces/status"] = part(func(obj, old *corev1.Namespace) { obj.Spec = old.Spec })
	to["namespaces/finalize"] = part(func(obj, old *corev1.Namespace) { obj.Status = old.Status })
}

// emptied says whether an update took the last thing that kept a namespace.
func emptied(ctx context.Context, key string, obj, existing runtime.Object) bool {
	return len(obj.(*corev1.Namespace).Spec.Finalizers) == 0 && registry.ShouldDeleteDuringUpdate(ctx, key, obj, existing)
}

// namespaces is the storage of namespaces: deleting one only marks it until
// the controller below has emptied it.
type namespaces struct{ stored }

// Delete implements rest.GracefulDeleter.
func (n namespaces) Delete(ctx context.Context, name string, validate rest.ValidateObjectFunc, options *metav1.DeleteOptions) (runtime.Object, bool, error) {
	obj, err := n.Get(ctx, name, &metav1.GetOptions{})
	if err != nil {
		return nil, false, err
	}
	ns := obj.(*corev1.Namespace)
	switch {
	case ns.DeletionTimestamp.IsZero():
		ns, err = n.terminate(ctx, name, validate, options)
		return ns, false, err
	case len(ns.Spec.Finalizers) > 0:
		return ns, false, nil
	default:
		return n.Store.Delete(ctx, name, validate, options)
	}
}

func (n namespaces) terminate(ctx context.Context, name string, validate rest.ValidateObjectFunc, options *metav1.DeleteOptions) (*corev1.Namespace, error) {
	key, err := n.KeyFunc(ctx, name)
	if err != nil {
		return nil, err
	}
	var only storage.Preconditions
	if p := options.Preconditions; p != nil {
		only = storage.Preconditions{UID: p.UID, ResourceVersion: p.ResourceVersion}
	}
	out := &corev1.Namespace{}
	err = n.Storage.GuaranteedUpdate(ctx, key, out, false, &only, storage.SimpleUpdate(func(obj runtime.Object) (runtime.Object, error) {
		ns := obj.(*corev1.Namespace)
		if validate != nil {
			if err := validate(ctx, ns); err != nil {
				return nil, err
			}
		}
		if ns.DeletionTimestamp.IsZero() {
			now := metav1.Now()
			ns.DeletionTimestamp = &now
			ns.DeletionGracePeriodSeconds = new(int64)
		}
		ns.Status.Phase = corev1.NamespaceTerminating
		return ns, nil
	}), dryrun.IsDryRun(options.DryRun), nil)
	if err != nil {
		err = storageerrors.InterpretGetError(err, n.DefaultQualifiedResource, name)
		return nil, storageerrors.InterpretUpdateError(err, n.DefaultQualifiedResource, name)
	}
	return out, nil
}

// DeleteCollection implements rest.CollectionDeleter: one call must not take
// away every namespace.
func (n namespaces) DeleteCollection(context.Context, rest.ValidateObjectFunc, *metav1.DeleteOptions, *metainternal.ListOptions) (runtime.Object, error) {
	return nil, apierrors.NewMethodNotSupported(n.DefaultQualifiedResource, "deletecollection")
}

// namespacePart is a subresource of a namespace.
type namespacePart struct{ store *registry.Store }

func (namespacePart) New() runtime.Object { return &corev1.Namespace{} }
func (namespacePart) Destroy()            {} // the store belongs to the namespaces

func (p namespacePart) Get(ctx context.Context, name string, options *metav1.GetOptions) (runtime.Object, error) {
	return p.store.Get(ctx, name, options)
}

func (p namespacePart) Update(ctx context.Context, name string, obj rest.UpdatedObjectInfo, create rest.ValidateObjectFunc, update rest.ValidateObjectUpdateFunc, _ bool, options *metav1.UpdateOptions) (runtime.Object, bool, error) {
	return p.store.Update(ctx, name, obj, create, update, false, options)
}

// janitor empties namespaces that are being deleted, then lets go of them.
type janitor struct {
	client *kubernetes.Clientset
	any    metadata.Interface
	log    *slog.Logger
}

func newJanitor(config *restclient.Config, log *slog.Logger) (*janitor, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("open client of the namespace controller: %w", err)
	}
	any, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("open client of the namespace controller: %w", err)
	}
	return &janitor{client: client, any: any, log: log}, nil
}

// Run empties namespaces until ctx ends. It looks when a namespace changes,
// and again and again while one is not empty.
func (j *janitor) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		left, version, err := j.sweep(ctx)
		if err != nil && ctx.Err() == nil {
			j.log.Warn("empty namespaces", "error", err)
		}
		if left || err != nil {
			pause(ctx, 100*time.Millisecond)
			continue
		}
		j.await(ctx, version)
	}
	return nil
}

// await returns when a namespace may have changed since version.
func (j *janitor) await(ctx context.Context, version string) {
	seconds := int64(60)
	w, err := j.client.CoreV1().Namespaces().Watch(ctx, metav1.ListOptions{ResourceVersion: version, FieldSelector: "status.phase=Terminating", TimeoutSeconds: &seconds})
	if err != nil {
		pause(ctx, time.Second)
		return
	}
	defer w.Stop()
	select {
	case <-ctx.Done():
	case <-w.ResultChan():
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// sweep empties every terminating namespace once. left says that one is still
// there.
func (j *janitor) sweep(ctx context.Context) (left bool, version string, err error) {
	list, err := j.client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{FieldSelector: "status.phase=Terminating"})
	if err != nil {
		return false, "", fmt.Errorf("list namespaces: %w", err)
	}
	var errs []error
	for i := range list.Items {
		ns := &list.Items[i]
		if !slices.Contains(ns.Spec.Finalizers, corev1.FinalizerKubernetes) {
			continue
		}
		more, err := j.empty(ctx, ns.Name)
		if err == nil && !more {
			err = j.release(ctx, ns)
		}
		left = left || more
		if err != nil {
			errs = append(errs, fmt.Errorf("empty namespace %q: %w", ns.Name, err))
		}
	}
	return left, list.ResourceVersion, errors.Join(errs...)
}

// empty deletes what is in a namespace. more says that something is left, such
// as an object whose own finalizer is not done.
func (j *janitor) empty(ctx context.Context, namespace string) (more bool, err error) {
	// A group that cannot be asked may hold something: then nothing is released.
	lists, err := j.client.Discovery().ServerPreferredNamespacedResources()
	if err != nil {
		return true, fmt.Errorf("list kinds: %w", err)
	}
	var errs []error
	for _, l := range lists {
		gv, err := schema.ParseGroupVersion(l.GroupVersion)
		if err != nil {
			return true, err
		}
		for _, r := range l.APIResources {
			if !slices.Contains(r.Verbs, "deletecollection") || !slices.Contains(r.Verbs, "list") {
				continue
			}
			some, err := j.clear(ctx, gv.WithResource(r.Name), namespace)
			more = more || some
			if err != nil {
				errs = append(errs, fmt.Errorf("delete %s: %w", r.Name, err))
			}
		}
	}
	return more || len(errs) > 0, errors.Join(errs...)
}

// clear deletes every object of a kind in a namespace; more says that some
// were there.
func (j *janitor) clear(ctx context.Context, kind schema.GroupVersionResource, namespace string) (more bool, err error) {
	list, err := j.any.Resource(kind).Namespace(namespace).List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil || len(list.Items) == 0 {
		return err != nil, err
	}
	background := metav1.DeletePropagationBackground
	err = j.any.Resource(kind).Namespace(namespace).DeleteCollection(ctx, metav1.DeleteOptions{PropagationPolicy: &background}, metav1.ListOptions{})
	return true, err
}

// release takes away what kept an empty namespace.
func (j *janitor) release(ctx context.Context, ns *corev1.Namespace) error {
	ns = ns.DeepCopy()
	ns.Spec.Finalizers = slices.DeleteFunc(ns.Spec.Finalizers, func(f corev1.FinalizerName) bool { return f == corev1.FinalizerKubernetes })
	_, err := j.client.CoreV1().Namespaces().Finalize(ctx, ns, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
