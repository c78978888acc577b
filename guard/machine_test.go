package guard

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"hauberk.dev/guard/bpf"
	"hauberk.dev/internal/kernel"
)

// machine is what every test that boots needs, made once.
type machine struct {
	dir    string
	kernel *kernel.Artefacts
	bundle []byte
	init   string
	attack string
}

var prepare = sync.OnceValues(func() (*machine, error) {
	found, err := kernel.Find("/", flavour())
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "guard")
	if err != nil {
		return nil, err
	}
	scratch = dir
	m := &machine{dir: dir, init: dir + "/init", attack: dir + "/attack"}
	if m.kernel, err = kernel.Prepare(dir+"/cache", found, "virtio_pci", "virtio_blk", "erofs", "overlay", "vsock", "tun"); err != nil {
		return nil, err
	}
	if m.bundle, err = linkFor(m.kernel); err != nil {
		return nil, err
	}
	for _, program := range []string{"init", "attack"} {
		build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/"+program, "./testdata/"+program)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build %s: %w\n%s", program, err, out)
		}
	}
	return m, nil
})

// flavour is the kernel that the tests boot: the standard one, or that of the
// series that HAUBERK_TEST_KERNEL names, such as 6.12.
func flavour() string {
	if series := os.Getenv("HAUBERK_TEST_KERNEL"); series != "" {
		return kernel.Series(series, kernel.Flavour)
	}
	return kernel.Flavour
}

// scratch is where prepare worked; it goes when the tests end.
var scratch string

func TestMain(m *testing.M) {
	code := m.Run()
	if scratch != "" {
		os.RemoveAll(scratch)
	}
	os.Exit(code)
}

// linkFor links the object of this tree for a kernel.
func linkFor(k *kernel.Artefacts) ([]byte, error) {
	types, err := os.Open(k.Types)
	if err != nil {
		return nil, err
	}
	defer types.Close()
	overlay, err := k.Module("overlay")
	if err != nil {
		return nil, err
	}
	return bpf.Link(types, bytes.NewReader(overlay), k.BuildID)
}

// outcome is what came out of one boot.
type outcome struct {
	ran      map[string]string // by name of the attack: how it ended
	events   map[string][]Event
	policies []string
	pids     map[string]uint32 // by name of the attack
	stood    map[uint64]Status // by generation, when it was put in force
	status   []Status
	console  string
}

// boot runs the steps in a machine. Every file is put into the image as it is.
func boot(t *testing.T, withGuard bool, files map[string][]byte, steps ...string) outcome {
	t.Helper()
	m, err := prepare()
	if err != nil {
		t.Fatal(err)
	}
	bundle := m.bundle
	if !withGuard {
		bundle = nil
	}
	initrd, err := m.kernel.Initrd(m.init, bundle)
	if err != nil {
		t.Fatal(err)
	}
	image := buildImage(t, m, files, steps)
	limit := 8 * time.Minute
	if os.Getenv("HAUBERK_TEST_SWAPS") != "" { // many more than usual
		limit = time.Hour
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-M", "microvm,acpi=on,pcie=on", "-accel", "tcg,tb-size=64", "-cpu", "max", "-smp", "1", "-m", "256",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio",
		"-kernel", m.kernel.Kernel, "-initrd", initrd.Path,
		"-append", "console=ttyS0 quiet reboot=t panic=-1 lsm=lockdown,capability,landlock,yama,bpf tsc_early_khz="+tscKHz(t)+
			" cryptomgr.notests random.trust_cpu=on audit=0 no_timer_check rcupdate.rcu_expedited=1 8250.nr_uarts=1",
		"-drive", "if=none,id=root,format=raw,read-only=on,file="+image, "-device", "virtio-blk-pci,drive=root")
	var console, said bytes.Buffer
	qemu.Stdout, qemu.Stderr = &console, &said
	start := time.Now()
	if err := qemu.Run(); err != nil {
		t.Fatalf("run machine: %v\n%s\n%s", err, &said, &console)
	}
	t.Logf("machine ran %.1f s", time.Since(start).Seconds())
	return readOutcome(t, console.String())
}

func readOutcome(t *testing.T, console string) outcome {
	t.Helper()
	o := outcome{ran: map[string]string{}, events: map[string][]Event{}, pids: map[string]uint32{}, stood: map[uint64]Status{}, console: console}
	last := ""
	for line := range strings.Lines(console) {
		line = strings.TrimSpace(line)
		word, rest, _ := strings.Cut(line, " ")
		switch word {
		case "RAN":
			last, rest, _ = strings.Cut(rest, " ")
			o.ran[last] = rest
		case "EVENT":
			record, err := hex.DecodeString(rest)
			if err != nil {
				t.Fatalf("event %q: %v", rest, err)
			}
			e, err := DecodeEvents(record)
			if err != nil {
				t.Fatal(err)
			}
			o.events[last] = append(o.events[last], e)
		case "PROCESS":
			var of string
			var pid uint32
			if _, err := fmt.Sscan(rest, &of, &pid); err != nil {
				t.Fatalf("process %q: %v", rest, err)
			}
			o.pids[of] = pid
		case "STATUS", "STANDS":
			b, err := hex.DecodeString(rest)
			if err != nil {
				t.Fatal(err)
			}
			s, err := DecodeStatus(b)
			if err != nil {
				t.Fatal(err)
			}
			if word == "STATUS" {
				o.status = append(o.status, s)
			} else {
				o.stood[s.Generation] = s
			}
		case "POLICY", "ATTACHED":
			o.policies = append(o.policies, line)
		case "FATAL":
			t.Fatalf("machine: %s\n%s", rest, console)
		}
	}
	if !strings.Contains(console, "\nEND") {
		t.Fatalf("machine did not come to its end:\n%s", console)
	}
	return o
}

// buildImage makes an erofs image of the attack program, a tool, and files.
func buildImage(t *testing.T, m *machine, files map[string][]byte, steps []string) string {
	t.Helper()
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"bin", "etc/app", "proc", "sys", "dev", "shm", "tmp", "srv/bait/deep/er", "opt", "mnt/plugins"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	attack, err := os.ReadFile(m.attack)
	if err != nil {
		t.Fatal(err)
	}
	files["attack"], files["bin/tool"], files["bin/nop"] = attack, attack, nop
	files[".steps"] = []byte(strings.Join(steps, "\n") + "\n")
	for name, data := range files {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for alias, of := range map[string]string{"bin/curl": "bin/tool", "bin/jit": "bin/tool", "bin/parent": "bin/tool", "bin/sh": "bin/tool", "bin/python3": "bin/tool", "bin/perl": "bin/tool", "bin/digested": "bin/tool", "opt/digested": "bin/tool"} {
		if err := os.WriteFile(filepath.Join(root, alias), files[of], 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(root, "bin/curl"), filepath.Join(root, "bin/curl-too")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/app", filepath.Join(root, "etc/link")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "image")
	if out, err := exec.Command("mkfs.erofs", "--quiet", path, root).CombinedOutput(); err != nil {
		t.Fatalf("make image: %v\n%s", err, out)
	}
	return path
}

// nop is the smallest program: it ends with 0.
var nop = slices.Concat(
	[]byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00"), // 64 bits, little endian
	[]byte{2, 0, 62, 0, 1, 0, 0, 0},                                   // a program for amd64
	little(0x400078), little(64), little(0), make([]byte, 4), []byte{64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0},
	[]byte{1, 0, 0, 0, 5, 0, 0, 0}, // the one segment, to be read and run
	little(0), little(0x400000), little(0x400000), little(0x81), little(0x81), little(0x1000),
	[]byte{0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05}, // exit(0)
)

func little(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// tscKHz is the rate of the host's clock, which a microvm with ACPI waits for
// in vain unless it is told.
func tscKHz(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "cpu MHz" {
			var mhz float64
			if _, err := fmt.Sscan(value, &mhz); err != nil {
				t.Fatal(err)
			}
			return fmt.Sprint(int(mhz * 1000))
		}
	}
	t.Fatal("find cpu MHz in /proc/cpuinfo: it is not there")
	return ""
}
