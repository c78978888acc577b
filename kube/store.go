package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/dynamic"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"hauberk.dev/api/v1alpha1"
)

// Words of Kubernetes that callers of a Store need, so that they name none of
// its packages.
type (
	// Object is anything with a name that the API stores.
	Object = client.Object
	// ObjectMeta is the metadata of an object.
	ObjectMeta = metav1.ObjectMeta
	// Time is a moment in whole seconds, MicroTime one in microseconds.
	Time      = metav1.Time
	MicroTime = metav1.MicroTime
	// Condition is one condition of a status.
	Condition = metav1.Condition
)

// Resource is the pointer to a resource of package v1alpha1.
type Resource[T any] interface {
	*T
	client.Object
	v1alpha1.Stander
}

// Store reads and writes the resources of one API. Reading asks a cache that
// Run keeps; whoever wrote through the same Store reads what was written.
type Store struct {
	client  client.Client // reads from the cache
	live    client.Client // reads from the server
	anyKind dynamic.Interface
	cache   cache.Cache

	mu       sync.Mutex
	watchers map[chan struct{}]bool
}

// Connect opens a store on an API that serves Hauberk's resources. Call Run
// next: reading and writing wait until it has filled the cache.
func Connect(ctx context.Context, a Access) (*Store, error) {
	config, err := a.config()
	if err != nil {
		return nil, fmt.Errorf("connect to API: %w", err)
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(v1alpha1.AddToScheme(scheme), corev1.AddToScheme(scheme)); err != nil {
		return nil, fmt.Errorf("connect to API: %w", err)
	}
	s := &Store{watchers: map[chan struct{}]bool{}}
	if s.live, err = client.New(config, client.Options{Scheme: scheme}); err != nil {
		return nil, fmt.Errorf("connect to API at %s: %w", config.Host, err)
	}
	if err := s.live.List(ctx, &v1alpha1.WorkloadList{}, client.Limit(1)); err != nil {
		return nil, fmt.Errorf("connect to API at %s: ask for workloads: %w", config.Host, err)
	}
	if s.anyKind, err = dynamic.NewForConfig(config); err != nil {
		return nil, fmt.Errorf("connect to API at %s: %w", config.Host, err)
	}
	if s.cache, err = cache.New(config, cache.Options{Scheme: scheme, Mapper: s.live.RESTMapper()}); err != nil {
		return nil, fmt.Errorf("connect to API at %s: %w", config.Host, err)
	}
	ownWrites := true
	s.client, err = client.New(config, client.Options{Scheme: scheme, Mapper: s.live.RESTMapper(), Cache: &client.CacheOptions{Reader: s.cache, EnableReadYourWritesConsistency: &ownWrites}})
	if err != nil {
		return nil, fmt.Errorf("connect to API at %s: %w", config.Host, err)
	}
	return s, s.listen(ctx)
}

// listen rings for every change of what the store watches.
func (s *Store) listen(ctx context.Context) error {
	watched := []client.Object{
		&v1alpha1.Application{}, &v1alpha1.Workload{}, &v1alpha1.GuardPolicy{}, &v1alpha1.ClusterGuardPolicy{}, &v1alpha1.AccessPolicy{},
		&v1alpha1.ReleasePolicy{}, &v1alpha1.Incident{}, &v1alpha1.Instance{}, &corev1.Namespace{},
	}
	for _, kind := range watched {
		informer, err := s.cache.GetInformer(ctx, kind, cache.BlockUntilSynced(false))
		if err == nil {
			_, err = informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
				AddFunc:    func(any) { s.ring() },
				UpdateFunc: func(_, _ any) { s.ring() },
				DeleteFunc: func(any) { s.ring() },
			})
		}
		if err != nil {
			return fmt.Errorf("watch %T: %w", kind, err)
		}
	}
	return nil
}

func (s *Store) ring() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watchers {
		select {
		case w <- struct{}{}:
		default: // it has yet to look at an earlier change
		}
	}
}

// Client is the client beneath the store, reading from its cache.
func (s *Store) Client() client.Client { return s.client }

// Run fills the cache and keeps it until ctx ends.
func (s *Store) Run(ctx context.Context) error {
	if err := s.cache.Start(ctx); err != nil {
		return fmt.Errorf("keep cache of resources: %w", err)
	}
	return nil
}

// Filled returns once the cache holds everything.
func (s *Store) Filled(ctx context.Context) error {
	if !s.cache.WaitForCacheSync(ctx) {
		return fmt.Errorf("fill cache of resources: %w", context.Cause(ctx))
	}
	return nil
}

// Watch calls see once the cache is filled and again after every change of a
// resource or a namespace, until ctx ends. Calls never overlap; changes during
// a call are one call.
func (s *Store) Watch(ctx context.Context, see func(context.Context)) error {
	changed := make(chan struct{}, 1)
	s.mu.Lock()
	s.watchers[changed] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, changed)
	}()
	if err := s.Filled(ctx); err != nil {
		return err
	}
	for {
		see(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// List returns the resources of a kind, ordered by namespace and name; an
// empty namespace means all of them. They are the caller's to change.
func List[T any, P Resource[T]](ctx context.Context, s *Store, namespace string) ([]T, error) {
	gvk, err := s.client.GroupVersionKindFor(P(new(T)))
	if err != nil {
		return nil, fmt.Errorf("list resources: %w", err)
	}
	made, err := s.client.Scheme().New(gvk.GroupVersion().WithKind(gvk.Kind + "List"))
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", gvk.Kind, err)
	}
	list := made.(client.ObjectList)
	if err := s.client.List(ctx, list, client.InNamespace(namespace)); err != nil {
		return nil, fmt.Errorf("list %s: %w", gvk.Kind, err)
	}
	objs, err := meta.ExtractList(list)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", gvk.Kind, err)
	}
	out := make([]T, len(objs))
	for i, o := range objs {
		out[i] = *o.(P)
	}
	slices.SortFunc(out, func(a, b T) int {
		x, y := P(&a), P(&b)
		return cmp.Or(cmp.Compare(x.GetNamespace(), y.GetNamespace()), cmp.Compare(x.GetName(), y.GetName()))
	})
	return out, nil
}

// Get returns one resource, the caller's to change. NotFound tells that there
// is none.
func Get[T any, P Resource[T]](ctx context.Context, s *Store, namespace, name string) (*T, error) {
	out := P(new(T))
	if err := s.client.Get(ctx, types.NamespacedName{Namespace: namespace, Name: name}, out); err != nil {
		return nil, fmt.Errorf("read %s: %w", called(out, namespace, name), err)
	}
	return out, nil
}

// Create stores a new resource and fills in what the server added. Its status
// is not stored: UpdateStatus does that.
func Create[T any, P Resource[T]](ctx context.Context, s *Store, obj P) error {
	if err := s.client.Create(ctx, obj); err != nil {
		return fmt.Errorf("create %s: %w", called(obj, obj.GetNamespace(), obj.GetName()), err)
	}
	return nil
}

// Update changes the specification or metadata of a resource. change may be
// called more than once, each time with the newest version; without a
// difference nothing is written.
func Update[T any, P Resource[T]](ctx context.Context, s *Store, namespace, name string, change func(P)) error {
	return rewrite(ctx, s, namespace, name, change, func(obj P) error { return s.client.Update(ctx, obj) })
}

// UpdateStatus changes the status of a resource as Update changes the rest.
func UpdateStatus[T any, P Resource[T]](ctx context.Context, s *Store, namespace, name string, change func(P)) error {
	return rewrite(ctx, s, namespace, name, change, func(obj P) error { return s.client.Status().Update(ctx, obj) })
}

// patience bounds how often a write is tried again that another one overtook.
var patience = wait.Backoff{Steps: 12, Duration: 5 * time.Millisecond, Factor: 1.5, Jitter: 0.5}

func rewrite[T any, P Resource[T]](ctx context.Context, s *Store, namespace, name string, change func(P), write func(P) error) error {
	key, from := types.NamespacedName{Namespace: namespace, Name: name}, client.Reader(s.client)
	err := retry.RetryOnConflict(patience, func() error {
		obj := P(new(T))
		if err := from.Get(ctx, key, obj); err != nil {
			return err
		}
		from = s.live // the cache was behind if this try fails
		before := obj.DeepCopyObject()
		change(obj)
		if equality.Semantic.DeepEqual(before, obj) {
			return nil
		}
		return write(obj)
	})
	if err != nil {
		return fmt.Errorf("update %s: %w", called(P(new(T)), namespace, name), err)
	}
	return nil
}

// Delete deletes a resource; one that is not there is deleted already.
func Delete[T any, P Resource[T]](ctx context.Context, s *Store, namespace, name string) error {
	obj := P(new(T))
	obj.SetNamespace(namespace)
	obj.SetName(name)
	if err := client.IgnoreNotFound(s.client.Delete(ctx, obj)); err != nil {
		return fmt.Errorf("delete %s: %w", called(obj, namespace, name), err)
	}
	return nil
}

// called names a resource in messages: Workload bank/web.
func called(obj any, namespace, name string) string {
	kind := fmt.Sprintf("%T", obj)
	return fmt.Sprintf("%s %s/%s", kind[strings.LastIndexByte(kind, '.')+1:], namespace, name)
}

// NotFound tells that the object of a failed call does not exist.
func NotFound(err error) bool { return apierrors.IsNotFound(err) }

// Exists tells that the object of a failed Create exists already.
func Exists(err error) bool { return apierrors.IsAlreadyExists(err) }

// Invalid tells that the API refused what a call wanted to write, so that
// trying again is of no use.
func Invalid(err error) bool {
	return apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) || apierrors.IsForbidden(err)
}

// SetCondition sets one condition of a resource and notes which generation of
// it the status speaks of. reason is one CamelCase word, message is for people.
func SetCondition(obj v1alpha1.Stander, kind string, is bool, reason, message string) {
	status := metav1.ConditionFalse
	if is {
		status = metav1.ConditionTrue
	}
	standing := obj.Stands()
	standing.ObservedGeneration = obj.GetGeneration()
	meta.SetStatusCondition(&standing.Conditions, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: message, ObservedGeneration: obj.GetGeneration(),
	})
}

// FindCondition returns a condition of a resource, nil if it has none of the
// kind.
func FindCondition(obj v1alpha1.Stander, kind string) *Condition {
	return meta.FindStatusCondition(obj.Stands().Conditions, kind)
}

// EnsureNamespace creates a namespace unless it exists.
func (s *Store) EnsureNamespace(ctx context.Context, name string) error {
	err := s.live.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create namespace %q: %w", name, err)
	}
	return nil
}

// Namespaces lists the namespaces that are not being deleted.
func (s *Store) Namespaces(ctx context.Context) ([]string, error) {
	var list corev1.NamespaceList
	if err := s.client.List(ctx, &list); err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	var out []string
	for _, n := range list.Items {
		if n.DeletionTimestamp.IsZero() {
			out = append(out, n.Name)
		}
	}
	slices.Sort(out)
	return out, nil
}

// Record notes an event on an object, shown by kubectl describe and get events
// for an hour. warning marks what someone should look at; reason is one
// CamelCase word.
func (s *Store) Record(ctx context.Context, about Object, warning bool, reason, message string) error {
	gvk, err := s.client.GroupVersionKindFor(about)
	if err != nil {
		return fmt.Errorf("record event: %w", err)
	}
	kind := corev1.EventTypeNormal
	if warning {
		kind = corev1.EventTypeWarning
	}
	now, namespace := time.Now(), about.GetNamespace()
	if namespace == "" {
		namespace = metav1.NamespaceDefault // where Kubernetes keeps events of what is in none
	}
	err = s.live.Create(ctx, &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("%.200s.%x", about.GetName(), now.UnixNano())},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: gvk.GroupVersion().String(), Kind: gvk.Kind, Namespace: about.GetNamespace(), Name: about.GetName(),
			UID: about.GetUID(), ResourceVersion: about.GetResourceVersion(),
		},
		Type: kind, Reason: reason, Message: message, Count: 1, Action: reason,
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now), EventTime: metav1.NewMicroTime(now),
		Source: corev1.EventSource{Component: "hauberk"}, ReportingController: "hauberk.dev/control", ReportingInstance: "hauberkd",
	})
	if err != nil {
		return fmt.Errorf("record event on %s: %w", called(about, about.GetNamespace(), about.GetName()), err)
	}
	return nil
}
