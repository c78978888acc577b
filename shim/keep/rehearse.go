package keep

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"hauberk.dev/image"
	"hauberk.dev/vm"
	"hauberk.dev/vm/pool"
)

// Rehearse prepares machines by a rehearsal, whose disk is packed below dir when
// the first one needs it. policy puts in force what lets its program run; it may
// be nil.
func Rehearse(dir string, policy func(context.Context, *vm.Channel) error) pool.Prepare {
	r := pool.Rehearsal{Policy: policy}
	return func(ctx context.Context, m *vm.Machine, c *vm.Channel) (err error) {
		if r.Disk == nil { // a pool makes one machine at a time
			if r.Disk, err = rehearsalDisk(ctx, dir); err != nil {
				return fmt.Errorf("rehearse: %w", err)
			}
		}
		return r.Prepare(ctx, m, c)
	}
}

func rehearsalDisk(ctx context.Context, dir string) (*os.File, error) {
	archive, err := pool.Archive()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	img, err := image.Pack(ctx, bytes.NewReader(archive), dir)
	if err != nil {
		return nil, err
	}
	return os.Open(img.Path)
}
