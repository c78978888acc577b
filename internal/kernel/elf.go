package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
)

// Bounds on the parts taken out of a kernel. Debian's type information is 4 MB.
const (
	maxTypes = 64 << 20
	maxNotes = 1 << 20
)

// Types returns the section .BTF of an ELF kernel: the type information that
// the Guard is linked against.
func Types(vmlinux []byte) ([]byte, error) {
	data, err := section(vmlinux, ".BTF", maxTypes)
	if err != nil {
		return nil, err
	}
	if len(data) < 24 || binary.LittleEndian.Uint16(data) != 0xeb9f {
		return nil, errors.New("read kernel: section .BTF does not begin as type information does")
	}
	return data, nil
}

// BuildID returns the GNU build id of an ELF kernel in hexadecimal. It names
// the kernel that a Guard bundle was linked for.
func BuildID(vmlinux []byte) (string, error) {
	for _, name := range []string{".notes", ".note.gnu.build-id"} {
		notes, err := section(vmlinux, name, maxNotes)
		if err != nil {
			continue
		}
		if id := buildID(notes); id != "" {
			return id, nil
		}
	}
	return "", errors.New("read kernel: no GNU build id in its notes")
}

func section(image []byte, name string, limit uint64) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, fmt.Errorf("read kernel: %w", err)
	}
	s := f.Section(name)
	if s == nil || s.Type == elf.SHT_NOBITS {
		return nil, fmt.Errorf("read kernel: no section %s", name)
	}
	if s.FileSize > limit {
		return nil, fmt.Errorf("read kernel: section %s has %d bytes, at most %d are accepted", name, s.FileSize, limit)
	}
	if s.Offset > uint64(len(image)) || s.FileSize > uint64(len(image))-s.Offset {
		return nil, fmt.Errorf("read kernel: section %s: %w", name, errShort)
	}
	return image[s.Offset : s.Offset+s.FileSize], nil
}

// buildID finds the note of type 3 and owner "GNU" in a note section.
func buildID(notes []byte) string {
	const header = 12
	for len(notes) >= header {
		owner := uint64(binary.LittleEndian.Uint32(notes))
		desc := uint64(binary.LittleEndian.Uint32(notes[4:]))
		kind := binary.LittleEndian.Uint32(notes[8:])
		start := header + pad4(owner)
		end := start + desc
		if end > uint64(len(notes)) || end < start {
			return ""
		}
		if kind == 3 && owner == 4 && string(notes[header:header+4]) == "GNU\x00" && desc > 0 && desc <= 64 {
			return hex.EncodeToString(notes[start:end])
		}
		next := start + pad4(desc)
		if next > uint64(len(notes)) {
			return ""
		}
		notes = notes[next:]
	}
	return ""
}

func pad4(n uint64) uint64 { return (n + 3) &^ 3 }
