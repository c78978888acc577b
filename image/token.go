package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
)

// tokens gets the tokens that a registry wants even of those who are nobody.
type tokens struct {
	next http.RoundTripper // nil is the default one

	mu    sync.Mutex
	given map[string]string // by host
}

const maxToken = 64 << 10

func (t *tokens) RoundTrip(req *http.Request) (*http.Response, error) {
	next := t.next
	if next == nil {
		next = http.DefaultTransport
	}
	t.mu.Lock()
	token := t.given[req.URL.Host]
	t.mu.Unlock()
	resp, err := next.RoundTrip(with(req, token))
	if err != nil || resp.StatusCode != http.StatusUnauthorized || req.Body != nil {
		return resp, err
	}
	fields, ok := challenge(resp.Header.Get("WWW-Authenticate"))
	if !ok {
		return resp, nil // it does not say how
	}
	resp.Body.Close()
	if token, err = ask(next, req, fields); err != nil {
		return nil, fmt.Errorf("ask for a token: %w", err)
	}
	t.mu.Lock()
	t.given[req.URL.Host] = token
	t.mu.Unlock()
	return next.RoundTrip(with(req, token))
}

func with(req *http.Request, token string) *http.Request {
	if token == "" {
		return req
	}
	out := req.Clone(req.Context())
	out.Header.Set("Authorization", "Bearer "+token)
	return out
}

var parameter = regexp.MustCompile(`([a-z]+)="([^"]*)"`)

// challenge reads what a registry says about tokens.
func challenge(header string) (map[string]string, bool) {
	rest, ok := strings.CutPrefix(header, "Bearer ")
	if !ok {
		return nil, false
	}
	out := map[string]string{}
	for _, m := range parameter.FindAllStringSubmatch(rest, 16) {
		out[m[1]] = m[2]
	}
	return out, out["realm"] != ""
}

// ask gets a token from whom the registry names. One that speaks TLS may not
// send us to one that does not.
func ask(next http.RoundTripper, req *http.Request, fields map[string]string) (string, error) {
	realm, err := url.Parse(fields["realm"])
	if err != nil || realm.Host == "" || realm.Scheme != "https" && realm.Scheme != req.URL.Scheme {
		return "", fmt.Errorf("the registry sends us to %.256q", fields["realm"])
	}
	q := realm.Query()
	for _, name := range []string{"service", "scope"} {
		if v := fields[name]; v != "" {
			q.Set(name, v)
		}
	}
	realm.RawQuery = q.Encode()
	r, err := http.NewRequestWithContext(req.Context(), http.MethodGet, realm.String(), nil)
	if err != nil {
		return "", err
	}
	resp, err := next.RoundTrip(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("GET %s: %s", realm.Redacted(), resp.Status)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxToken))
	if err != nil {
		return "", err
	}
	var answer struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(raw, &answer); err != nil {
		return "", err
	}
	if answer.Token == "" {
		answer.Token = answer.AccessToken
	}
	if answer.Token == "" || strings.ContainsAny(answer.Token, "\r\n") {
		return "", errors.New("the answer holds none")
	}
	return answer.Token, nil
}
