package kube

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"runtime"
	"strings"

	apidiscoveryv2 "k8s.io/api/apidiscovery/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
)

// kubernetesVersion is the version of the API that is spoken.
const kubernetesVersion = "v1.37.2"

// documents answers what neither of the two servers can answer alone: which
// groups there are, how their objects look, and which version is spoken.
type documents struct {
	front http.Handler // built-in kinds, and the rest by delegation
	crd   http.Handler // custom resources
	// groups answers /apis for clients that ask the old way.
	groups http.Handler
	info   version.Info
}

func newDocuments(front, crd http.Handler, manager aggregated.ResourceManager, build string) *documents {
	info := version.Info{
		Major: "1", Minor: "37", GitVersion: kubernetesVersion + "+hauberk." + build, GitTreeState: "clean",
		GoVersion: runtime.Version(), Compiler: runtime.Compiler, Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}
	return &documents{front: front, crd: crd, info: info, groups: aggregated.WrapAggregatedDiscoveryToHandler(groupList(manager), manager, nil)}
}

func (d *documents) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimSuffix(r.URL.Path, "/")
	switch {
	case r.Method != http.MethodGet:
		d.front.ServeHTTP(w, r)
	case path == "/version":
		writeJSON(w, d.info)
	case path == "/apis":
		d.groups.ServeHTTP(w, r)
	case path == "/openapi/v3":
		d.index(w, r)
	case strings.HasPrefix(path, "/openapi/v3/"):
		d.group(w, r)
	default:
		d.front.ServeHTTP(w, r)
	}
}

// index lists the groups that either server describes.
func (d *documents) index(w http.ResponseWriter, r *http.Request) {
	all := map[string]json.RawMessage{}
	r = r.Clone(r.Context())
	r.URL.Path = "/openapi/v3" // with a slash behind it no server knows it
	for _, h := range []http.Handler{d.crd, d.front} {
		answer := ask(h, r)
		var one struct {
			Paths map[string]json.RawMessage `json:"paths"`
		}
		if err := json.Unmarshal(answer.body.Bytes(), &one); err != nil || answer.status != http.StatusOK {
			http.Error(w, fmt.Sprintf("describe the groups: status %d: %v", answer.status, err), http.StatusInternalServerError)
			return
		}
		maps.Copy(all, one.Paths)
	}
	writeJSON(w, map[string]any{"paths": all})
}

// group describes one group. A server that does not know it answers with
// success and nothing.
func (d *documents) group(w http.ResponseWriter, r *http.Request) {
	answer := ask(d.front, r)
	if answer.status == http.StatusOK && answer.body.Len() == 0 {
		d.crd.ServeHTTP(w, r)
		return
	}
	maps.Copy(w.Header(), answer.header)
	w.WriteHeader(answer.status)
	_, _ = w.Write(answer.body.Bytes()) // the client is gone if it fails
}

// groupList lists the groups in the form that older clients and curl ask for.
func groupList(manager aggregated.ResourceManager) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		aggregate := r.Clone(r.Context())
		aggregate.Header.Set("Accept", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList")
		answer := ask(manager, aggregate)
		var all apidiscoveryv2.APIGroupDiscoveryList
		if err := json.Unmarshal(answer.body.Bytes(), &all); err != nil || answer.status != http.StatusOK {
			http.Error(w, fmt.Sprintf("list the groups: status %d: %v", answer.status, err), http.StatusInternalServerError)
			return
		}
		list := metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}, Groups: []metav1.APIGroup{}}
		for _, g := range all.Items {
			group := metav1.APIGroup{Name: g.Name}
			for _, v := range g.Versions {
				group.Versions = append(group.Versions, metav1.GroupVersionForDiscovery{GroupVersion: g.Name + "/" + v.Version, Version: v.Version})
			}
			if len(group.Versions) > 0 {
				group.PreferredVersion = group.Versions[0]
			}
			list.Groups = append(list.Groups, group)
		}
		writeJSON(w, list)
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client is gone if it fails
}

// answer is a response kept in memory.
type answer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

// ask has a handler answer a request, uncompressed, into memory.
func ask(h http.Handler, r *http.Request) *answer {
	plain := r.Clone(r.Context())
	plain.Header.Del("Accept-Encoding")
	if !strings.HasPrefix(r.URL.Path, "/openapi/v3/") {
		plain.Header.Del("If-None-Match")
	}
	a := &answer{header: http.Header{}, status: http.StatusOK}
	h.ServeHTTP(a, plain)
	return a
}

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) WriteHeader(status int)      { a.status = status }
func (a *answer) Write(p []byte) (int, error) { return a.body.Write(p) }
