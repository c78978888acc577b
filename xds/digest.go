package xds

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"slices"

	"hauberk.dev/xds/envoy"
)

// Resource is one resource as a server sends it.
type Resource struct {
	Type, Name, Version string // Type is the type's URL
	Body                []byte
}

// Digest is what a client in whose plan exactly these resources are shows in
// its Status, so that who serves them can prove that they arrived: SHA-256,
// in hexadecimal, over one line "type NUL name NUL version NUL sum LF" for
// each, in order of type and name, where sum is the SHA-256 of the body.
func Digest(resources []Resource) string {
	lines := make([]line, len(resources))
	for i, r := range resources {
		lines[i] = line{r.Type, r.Name, r.Version, sha256.Sum256(r.Body)}
	}
	return digest(lines)
}

type line struct {
	kind, name, version string
	sum                 [sha256.Size]byte
}

func digest(lines []line) string {
	slices.SortFunc(lines, func(a, b line) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.name, b.name))
	})
	h := sha256.New()
	for _, l := range lines {
		io.WriteString(h, l.kind+"\x00"+l.name+"\x00"+l.version+"\x00")
		fmt.Fprintf(h, "%x\n", l.sum)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func (st *store) digest() string {
	var lines []line
	for k := range st.shelves {
		for name, r := range st.shelves[k].have {
			lines = append(lines, line{envoy.Kind(k).URL(), name, r.version, r.sum})
		}
	}
	return digest(lines)
}
