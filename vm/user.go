package vm

import (
	"errors"
	"fmt"
	"io/fs"
)

// FreeUser finds the first user of a range that no machine below the parents
// has. A machine that moves from one parent to another must move to a later one.
// Whoever asks must keep others from asking until the journal of its own machine
// stands.
func FreeUser(first, count uint32, parents ...string) (uint32, error) {
	taken := map[uint32]bool{}
	for _, parent := range parents {
		found, err := Orphans(parent)
		if err != nil {
			return 0, fmt.Errorf("find a free user: %w", err)
		}
		for _, o := range found {
			if errors.Is(o.Err, fs.ErrNotExist) {
				continue // nothing runs before its journal stands
			}
			if o.Journal.UID == 0 { // it could be anybody's
				return 0, fmt.Errorf("find a free user: run directory %s: %w", o.Dir, o.Err)
			}
			taken[o.Journal.UID] = true
		}
	}
	for n := range count {
		if !taken[first+n] {
			return first + n, nil
		}
	}
	return 0, errors.New("find a free user: all are taken")
}
