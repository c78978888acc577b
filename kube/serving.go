package kube

import (
	"crypto/tls"
	"fmt"
	"sync"

	"k8s.io/apiserver/pkg/server/dynamiccertificates"
)

// serving is the server's certificate, which can be replaced while it serves.
type serving struct {
	mu        sync.Mutex
	cert, key []byte
	listeners []dynamiccertificates.Listener
}

var _ dynamiccertificates.CertKeyContentProvider = (*serving)(nil)

// Name of the content, for logs.
func (s *serving) Name() string { return "serving" }

// CurrentCertKeyContent is the certificate of the moment.
func (s *serving) CurrentCertKeyContent() (cert, key []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cert, s.key
}

// AddListener adds one who is told of every replacement.
func (s *serving) AddListener(l dynamiccertificates.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listeners = append(s.listeners, l)
}

func (s *serving) replace(cert, key []byte) error {
	if _, err := tls.X509KeyPair(cert, key); err != nil {
		return fmt.Errorf("renew certificate of API server: %w", err)
	}
	s.mu.Lock()
	s.cert, s.key = cert, key
	listeners := s.listeners
	s.mu.Unlock()
	for _, l := range listeners {
		l.Enqueue()
	}
	return nil
}

// Renew replaces the server's certificate. Connections go on; new ones get the
// new certificate.
func (s *Server) Renew(certificate, key []byte) error { return s.serving.replace(certificate, key) }
