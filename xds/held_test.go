package xds

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	clusters "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"hauberk.dev/plan"
	"hauberk.dev/xds/envoy"
)

// says is a response with one resource.
func says(t *testing.T, kind envoy.Kind, name string, m proto.Message) *discovery.DeltaDiscoveryResponse {
	t.Helper()
	body, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return &discovery.DeltaDiscoveryResponse{TypeUrl: kind.URL(), Resources: []*discovery.Resource{{Name: name, Version: "1", Resource: body}}}
}

// trusting is a cluster that names authorities by SDS.
func trusting(t *testing.T, authorities string) *clusters.Cluster {
	t.Helper()
	socket, err := anypb.New(&tls.UpstreamTlsContext{Sni: "up.test", CommonTlsContext: &tls.CommonTlsContext{
		ValidationContextType: &tls.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: &tls.SdsSecretConfig{
			Name: authorities, SdsConfig: &core.ConfigSource{ResourceApiVersion: core.ApiVersion_V3,
				ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	at := &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{Address: "127.0.0.1",
		PortSpecifier: &core.SocketAddress_PortValue{PortValue: 1}}}}
	return &clusters.Cluster{Name: "c", ConnectTimeout: durationpb.New(time.Second),
		ClusterDiscoveryType: &clusters.Cluster_Type{Type: clusters.Cluster_STATIC},
		LoadAssignment: &endpoint.ClusterLoadAssignment{ClusterName: "c", Endpoints: []*endpoint.LocalityLbEndpoints{{LbEndpoints: []*endpoint.LbEndpoint{{
			HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: at}}}}}}},
		TransportSocket: &core.TransportSocket{Name: "tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: socket}}}
}

func authorities(t *testing.T, name string) *tls.Secret {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	x := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, x, x, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return &tls.Secret{Name: name, Type: &tls.Secret_ValidationContext{ValidationContext: &tls.CertificateValidationContext{
		TrustedCa: &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: text}}}}}
}

// TestSecretTooLong has a chain that is within what may be read, and above what may
// be handed over.
func TestSecretTooLong(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for size, want := range map[int]string{200 << 10: "", 300 << 10: "a chain of"} {
		x := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
			ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, Value: make([]byte, size)}}}
		der, err := x509.CreateCertificate(rand.Reader, x, x, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		data := func(kind string, b []byte) *core.DataSource {
			return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b})}}
		}
		body, err := proto.Marshal(&tls.Secret{Name: "web", Type: &tls.Secret_TlsCertificate{TlsCertificate: &tls.TlsCertificate{
			CertificateChain: data("CERTIFICATE", der), PrivateKey: data("PRIVATE KEY", raw)}}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = envoy.Read(envoy.Secrets, "web", body)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

// TestHeldSecrets has a plan that replaces one secret by another fail before it
// succeeds: until then the plan before it has its secret.
func TestHeldSecrets(t *testing.T) {
	var away bool
	var handed [][]string
	c, err := New(Options{Server: "unix:///nowhere", Credentials: insecure.NewCredentials(), Node: Node{ID: "n"},
		Apply: func(context.Context, *plan.Proxy) error {
			if away {
				return errors.New("the proxy is away")
			}
			return nil
		},
		Secrets: func(_ context.Context, all []*envoy.Secret) error {
			var names []string
			for _, s := range all {
				names = append(names, s.Name)
			}
			handed = append(handed, names)
			return nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	take := func(r *discovery.DeltaDiscoveryResponse) {
		t.Helper()
		kind, _ := envoy.KindOf(r.TypeUrl)
		if _, faults := c.take(kind, r); faults.String() != "" {
			t.Fatal(faults.String())
		}
	}
	force := func(fails bool) {
		t.Helper()
		away = fails
		if _, err := c.force(t.Context()); (err != nil) != fails {
			t.Fatal(err)
		}
	}
	take(&discovery.DeltaDiscoveryResponse{TypeUrl: envoy.Listeners.URL()})
	take(says(t, envoy.Clusters, "c", trusting(t, "A")))
	take(says(t, envoy.Secrets, "A", authorities(t, "A")))
	force(false)
	take(says(t, envoy.Clusters, "c", trusting(t, "B")))
	take(says(t, envoy.Secrets, "B", authorities(t, "B")))
	handed = nil
	for range 3 {
		force(true)
	}
	if len(handed) == 0 {
		t.Error("nothing was handed on")
	}
	for _, names := range handed {
		if !slices.Equal(names, []string{"A", "B"}) {
			t.Errorf("handed on are %q while the plan with A is in force", names)
		}
	}
	force(false)
	if last := handed[len(handed)-1]; !slices.Equal(last, []string{"B"}) {
		t.Errorf("handed on at last are %q", last)
	}
}
