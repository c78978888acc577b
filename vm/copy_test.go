package vm

import (
	"archive/tar"
	"bytes"
	"io"
	"path"
	"reflect"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
)

// entries are an ordinary copy, as a guest sends it.
func entries() []byte {
	var b []byte
	for _, e := range []struct {
		guestproto.CopyEntry
		data string
	}{
		{guestproto.CopyEntry{Kind: guestproto.CopyDir, Mode: 0o1755, UID: 1, GID: 2, UnixNanos: 1700000000_000000001, Path: "d"}, ""},
		{guestproto.CopyEntry{Kind: guestproto.CopyRegular, Mode: 0o4755, Size: 4, Path: "d/file ü"}, "data"},
		{guestproto.CopyEntry{Kind: guestproto.CopySymlink, Path: "d/sym", Link: "/any/../where"}, ""},
		{guestproto.CopyEntry{Kind: guestproto.CopyLink, Path: "d/hard", Link: "d/file ü"}, ""},
		{guestproto.CopyEntry{}, ""},
	} {
		b = append(e.Append(b), e.data...)
	}
	return b
}

// TestEntries turns a guest's stream into a tar stream and back into itself.
func TestEntries(t *testing.T) {
	var files, again bytes.Buffer
	w := tar.NewWriter(&files)
	if err := readEntries(bytes.NewReader(entries()), w); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := writeEntries(&again, tar.NewReader(&files)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.Bytes(), entries()) {
		t.Errorf("got %q\nwant %q", &again, entries())
	}
}

// FuzzEntries lets a guest send anything for a copy: what comes out names
// nothing outside of where it is unpacked, and nothing of it is a device.
func FuzzEntries(f *testing.F) {
	f.Add(entries())
	for _, name := range []string{"../x", "/x", "a/../../x", "..", "a\x00b"} {
		f.Add((&guestproto.CopyEntry{Kind: guestproto.CopyDir, Path: name}).Append(nil))
		f.Add((&guestproto.CopyEntry{Kind: guestproto.CopyLink, Path: "a", Link: name}).Append(nil))
	}
	f.Add((&guestproto.CopyEntry{Kind: guestproto.CopyRegular, Path: "a", Size: 1 << 60}).Append(nil))
	f.Fuzz(func(t *testing.T, said []byte) {
		var files bytes.Buffer
		w := tar.NewWriter(&files)
		_ = readEntries(bytes.NewReader(said), w)
		_ = w.Flush()
		if files.Len() > 8*len(said)+64<<10 {
			t.Fatalf("%d bytes became %d", len(said), files.Len())
		}
		for r := tar.NewReader(&files); ; {
			h, err := r.Next()
			if err != nil {
				return
			}
			names := []string{h.Name}
			switch h.Typeflag {
			case tar.TypeLink:
				names = append(names, h.Linkname)
			case tar.TypeReg, tar.TypeDir, tar.TypeSymlink:
			default:
				t.Fatalf("type %q", h.Typeflag)
			}
			for _, n := range names {
				if c := path.Clean(n); path.IsAbs(c) || c == ".." || strings.HasPrefix(c, "../") {
					t.Fatalf("name %q", n)
				}
			}
			if _, err := io.Copy(io.Discard, r); err != nil {
				return
			}
		}
	})
}

// TestPushFrames shows that a push of any size comes in frames that a guest
// takes, in order, and adds up to what was given.
func TestPushFrames(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789"), 70_000)
	files := []guestproto.PushFile{{Path: "big", Mode: 0o600, Data: big}, {Path: "empty", Mode: 0o644}}
	for range 2*guestproto.MaxList + 1 {
		files = append(files, guestproto.PushFile{Path: "small", Mode: 0o640, UID: 1, Data: []byte("x")})
	}
	c, g := newFakeGuest(t, nil)
	var pushes []guestproto.Push
	done := make(chan bool)
	go func() {
		defer close(done)
		g.greet(nil, false)
		for {
			h, b := g.next()
			m, err := guestproto.ParsePush(b)
			if err != nil {
				t.Error(err)
				return
			}
			pushes = append(pushes, m)
			g.say(h.ID, guestproto.VerbReply, nil)
			if m.Last {
				return
			}
		}
	}()
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if err := c.Push(t.Context(), "dir", "..1", files); err != nil {
		t.Fatal(err)
	}
	<-done
	var got []guestproto.PushFile
	for i, m := range pushes {
		if m.Dir != "dir" || m.Stamp != "..1" || m.First != (i == 0) || m.Last != (i == len(pushes)-1) {
			t.Errorf("frame %d of %d: %q %q first %t last %t", i, len(pushes), m.Dir, m.Stamp, m.First, m.Last)
		}
		for _, f := range m.Files {
			if n := len(got); f.More && n > 0 && got[n-1].Path == f.Path {
				got[n-1].Data = append(got[n-1].Data, f.Data...)
				continue
			}
			got = append(got, guestproto.PushFile{Path: f.Path, Mode: f.Mode, UID: f.UID, GID: f.GID, Data: append([]byte(nil), f.Data...)})
		}
	}
	if !reflect.DeepEqual(got, files) {
		t.Errorf("%d files became %d, or others", len(files), len(got))
	}
	t.Logf("%d frames in %v", len(pushes), time.Since(begun))
}
