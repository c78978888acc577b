package qemu

import (
	"bytes"
	"io"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCopyMemory copies what a template holds, and not its holes.
func TestCopyMemory(t *testing.T) {
	const size = 64 << 20
	from, err := memfd("test", size)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	for _, at := range []int64{0, 1<<20 + 1, 33 << 20, size - 5} {
		if _, err := from.WriteAt([]byte("there"), at); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := unix.FcntlInt(from.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	to, err := copyMemory(from)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	want, err := io.ReadAll(io.NewSectionReader(from, 0, size))
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(io.NewSectionReader(to, 0, 2*size))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(to.Fd()), &st); err != nil || st.Blocks*512 > 1<<20 {
		t.Errorf("the copy takes %d bytes, %v", st.Blocks*512, err)
	}
	if _, err := to.WriteAt([]byte("own"), 0); err != nil {
		t.Errorf("the copy cannot be written: %v", err)
	}
}
