package kube

import (
	"fmt"
	"path/filepath"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"hauberk.dev/internal/atomicfile"
)

// Access is all it takes to use a Kubernetes-style API.
type Access struct {
	// Server is its URL.
	Server string
	// Roots the server's certificate chains to, PEM.
	Roots []byte
	// Certificate and Key of the account, PEM.
	Certificate, Key []byte
	// CertificateFile and KeyFile hold them instead, for a certificate that is
	// renewed: the files are read again when they change.
	CertificateFile, KeyFile string
	// Kubeconfig is a file that says all of it instead; the other fields are
	// then empty.
	Kubeconfig string
}

// config is the client configuration of an access.
func (a Access) config() (*rest.Config, error) {
	c := &rest.Config{Host: a.Server, TLSClientConfig: rest.TLSClientConfig{CAData: a.Roots, CertData: a.Certificate, KeyData: a.Key, CertFile: a.CertificateFile, KeyFile: a.KeyFile}}
	if a.Kubeconfig != "" {
		var err error
		if c, err = clientcmd.BuildConfigFromFlags("", a.Kubeconfig); err != nil {
			return nil, fmt.Errorf("read kubeconfig %s: %w", a.Kubeconfig, err)
		}
	}
	c.UserAgent = "hauberk"
	// The server bounds its load itself; a client that waits only adds delay.
	c.QPS, c.Burst = -1, -1
	return c, nil
}

// WriteKubeconfig writes a file by which kubectl and other clients use the
// access. It holds the key, so only its owner may read it.
func WriteKubeconfig(path string, a Access) error {
	c := clientcmdapi.NewConfig()
	c.Clusters["hauberk"] = &clientcmdapi.Cluster{Server: a.Server, CertificateAuthorityData: a.Roots}
	c.AuthInfos["hauberk"] = &clientcmdapi.AuthInfo{ClientCertificateData: a.Certificate, ClientKeyData: a.Key}
	c.Contexts["hauberk"] = &clientcmdapi.Context{Cluster: "hauberk", AuthInfo: "hauberk", Namespace: "default"}
	c.CurrentContext = "hauberk"
	raw, err := clientcmd.Write(*c)
	if err != nil {
		return fmt.Errorf("write kubeconfig %s: %w", filepath.Base(path), err)
	}
	if err := atomicfile.Write(path, raw, 0o600); err != nil {
		return fmt.Errorf("write kubeconfig: %w", err)
	}
	return nil
}
