package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"hauberk.dev/image"
	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/strictjson"
)

// Image is one that is on this machine.
type Image struct {
	image.Image
	// Name as it was asked for, whole, and when it was found.
	Name   string    `json:"name"`
	Pulled time.Time `json:"pulled"`
}

// PullOptions say how an image is pulled.
type PullOptions struct {
	// PlainHTTP allows a registry without TLS. One on the loopback interface
	// may always have none.
	PlainHTTP bool
	// Client asks registries; nil is http.DefaultClient.
	Client *http.Client
}

// Pull finds an image where it comes from and packs it, unless it is packed
// already.
func (h *Host) Pull(ctx context.Context, name string, o PullOptions) (Image, error) {
	r, err := image.ParseReference(name)
	if err != nil {
		return Image{}, err
	}
	return h.pull(ctx, r, o)
}

func (h *Host) pull(ctx context.Context, r image.Reference, o PullOptions) (Image, error) {
	if r.From == image.FromRegistry {
		h.conf.Progress("looking for " + r.String())
	}
	s, err := r.Open(ctx, image.OpenOptions{Client: o.Client, PlainHTTP: o.PlainHTTP})
	if err != nil {
		return Image{}, err
	}
	defer s.Close()
	if old, err := h.known(r); err != nil || old.Digest != s.Digest {
		h.conf.Progress("packing " + r.String())
	}
	img, err := image.Pull(ctx, s, s.Digest, h.cache())
	if err != nil {
		return Image{}, err
	}
	out := Image{Image: img, Name: r.String(), Pulled: time.Now()}
	raw, err := json.MarshalIndent(out, "", "\t")
	if err != nil {
		return Image{}, fmt.Errorf("keep image: %w", err)
	}
	return out, atomicfile.Write(h.ref(r), append(raw, '\n'), 0o600)
}

// ref is the file that says what a name was the last time.
func (h *Host) ref(r image.Reference) string {
	sum := sha256.Sum256([]byte(r.String()))
	return filepath.Join(h.refs(), hex.EncodeToString(sum[:])+".json")
}

func (h *Host) known(r image.Reference) (Image, error) { return readImage(h.ref(r)) }

func readImage(file string) (Image, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return Image{}, err
	}
	var img Image
	if err := strictjson.Decode(raw, maxRecord, &img); err != nil {
		return Image{}, fmt.Errorf("read %s: %w", file, err)
	}
	_, err = os.Stat(img.Path)
	return img, err
}

// image gives the one that options name.
func (h *Host) image(ctx context.Context, o Options) (Image, error) {
	r, err := image.ParseReference(o.Image)
	if err != nil {
		return Image{}, err
	}
	if r.From == image.FromRegistry && o.Pull != PullAlways {
		img, err := h.known(r)
		if err == nil {
			return img, nil
		}
		if o.Pull == PullNever {
			return Image{}, fmt.Errorf("image %s is not here, and is not to be pulled", r)
		}
	}
	img, err := h.pull(ctx, r, PullOptions{PlainHTTP: o.PlainHTTP})
	if err != nil && r.From == image.FromRegistry && ctx.Err() == nil {
		return Image{}, &NoImageError{Image: r.String(), Err: err}
	}
	return img, err
}

// NoImageError says that a registry did not give an image.
type NoImageError struct {
	Image string
	Err   error
}

func (e *NoImageError) Error() string { return e.Err.Error() }
func (e *NoImageError) Unwrap() error { return e.Err }

// Images lists what is on this machine.
func (h *Host) Images() ([]Image, error) {
	files, err := filepath.Glob(filepath.Join(h.refs(), "*.json"))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var out []Image
	for _, f := range files {
		img, err := readImage(f)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its file was removed: it would be packed again
		}
		if err != nil {
			return nil, fmt.Errorf("list images: %w", err)
		}
		out = append(out, img)
	}
	slices.SortFunc(out, func(a, b Image) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// RemoveImage forgets a name, and removes the files that no name means any
// more. A sandbox that runs keeps what it has.
func (h *Host) RemoveImage(ctx context.Context, name string) error {
	r, err := image.ParseReference(name)
	if err != nil {
		return err
	}
	unlock, err := h.lock(ctx)
	if err != nil {
		return fmt.Errorf("remove image: %w", err)
	}
	defer unlock()
	if err := os.Remove(h.ref(r)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove image %s: it is not here", r)
	} else if err != nil {
		return fmt.Errorf("remove image: %w", err)
	}
	rest, err := h.Images()
	if err != nil {
		return err
	}
	keep := make([]string, 0, len(rest))
	for _, img := range rest {
		keep = append(keep, img.Path)
	}
	return image.Prune(ctx, h.cache(), keep)
}
