package argv_test

import (
	"errors"
	"io/fs"
	"os/exec"
	"slices"
	"testing"

	"hauberk.dev/internal/argv"
)

// TestJustStarted asks at once, where a process that is being started shows
// nothing.
func TestJustStarted(t *testing.T) {
	for range 200 {
		cmd := exec.Command("sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		got, err := argv.Of(cmd.Process.Pid)
		cmd.Process.Kill()
		if err != nil || !slices.Equal(got, []string{"sleep", "60"}) {
			t.Errorf("got %q, %v", got, err)
		}
		// It is dead or dying, and nobody has waited for it.
		if err := cmd.Wait(); err == nil {
			t.Error("it ended by itself")
		}
	}
}

func TestNobody(t *testing.T) {
	cmd := exec.Command("true")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out.Read(make([]byte, 1)) // it has ended, or is about to
	for range 2 {             // a zombie at first, then nothing
		for {
			got, err := argv.Of(cmd.Process.Pid)
			if errors.Is(err, fs.ErrNotExist) {
				break
			}
			if err != nil || !slices.Equal(got, []string{"true"}) {
				t.Fatalf("got %q, %v", got, err)
			}
		}
		cmd.Wait()
	}
	if has, err := argv.Has(cmd.Process.Pid, "true"); has || err != nil {
		t.Errorf("who has ended: %v, %v", has, err)
	}
}

func TestHas(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	for arg, want := range map[string]bool{"60": true, "6": false, "": false} {
		if has, err := argv.Has(cmd.Process.Pid, arg); has != want || err != nil {
			t.Errorf("%q: %v, %v", arg, has, err)
		}
	}
}
