package kube

// Config lets tests use an access with any client.
var Config = Access.config

// ParseManifest reads a manifest without an API.
func ParseManifest(manifest []byte) (int, error) {
	docs, err := parseManifest(manifest)
	return len(docs), err
}
