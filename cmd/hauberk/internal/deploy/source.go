package deploy

import (
	"encoding/json"
	"fmt"

	"hauberk.dev/evidence"
)

// sourceRevision is the commit a provenance names. Its signature is not
// checked: this machine has just made it.
func sourceRevision(st evidence.Statement) (string, error) {
	var p evidence.Provenance
	if err := json.Unmarshal(st.Predicate, &p); err != nil {
		return "", fmt.Errorf("read provenance: %w", err)
	}
	src, err := p.Source()
	return src.Revision, err
}
