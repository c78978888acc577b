package qemu

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"hauberk.dev/vm"
)

func TestProbeEndsInTime(t *testing.T) {
	spec := needMachine(t)
	c := ProbeConfig{
		Kernel: spec.Kernel, Run: filepath.Join(t.TempDir(), "run"), Cache: filepath.Join(t.TempDir(), "cache"),
		UID: templateUID, GID: templateUID,
	}
	t.Cleanup(func() { endAll(t, c.Run) })
	began := time.Now()
	first, err := Probe(deadline(t), c)
	took := time.Since(began)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s after %v: %s", first.Accelerator, took.Round(time.Millisecond), first.Notice)
	if took > probeDeadline+2*time.Second {
		t.Errorf("the probe took %v", took)
	}
	if (first.Accelerator == TCG) != (first.Notice != "") {
		t.Errorf("accelerator %q with notice %q", first.Accelerator, first.Notice)
	}
	if left, err := vm.Orphans(c.Run); err != nil || len(left) != 0 {
		t.Errorf("the probe left %v, %v", left, err)
	}
	began = time.Now()
	if again, err := Probe(deadline(t), c); err != nil || again != first {
		t.Errorf("asked again: %+v, %v; first %+v", again, err, first)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("a remembered outcome took %v", took)
	}
	forgetsForeign(t, c, first)
}

// forgetsForeign shows that an outcome of another boot or of nonsense does not
// count.
func forgetsForeign(t *testing.T, c ProbeConfig, p Probed) {
	other := p
	other.BootID = "another boot"
	if _, ok := remembered(c.Cache, other); ok {
		t.Error("an outcome of another boot was taken")
	}
	if err := os.WriteFile(filepath.Join(c.Cache, probeName), []byte(`{"accelerator":"magic"`), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, ok := remembered(c.Cache, p); ok {
		t.Error("a broken file was taken")
	}
}

// TestProbeGuestRuns shows that the guest a probe boots does run where it can:
// else the probe would say no for ever.
func TestProbeGuestRuns(t *testing.T) {
	spec := needMachine(t)
	run := filepath.Join(t.TempDir(), "run")
	t.Cleanup(func() { endAll(t, run) })
	c := ProbeConfig{Kernel: spec.Kernel, Run: run, UID: templateUID, GID: templateUID}
	if err := c.try(deadline(t), TCG, patience); err != nil {
		t.Fatal(err)
	}
}
