package shim

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"hauberk.dev/api/hand"
	"hauberk.dev/image"
	"hauberk.dev/shim/oci"
)

const goodNote = `{"version":1,"process":3,"root":"abc","memoryMiB":128,"processors":1,"caller":{"a":1}}`

// TestSavedFits names what a container to be is not as it was saved.
func TestSavedFits(t *testing.T) {
	note, err := parseSaved([]byte(goodNote))
	if err != nil || note.Process != 3 || string(note.Caller) != `{"a":1}` {
		t.Fatalf("%+v, %v", note, err)
	}
	s := &saved{note: note}
	good := wish{first: image.Image{ErofsSHA256: "abc"}, size: oci.Size{MemoryMiB: 128, Processors: 1}}
	if err := s.fits(good, false); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*wish){
		"image of the root was abc and is abd":            func(w *wish) { w.first.ErofsSHA256 = "abd" },
		"memory of the machine in MiB was 128 and is 256": func(w *wish) { w.size.MemoryMiB = 256 },
		"processors of the machine was 1 and is 2":        func(w *wish) { w.size.Processors = 2 },
	} {
		w := good
		change(&w)
		if err := s.fits(w, false); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := s.fits(good, true); err == nil || !strings.Contains(err.Error(), "terminal was false and is true") {
		t.Errorf("with a terminal: %v", err)
	}
}

// TestSnapshotRefusals asks for what cannot be saved, or gone on from.
func TestSnapshotRefusals(t *testing.T) {
	s := &service{containers: map[string]*container{}}
	if _, err := s.Snapshot(context.Background(), &hand.SnapshotRequest{Container: "c", Dir: "here"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a relative directory: %v", err)
	}
	if _, err := s.Snapshot(context.Background(), &hand.SnapshotRequest{Container: "c", Dir: "/d"}); status.Code(err) != codes.NotFound {
		t.Errorf("a container that is not here: %v", err)
	}
	if _, err := openSaved("here"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a relative snapshot: %v", err)
	}
	if _, err := openSaved(t.TempDir()); err == nil {
		t.Error("an empty directory is a snapshot")
	}
}

func FuzzSaved(f *testing.F) {
	f.Add([]byte(goodNote))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"version":1,"process":0}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if s, err := parseSaved(raw); err == nil && (s.Process == 0 || s.Root == "" || s.MemoryMiB <= 0 || s.Processors <= 0) {
			t.Errorf("taken: %+v", s)
		}
	})
}
