package build

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// Recipe lists the images of a module. It lies beside the module's YAML, so
// that whoever brings the module up can build everything it needs.
type Recipe struct {
	// Version of the format: 1.
	Version int `json:"version"`
	// Repository is the URI the sources are published under; provenances name
	// it, and applications must list it.
	Repository string `json:"repository"`
	// Author is the account that wrote the sources.
	Author string `json:"author"`
	// Builder is the SLSA builder id the provenances name; release policies must
	// list it.
	Builder string `json:"builder"`
	// Namespace the images are released in.
	Namespace string  `json:"namespace"`
	Images    []Image `json:"images"`
}

// Image is one image of a recipe.
type Image struct {
	// Name is a repository with a tag, such as bank/web:1.
	Name string `json:"name"`
	// Application that owns the image.
	Application string `json:"application"`
	// Programs to build, and where in the image they go.
	Programs []Program `json:"programs"`
	// Files to add.
	Files      []File   `json:"files,omitempty"`
	Entrypoint []string `json:"entrypoint"`
	Env        []string `json:"env,omitempty"`
	// User the entry point runs as.
	User string `json:"user,omitempty"`
}

// Program is a main package and its place.
type Program struct {
	Package string `json:"package"` // relative to the module, such as ./web
	Path    string `json:"path"`
}

// File is a file that is not built. Exactly one of Text, Link, Copy and
// Directory says what it is.
type File struct {
	Path string `json:"path"`
	// Text is its content.
	Text *string `json:"text,omitempty"`
	// Link is the target of a symbolic link.
	Link string `json:"link,omitempty"`
	// Copy is a file of the machine that builds. The provenance lists it with
	// its digest.
	Copy string `json:"copy,omitempty"`
	// Libraries adds the dynamic loader and the libraries that Copy needs, at
	// the paths they have on this machine.
	Libraries bool `json:"libraries,omitempty"`
	// Directory makes an empty directory.
	Directory bool `json:"directory,omitempty"`
	// Mode in octal, such as "0644". It is not asked of links; without it a
	// copy keeps its own, a text has 0644, a directory 0755.
	Mode string `json:"mode,omitempty"`
}

// maxRecipe bounds a recipe as read.
const maxRecipe = 1 << 20

// ReadRecipe reads a recipe from a JSON file.
func ReadRecipe(name string) (Recipe, error) {
	f, err := os.Open(name)
	if err != nil {
		return Recipe{}, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxRecipe+1))
	if err != nil {
		return Recipe{}, err
	}
	r, err := ParseRecipe(raw)
	if err != nil {
		return Recipe{}, fmt.Errorf("read %s: %w", name, err)
	}
	return r, nil
}

// ParseRecipe reads a recipe strictly, and names all its faults at once.
func ParseRecipe(raw []byte) (Recipe, error) {
	if len(raw) > maxRecipe {
		return Recipe{}, fmt.Errorf("recipe is larger than %d bytes", maxRecipe)
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	var r Recipe
	if err := d.Decode(&r); err != nil {
		return Recipe{}, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Recipe{}, errors.New("something follows the recipe")
	}
	return r, r.check()
}

func (r Recipe) check() error {
	var errs []error
	if r.Version != 1 {
		errs = append(errs, fmt.Errorf("version is %d, want 1", r.Version))
	}
	for field, v := range map[string]string{"repository": r.Repository, "author": r.Author, "builder": r.Builder, "namespace": r.Namespace} {
		if v == "" {
			errs = append(errs, fmt.Errorf("%s is not set", field))
		}
	}
	if len(r.Images) == 0 || len(r.Images) > 256 {
		errs = append(errs, fmt.Errorf("%d images, want 1 to 256", len(r.Images)))
	}
	seen := map[string]bool{}
	for i, img := range r.Images {
		if seen[img.Name] {
			errs = append(errs, fmt.Errorf("images[%d]: the name %q is there twice", i, img.Name))
		}
		seen[img.Name] = true
		if img.Application == "" {
			errs = append(errs, fmt.Errorf("images[%d]: application is not set", i))
		}
		if err := img.check(); err != nil {
			errs = append(errs, fmt.Errorf("images[%d]: %w", i, err))
		}
	}
	return errors.Join(errs...)
}

func (img Image) check() error {
	var errs []error
	if len(img.Name) > 255 || !namePattern.MatchString(img.Name) {
		errs = append(errs, fmt.Errorf("name %q is not repository:tag", img.Name))
	}
	if len(img.Entrypoint) == 0 || !path.IsAbs(img.Entrypoint[0]) {
		errs = append(errs, fmt.Errorf("entrypoint %q does not start with an absolute path", img.Entrypoint))
	}
	if len(img.Programs) == 0 {
		errs = append(errs, errors.New("programs is empty"))
	}
	for i, p := range img.Programs {
		if !strings.HasPrefix(p.Package, "./") || path.Clean(p.Package) == "." || strings.Contains(p.Package, "..") {
			errs = append(errs, fmt.Errorf("programs[%d]: package %q is not below the module, such as ./web", i, p.Package))
		}
		errs = append(errs, checkPath(p.Path, "programs", i))
	}
	for i, f := range img.Files {
		errs = append(errs, checkPath(f.Path, "files", i), f.check(i))
	}
	return errors.Join(errs...)
}

func checkPath(p, field string, i int) error {
	if !path.IsAbs(p) || path.Clean(p) != p || p == "/" || strings.ContainsRune(p, 0) {
		return fmt.Errorf("%s[%d]: path %q is not a clean absolute path", field, i, p)
	}
	return nil
}

func (f File) check(i int) error {
	kinds := 0
	for _, is := range []bool{f.Text != nil, f.Link != "", f.Copy != "", f.Directory} {
		if is {
			kinds++
		}
	}
	if kinds != 1 {
		return fmt.Errorf("files[%d]: set exactly one of text, link, copy and directory", i)
	}
	if f.Libraries && f.Copy == "" {
		return fmt.Errorf("files[%d]: libraries goes with copy", i)
	}
	if f.Copy != "" && !path.IsAbs(f.Copy) {
		return fmt.Errorf("files[%d]: copy %q is not absolute", i, f.Copy)
	}
	if f.Mode != "" {
		if _, err := parseMode(f.Mode); err != nil || f.Link != "" {
			return fmt.Errorf("files[%d]: mode %q is not octal permissions of a file", i, f.Mode)
		}
	}
	return nil
}
