package kube

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"time"

	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	restclient "k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"
)

// definitions are the resource definitions that controller-gen writes.
//
//go:embed crd/*.yaml
var definitions embed.FS

// readDefinitions returns Hauberk's resource definitions.
func readDefinitions() ([]*apiextensionsv1.CustomResourceDefinition, error) {
	names, err := fs.Glob(definitions, "crd/*.yaml")
	if err != nil || len(names) == 0 {
		return nil, fmt.Errorf("read resource definitions: %d found: %w", len(names), err)
	}
	var out []*apiextensionsv1.CustomResourceDefinition
	for _, name := range names {
		raw, err := definitions.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read resource definitions: %w", err)
		}
		d := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(raw, d); err != nil {
			return nil, fmt.Errorf("read resource definition %s: %w", name, err)
		}
		out = append(out, d)
	}
	return out, nil
}

// installDefinitions brings the stored definitions to those of this program
// and returns when every one of them is served.
func installDefinitions(ctx context.Context, config *restclient.Config) error {
	wanted, err := readDefinitions()
	if err != nil {
		return err
	}
	client, err := clientset.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("install resource definitions: %w", err)
	}
	crds := client.ApiextensionsV1().CustomResourceDefinitions()
	for _, d := range wanted {
		_, err := crds.Create(ctx, d, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			var stored *apiextensionsv1.CustomResourceDefinition
			if stored, err = crds.Get(ctx, d.Name, metav1.GetOptions{}); err == nil {
				stored.Spec, stored.Annotations = d.Spec, d.Annotations
				_, err = crds.Update(ctx, stored, metav1.UpdateOptions{})
			}
		}
		if err != nil {
			return fmt.Errorf("install resource definition %s: %w", d.Name, err)
		}
	}
	any, err := metadata.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("install resource definitions: %w", err)
	}
	for _, d := range wanted {
		for _, v := range d.Spec.Versions {
			kind := schema.GroupVersionResource{Group: d.Spec.Group, Version: v.Name, Resource: d.Spec.Names.Plural}
			err := await(ctx, "resource definition "+d.Name, func(ctx context.Context) error {
				_, err := any.Resource(kind).List(ctx, metav1.ListOptions{Limit: 1})
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return awaitDiscovery(ctx, config, wanted)
}

// awaitDiscovery returns when the description of the API names every
// definition: it is made a moment after the resources are served, and clients
// find out by it what there is.
func awaitDiscovery(ctx context.Context, config *restclient.Config, wanted []*apiextensionsv1.CustomResourceDefinition) error {
	client, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		return fmt.Errorf("install resource definitions: %w", err)
	}
	return await(ctx, "description of the API", func(context.Context) error {
		_, lists, err := client.ServerGroupsAndResources()
		if err != nil {
			return err
		}
		named := map[string]bool{}
		for _, l := range lists {
			for _, r := range l.APIResources {
				named[l.GroupVersion+"/"+r.Name] = true
			}
		}
		for _, d := range wanted {
			for _, v := range d.Spec.Versions {
				if name := d.Spec.Group + "/" + v.Name + "/" + d.Spec.Names.Plural; v.Served && !named[name] {
					return fmt.Errorf("%s is not described", name)
				}
			}
		}
		return nil
	})
}

// makeNamespaces creates the namespaces that clients expect to be there.
func makeNamespaces(ctx context.Context, config *restclient.Config) error {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("create namespaces: %w", err)
	}
	for _, name := range []string{metav1.NamespaceDefault, metav1.NamespaceSystem} {
		_, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("create namespace %q: %w", name, err)
		}
	}
	return nil
}

// await asks until check is content, for half a minute at most.
func await(ctx context.Context, what string, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("await %s: %w", what, errors.Join(context.Cause(ctx), err))
		case <-time.After(10 * time.Millisecond):
		}
	}
}
