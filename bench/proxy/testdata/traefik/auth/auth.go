// Package auth stands for the module of the same path, which Traefik replaces by a
// fork that the module proxy does not serve: passwords, of which all are wrong here.
// Nothing measured asks for one.
package auth

import "net/http"

// SecretProvider has what a password is checked by.
type SecretProvider func(user, realm string) string

// BasicAuth refuses.
type BasicAuth struct {
	Realm   string
	Secrets SecretProvider
}

// CheckAuth names nobody.
func (*BasicAuth) CheckAuth(*http.Request) string { return "" }

// RequireAuth refuses.
func (*BasicAuth) RequireAuth(w http.ResponseWriter, _ *http.Request) { refuse(w) }

// CheckSecret is false.
func CheckSecret(_, _ string) bool { return false }

// DigestAuth refuses.
type DigestAuth struct{}

// NewDigestAuthenticator makes one.
func NewDigestAuthenticator(string, SecretProvider) *DigestAuth { return &DigestAuth{} }

// DigestAuthParams reads nothing.
func DigestAuthParams(string) map[string]string { return nil }

// CheckAuth names nobody.
func (*DigestAuth) CheckAuth(*http.Request) (string, *string) { return "", nil }

// RequireAuth refuses.
func (*DigestAuth) RequireAuth(w http.ResponseWriter, _ *http.Request) { refuse(w) }

// RequireAuthStale refuses.
func (*DigestAuth) RequireAuthStale(w http.ResponseWriter, _ *http.Request) { refuse(w) }

func refuse(w http.ResponseWriter) { w.WriteHeader(http.StatusUnauthorized) }
