package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"sync"
	"time"

	noop "go.opentelemetry.io/otel/trace/noop"
	crdserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
	crdoptions "k8s.io/apiextensions-apiserver/pkg/cmd/server/options"
	crdopenapi "k8s.io/apiextensions-apiserver/pkg/generated/openapi"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	webhookinit "k8s.io/apiserver/pkg/admission/plugin/webhook/initializer"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	"k8s.io/apiserver/pkg/registry/rest"
	genericserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	restclient "k8s.io/client-go/rest"
	"k8s.io/kube-openapi/pkg/common"

	"hauberk.dev/kube/openapi"
)

// assembling is held while a server is put together: the libraries register
// versions and metrics process-wide.
var assembling sync.Mutex

// parts are the pieces of one server while it is put together. Two generic
// servers make it up: front serves the built-in kinds and faces the clients,
// crd serves custom resources behind it. They share one store, one admission
// chain and one list of groups.
type parts struct {
	builtin *builtin
	options *crdoptions.CustomResourceDefinitionsServerOptions
	etcd    *genericoptions.EtcdOptions
	manager aggregated.ResourceManager
	build   string

	front *genericserver.RecommendedConfig
	crd   *genericserver.RecommendedConfig
}

// assemble puts the server together. The configuration it returns is for
// clients in this process.
func (s *Server) assemble(etcd string) (serve func(context.Context) error, loopback *restclient.Config, err error) {
	assembling.Lock()
	defer assembling.Unlock()
	p := &parts{manager: aggregated.NewResourceManager("apis"), build: s.options.Version}
	if p.builtin, err = newBuiltin(); err != nil {
		return nil, nil, err
	}
	if err := p.choose(s, etcd); err != nil {
		return nil, nil, err
	}
	if p.front, err = p.config(p.builtin.codecs, p.etcd); err != nil {
		return nil, nil, err
	}
	if p.crd, err = p.config(crdserver.Codecs, p.options.RecommendedOptions.Etcd); err != nil {
		return nil, nil, err
	}
	if err := errors.Join(p.guard(s.options.ClientRoots), p.admit()); err != nil {
		return nil, nil, err
	}
	front, err := p.servers()
	if err != nil {
		return nil, nil, err
	}
	front.ShutdownTimeout = 2 * time.Second
	return front.PrepareRun().RunWithContext, p.front.LoopbackClientConfig, nil
}

// choose sets the options of both servers.
func (p *parts) choose(s *Server, etcd string) error {
	o := crdoptions.NewCustomResourceDefinitionsServerOptions(io.Discard, io.Discard)
	serving := o.RecommendedOptions.SecureServing
	serving.Listener = s.listener
	serving.ServerCert.GeneratedCert = s.serving
	serving.MinTLSVersion = "VersionTLS13"
	o.RecommendedOptions.Features.EnablePriorityAndFairness = false
	o.RecommendedOptions.Features.EnableProfiling = false
	p.options = o
	p.etcd = genericoptions.NewEtcdOptions(storagebackend.NewDefaultConfig("/registry/builtin", p.builtin.codec()))
	// The front alone runs and ends, so it alone asks after the store's health.
	o.RecommendedOptions.Etcd.SkipHealthEndpoints = true
	for _, e := range []*genericoptions.EtcdOptions{p.etcd, o.RecommendedOptions.Etcd} {
		e.StorageConfig.Transport.ServerList = []string{etcd}
		// Nothing collects dependents, so nothing may wait for it: a deletion
		// in the foreground is an ordinary one.
		e.EnableGarbageCollection = false
	}
	return o.Complete()
}

// config is what both servers have in common.
func (p *parts) config(codecs serializer.CodecFactory, etcd *genericoptions.EtcdOptions) (*genericserver.RecommendedConfig, error) {
	c := genericserver.NewRecommendedConfig(codecs)
	o := p.options
	err := errors.Join(
		o.ServerRunOptions.ApplyTo(&c.Config),
		etcd.ApplyTo(&c.Config),
		o.RecommendedOptions.Features.ApplyTo(&c.Config, nil, nil),
		o.APIEnablement.ApplyTo(&c.Config, crdserver.DefaultAPIResourceConfigSource(), crdserver.Scheme),
	)
	if err != nil {
		return nil, fmt.Errorf("configure server: %w", err)
	}
	namer := openapinamer.NewDefinitionNamer(p.builtin.scheme, crdserver.Scheme)
	c.OpenAPIConfig = genericserver.DefaultOpenAPIConfig(describeKinds, namer)
	c.OpenAPIV3Config = genericserver.DefaultOpenAPIV3Config(describeKinds, namer)
	c.OpenAPIConfig.Info.Title, c.OpenAPIV3Config.Info.Title = "Hauberk", "Hauberk"
	c.AggregatedDiscoveryGroupManager = p.manager
	return c, nil
}

func describeKinds(ref common.ReferenceCallback) map[string]common.OpenAPIDefinition {
	all := crdopenapi.GetOpenAPIDefinitions(ref)
	maps.Copy(all, openapi.GetOpenAPIDefinitions(ref))
	return all
}

// guard gives the front its address, and both servers the same idea of who may
// do what.
func (p *parts) guard(roots []byte) error {
	if err := p.options.RecommendedOptions.SecureServing.ApplyToConfig(&p.front.Config); err != nil {
		return fmt.Errorf("configure address: %w", err)
	}
	ca, err := dynamiccertificates.NewStaticCAContent("client roots", roots)
	if err != nil {
		return fmt.Errorf("read client roots: %w", err)
	}
	var clients authenticator.Request
	if clients, err = clientCertificates(roots); err != nil {
		return err
	}
	p.front.SecureServing.ClientCA = ca
	p.front.Authentication.Authenticator = clients
	p.front.Authorization.Authorizer = rights{}
	p.front.RuleResolver = rights{}
	genericserver.AuthorizeClientBearerToken(p.front.LoopbackClientConfig, &p.front.Authentication, &p.front.Authorization)
	p.crd.LoopbackClientConfig, p.crd.SecureServing = p.front.LoopbackClientConfig, p.front.SecureServing
	p.crd.Authentication, p.crd.Authorization, p.crd.RuleResolver = p.front.Authentication, p.front.Authorization, p.front.RuleResolver
	return nil
}

// noServices answers webhooks that ask for a service: there are none here.
type noServices struct{}

func (noServices) ResolveEndpoint(namespace, name string, port int32) (*url.URL, error) {
	return nil, fmt.Errorf("reach service %s/%s port %d: this server has no services: give the webhook a url", namespace, name, port)
}

func (p *parts) callers() webhook.AuthenticationInfoResolverWrapper {
	return webhook.NewDefaultAuthenticationInfoResolverWrapper(nil, nil, p.front.LoopbackClientConfig, noop.NewTracerProvider())
}

// admit builds the admission chain, the same for both servers.
func (p *parts) admit() error {
	loopback := p.front.LoopbackClientConfig
	if loopback == nil {
		return errors.New("configure admission: no loopback client")
	}
	client, err := kubernetes.NewForConfig(loopback)
	if err != nil {
		return fmt.Errorf("configure admission: %w", err)
	}
	anything, err := dynamic.NewForConfig(loopback)
	if err != nil {
		return fmt.Errorf("configure admission: %w", err)
	}
	p.front.ClientConfig = loopback
	p.front.SharedInformerFactory = informers.NewSharedInformerFactory(client, 10*time.Minute)
	err = genericoptions.NewAdmissionOptions().ApplyTo(&p.front.Config, p.front.SharedInformerFactory, client, anything,
		utilfeature.DefaultFeatureGate, p.front.EffectiveVersion, webhookinit.NewPluginInitializer(p.callers(), noServices{}))
	if err != nil {
		return fmt.Errorf("configure admission: %w", err)
	}
	p.crd.AdmissionControl = p.front.AdmissionControl
	return nil
}

// servers makes the two servers, the front delegating what it does not know.
func (p *parts) servers() (*genericserver.GenericAPIServer, error) {
	config := crdserver.Config{
		GenericConfig: p.crd,
		ExtraConfig: crdserver.ExtraConfig{
			CRDRESTOptionsGetter: crdoptions.NewCRDRESTOptionsGetter(*p.options.RecommendedOptions.Etcd, p.crd.ResourceTransformers, p.crd.StorageObjectCountTracker),
			MasterCount:          1, // more would delay a new resource by seconds
			ServiceResolver:      noServices{},
			AuthResolverWrapper:  p.callers(),
		},
	}
	crd, err := config.Complete().New(genericserver.NewEmptyDelegate())
	if err != nil {
		return nil, fmt.Errorf("build server of custom resources: %w", err)
	}
	p.front.BuildHandlerChainFunc = func(inner http.Handler, c *genericserver.Config) http.Handler {
		return genericserver.DefaultBuildHandlerChain(newDocuments(inner, crd.GenericAPIServer.UnprotectedHandler(), p.manager, p.build), c)
	}
	front, err := p.front.Complete().New("hauberk", crd.GenericAPIServer)
	if err != nil {
		return nil, fmt.Errorf("build server of built-in kinds: %w", err)
	}
	storages, err := p.builtin.storages(p.front.RESTOptionsGetter, rights{})
	if err != nil {
		return nil, err
	}
	for _, gv := range builtinVersions {
		if err := p.install(front, gv, storages[gv]); err != nil {
			return nil, fmt.Errorf("serve %s: %w", gv, err)
		}
	}
	return front, nil
}

func (p *parts) install(front *genericserver.GenericAPIServer, gv schema.GroupVersion, storages map[string]rest.Storage) error {
	info := genericserver.NewDefaultAPIGroupInfo(gv.Group, p.builtin.scheme, p.builtin.params, p.builtin.codecs)
	info.VersionedResourcesStorageMap[gv.Version] = storages
	if gv.Group == "" {
		return front.InstallLegacyAPIGroup(genericserver.DefaultLegacyAPIPrefix, &info)
	}
	return front.InstallAPIGroup(&info)
}
