package image

import (
	"archive/tar"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"hauberk.dev/internal/atomicfile"
)

// Pack makes an image of a tar archive that holds a whole root file system,
// such as one that somebody else unpacked. The archive is bounded and judged
// like a layer. The image lies in cacheDir, as Pull's do, under a name made of
// its own content, so that the same files have one image; Digest and Config of
// the result are empty, for an archive has none.
func Pack(ctx context.Context, archive io.Reader, cacheDir string) (Image, error) {
	img, err := pack(ctx, archive, cacheDir, standard)
	if err != nil {
		return Image{}, fmt.Errorf("pack image: %w", err)
	}
	return img, nil
}

func pack(ctx context.Context, archive io.Reader, cacheDir string, lim limits) (Image, error) {
	if err := openDir(cacheDir); err != nil {
		return Image{}, err
	}
	// The spool and the unnamed image are removed by their makers; what a
	// killed process left is swept by the next Pull or Pack.
	unlock, err := lock(ctx, cacheDir)
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	if err := (cache{dir: cacheDir}).sweep(); err != nil {
		return Image{}, err
	}
	spool, err := newSpool(cacheDir)
	if err != nil {
		return Image{}, err
	}
	defer spool.Close()
	m := newMerger(spool, lim)
	counted := &counted{r: archive, sum: sha256.New(), ctx: ctx}
	if err := m.read(tar.NewReader(counted)); err != nil {
		return Image{}, err
	}
	return keep(m.tree, spool, cacheDir)
}

// keep writes the image of a tree and names it after its content.
func keep(t *tree, spool io.ReaderAt, dir string) (Image, error) {
	p, err := layOut(t.root.file, [16]byte{}) // the content decides all of it
	if err != nil {
		return Image{}, err
	}
	temporary := filepath.Join(dir, ".pack-"+rand.Text())
	sum := sha256.New()
	err = atomicfile.WriteFrom(temporary, 0o400, func(w io.Writer) error {
		return p.write(io.MultiWriter(w, sum), spool)
	})
	if err != nil {
		return Image{}, err
	}
	img := Image{ErofsSHA256: hex.EncodeToString(sum.Sum(nil)), Size: p.blocks * blockSize}
	img.Path = filepath.Join(dir, img.ErofsSHA256+".erofs")
	if Verify(img.Path, img.ErofsSHA256) == nil {
		// Machines share the pages of one file, so the one that is there stays.
		return img, os.Remove(temporary)
	}
	return img, errors.Join(os.Rename(temporary, img.Path), atomicfile.SyncDir(dir))
}
