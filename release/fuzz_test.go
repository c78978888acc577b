package release

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// FuzzSubmission unpacks and reads a tar as the gate does before it looks at
// any evidence.
func FuzzSubmission(f *testing.F) {
	for _, files := range [][2]string{
		{"oci-layout", `{"imageLayoutVersion":"1.0.0"}`},
		{"index.json", `{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}]}`},
		{"blobs/../../x", ""},
	} {
		var b bytes.Buffer
		tw := tar.NewWriter(&b)
		err := errors.Join(
			tw.WriteHeader(&tar.Header{Name: "oci-layout", Size: 30, Mode: 0o644}), write(tw, `{"imageLayoutVersion":"1.0.0"}`),
			tw.WriteHeader(&tar.Header{Name: files[0], Size: int64(len(files[1])), Mode: 0o644}), write(tw, files[1]), tw.Close())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Add([]byte("not a tar"))
	scratch := f.TempDir()
	f.Fuzz(func(t *testing.T, raw []byte) {
		l, err := openLayout(Submission{Tar: bytes.NewReader(raw)}, scratch)
		if err == nil {
			if !digestPattern.MatchString(l.digest) || len(l.manifest.Layers) == 0 {
				t.Fatalf("accepted %+v", l)
			}
			l.close()
		}
		if left, _ := filepath.Glob(filepath.Join(scratch, "submission-*")); len(left) > 0 {
			t.Fatalf("left behind: %v", left)
		}
		if _, err := os.Stat(filepath.Join(scratch, "x")); err == nil {
			t.Fatal("wrote outside its directory")
		}
	})
}

func write(tw *tar.Writer, s string) error { _, err := tw.Write([]byte(s)); return err }

// FuzzManifest reads a manifest that a layout holds.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:../../index.json","size":2}]}`))
	f.Add([]byte(`{"schemaVersion":2,"schemaversion":1}`))
	root, err := os.OpenRoot(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { root.Close() })
	f.Fuzz(func(t *testing.T, raw []byte) {
		l := &layout{root: root, raw: raw}
		if l.readManifest() == nil {
			t.Fatalf("accepted a manifest whose blobs are not there: %s", raw)
		}
	})
}
