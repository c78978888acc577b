package share

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"hauberk.dev/api/node"
)

// strict reads exactly one value, all of whose fields are known.
func strict(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the value")
	}
	return nil
}

// ReadPolicies reads the policies of that name in a directory: a file NAME.json
// with a list of names and specs. No name is no policy, which is the baseline.
func ReadPolicies(dir, name string) ([]node.NamedGuardPolicy, error) {
	if name == "" {
		return nil, nil
	}
	if !containerID.MatchString(name) {
		return nil, fmt.Errorf("policy %q: want a plain file name", name)
	}
	path := filepath.Join(dir, name+".json")
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var policies []node.NamedGuardPolicy
	if err := strict(raw, &policies); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(policies) == 0 {
		return nil, fmt.Errorf("read %s: it holds no policy: leave the annotation out for the baseline", path)
	}
	return policies, nil
}
