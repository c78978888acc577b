package tinyelf_test

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"hauberk.dev/internal/tinyelf"
)

// says writes its data, of five bytes, and ends with code 7.
var says = []byte{
	0xb8, 1, 0, 0, 0, // mov eax, 1: write
	0xbf, 1, 0, 0, 0, // mov edi, 1
	0x48, 0x8d, 0x35, 19, 0, 0, 0, // lea rsi, [rip+19]
	0xba, 5, 0, 0, 0, // mov edx, 5
	0x0f, 0x05, // syscall
	0xb8, 60, 0, 0, 0, // mov eax, 60: exit
	0xbf, 7, 0, 0, 0, // mov edi, 7
	0x0f, 0x05, // syscall
}

func TestRuns(t *testing.T) {
	p := tinyelf.Program(says, "here\n")
	f, err := elf.NewFile(bytes.NewReader(p))
	if err != nil || len(f.Progs) != 1 || f.Progs[0].Filesz != uint64(len(p)) {
		t.Fatal(f, err)
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("programs are for amd64")
	}
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, p, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path)
	out, _ := cmd.Output()
	if string(out) != "here\n" || cmd.ProcessState.ExitCode() != 7 {
		t.Errorf("said %q, ended with %v", out, cmd.ProcessState)
	}
}
