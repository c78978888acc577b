package qemu

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"hauberk.dev/vm"
)

func sample(r role) configuration {
	return configuration{
		role: r, mark: "hauberk-m0-mark", accelerator: TCG, commandLine: commandLine(2600000), cacheMiB: 32, memoryMiB: 128, cpus: 1,
		disks: []disk{{"r0", "file"}, {"w1", "host_device"}},
	}
}

// TestArguments compares command lines with the ones checked in: each word of
// them was measured or is a lock.
func TestArguments(t *testing.T) {
	for name, r := range map[string]role{"boot": roleBoot, "clone": roleClone} {
		got := strings.Join(sample(r).arguments(), "\n") + "\n"
		file := "testdata/arguments-" + name + ".txt"
		if os.Getenv("UPDATE") != "" {
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s differs (UPDATE=1 rewrites it):\n%s", file, got)
		}
	}
}

// TestCloneFitsItsTemplate shows that both see the same board: the frozen
// state fits no other.
func TestCloneFitsItsTemplate(t *testing.T) {
	c := sample(roleClone)
	c.disks = nil
	boot := sample(roleTemplate)
	boot.disks = nil
	fixed := func(args []string) (out []string) {
		for i, a := range args {
			if i > 0 && slices.Contains([]string{"-device", "-M", "-m", "-smp", "-accel", "-cpu", "-serial", "-netdev", "-blockdev"}, args[i-1]) {
				out = append(out, args[i-1], a)
			}
		}
		return out
	}
	if a, b := fixed(c.arguments()), fixed(boot.arguments()); !slices.Equal(a, b) || len(a) < 16 {
		t.Errorf("clone %q\ntemplate %q", a, b)
	}
}

func TestKeyDependsOnEverything(t *testing.T) {
	spec := vm.TemplateSpec{Kernel: vm.Blob{Digest: "k"}, Initrd: vm.Blob{Digest: "i"}, TrustDomain: "t"}
	first := key("QEMU 7", sample(roleBoot), spec)
	if other := sample(roleClone); key("QEMU 7", other, spec) != first {
		t.Error("the key depends on a machine's own devices")
	}
	seen := map[string]string{first: "first"}
	note := func(name, k string) {
		if before, twice := seen[k]; twice {
			t.Errorf("%s has the key of %s", name, before)
		}
		seen[k] = name
	}
	note("version", key("QEMU 8", sample(roleBoot), spec))
	for i, edit := range []func(*configuration, *vm.TemplateSpec){
		func(c *configuration, _ *vm.TemplateSpec) { c.accelerator = KVM },
		func(c *configuration, _ *vm.TemplateSpec) { c.commandLine += " x" },
		func(c *configuration, _ *vm.TemplateSpec) { c.cacheMiB++ },
		func(c *configuration, _ *vm.TemplateSpec) { c.memoryMiB++ },
		func(c *configuration, _ *vm.TemplateSpec) { c.cpus++ },
		func(_ *configuration, s *vm.TemplateSpec) { s.Kernel.Digest = "l" },
		func(_ *configuration, s *vm.TemplateSpec) { s.Initrd.Digest = "j" },
		func(_ *configuration, s *vm.TemplateSpec) { s.TrustDomain = "u" },
		func(_ *configuration, s *vm.TemplateSpec) { s.Kernel.Digest, s.Initrd.Digest = "", "ki" },
	} {
		c, s := sample(roleBoot), spec
		edit(&c, &s)
		note(fmt.Sprint("edit ", i), key("QEMU 7", c, s))
	}
}

func TestParseTSC(t *testing.T) {
	for text, want := range map[string]uint64{
		"processor : 0\ncpu MHz\t\t: 2596.140\nbogomips\t: 5192.28\n\nprocessor : 1\ncpu MHz : 1.0\n": 2596140,
		"cpu MHz : 800.000\nbogomips : 5200.00\n":                                                     2600000, // asleep
		"cpu MHz : 2600.000\n": 2600000,
		"bogomips : 4000.00\n": 2000000,
		"":                     0,
		"cpu MHz : fast\n":     0,
		"cpu MHz : NaN\n":      0,
		"cpu MHz : 1e300\n":    0,
		"cpu MHz : -5\n":       0,
	} {
		got, err := parseTSC(strings.NewReader(text))
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
}

func FuzzParseTSC(f *testing.F) {
	f.Add("cpu MHz\t: 2596.140\nbogomips\t: 5192.28\n")
	f.Fuzz(func(t *testing.T, text string) {
		if khz, err := parseTSC(strings.NewReader(text)); err == nil && (khz < 100_000 || khz > 20_000_000) {
			t.Errorf("%d kHz", khz)
		}
	})
}
