package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/guard"
	"hauberk.dev/guard/bpf"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/internal/tinyelf"
)

// machine is what every boot needs. Its first process is that of the Guard's own
// tests, which attaches the Guard as the real agent does and follows steps.
type machine struct {
	dir    string
	kernel *kernel.Artefacts
	bundle []byte
}

// stepTime bounds one boot, of a busy machine.
const stepTime = 5 * time.Minute

func prepare(ctx context.Context, series string) (*machine, error) {
	flavour := kernel.Flavour
	if series != "6.1" {
		flavour = kernel.Series(series, kernel.Flavour)
	}
	found, err := kernel.Find("/", flavour)
	if err != nil {
		return nil, err
	}
	m := &machine{}
	if m.dir, err = os.MkdirTemp("", "bench-guard"); err != nil {
		return nil, err
	}
	if err := m.fill(ctx, found); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *machine) close() { _ = os.RemoveAll(m.dir) }

func (m *machine) fill(ctx context.Context, found kernel.Installed) (err error) {
	if m.kernel, err = kernel.Prepare(m.dir+"/cache", found, "virtio_pci", "virtio_blk", "erofs", "overlay"); err != nil {
		return err
	}
	types, err := os.Open(m.kernel.Types)
	if err != nil {
		return err
	}
	defer types.Close()
	overlay, err := m.kernel.Module("overlay")
	if err != nil {
		return err
	}
	if m.bundle, err = bpf.Link(types, bytes.NewReader(overlay), m.kernel.BuildID); err != nil {
		return err
	}
	for name, from := range map[string]string{"init": "./guard/testdata/init", "load": "./bench/guard/load"} {
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(m.dir, name), from)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", name, err, out)
		}
	}
	return nil
}

// image holds the load as the program that the first process starts, and every
// file and program that rules name.
func (m *machine) image(ctx context.Context, policy []byte, steps []string) (string, error) {
	root, err := os.MkdirTemp(m.dir, "root")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(root)
	if err := os.Chmod(root, 0o755); err != nil {
		return "", err
	}
	load, err := os.ReadFile(filepath.Join(m.dir, "load"))
	if err != nil {
		return "", err
	}
	// mov eax, 60; xor edi, edi; syscall
	nothing := tinyelf.Program([]byte{0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05}, "")
	files := map[string][]byte{"attack": load, ".steps": []byte(strings.Join(steps, "\n") + "\n"), "bin/nothing": nothing, ".policy": policy,
		"etc/plain": nil, "etc/" + strings.Repeat("d/", 6) + "plain": nil, "etc/" + strings.Repeat("d/", 18) + "plain": nil}
	for i := range 512 {
		files[fmt.Sprint("etc/rules/", i)] = nil
		files[fmt.Sprint("opt/programs/", i)] = append(nothing, byte(i), byte(i>>8))
	}
	for _, d := range []string{"proc", "sys", "dev", "shm", "tmp", "mnt/plugins"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return "", err
		}
	}
	for name, data := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return "", err
		}
		if err := os.WriteFile(path, data, 0o755); err != nil {
			return "", err
		}
	}
	path := filepath.Join(m.dir, "image")
	_ = os.Remove(path)
	if out, err := exec.CommandContext(ctx, "mkfs.erofs", "--quiet", path, root).CombinedOutput(); err != nil {
		return "", fmt.Errorf("make image: %w\n%s", err, out)
	}
	return path, nil
}

// boot runs steps and gives what the machine said.
func (m *machine) boot(ctx context.Context, s rung, steps []string) (console string, err error) {
	var policy, bundle []byte
	if s.policy != nil {
		if policy, err = blob(*s.policy); err != nil {
			return "", err
		}
		steps = append([]string{"policy .policy"}, steps...)
	}
	if s.attached {
		bundle = m.bundle
	}
	initrd, err := m.kernel.Initrd(filepath.Join(m.dir, "init"), bundle)
	if err != nil {
		return "", err
	}
	image, err := m.image(ctx, policy, steps)
	if err != nil {
		return "", err
	}
	lsm := "lockdown,capability,landlock,yama"
	if s.lsm {
		lsm += ",bpf"
	}
	khz, err := clock()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	// One processor of the host by itself, so that the guest does not wander.
	qemu := exec.CommandContext(ctx, "taskset", "-c", strconv.Itoa(runtime.NumCPU()-1), "qemu-system-x86_64",
		"-M", "microvm,acpi=on,pcie=on", "-accel", "tcg,tb-size=64", "-cpu", "max", "-smp", "1", "-m", "256",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio",
		"-kernel", m.kernel.Kernel, "-initrd", initrd.Path,
		"-append", "console=ttyS0 quiet reboot=t panic=-1 lsm="+lsm+" tsc_early_khz="+khz+
			" cryptomgr.notests random.trust_cpu=on audit=0 no_timer_check rcupdate.rcu_expedited=1 8250.nr_uarts=1 tsc=nowatchdog",
		"-drive", "if=none,id=root,format=raw,read-only=on,file="+image, "-device", "virtio-blk-pci,drive=root")
	var out, said bytes.Buffer
	qemu.Stdout, qemu.Stderr = &out, &said
	if err := qemu.Run(); err != nil {
		return "", fmt.Errorf("run machine: %w\n%s\n%s", err, &said, &out)
	}
	console = strings.ReplaceAll(out.String(), "\r", "")
	if !strings.Contains(console, "\nEND") || strings.Contains(console, "\nFATAL") {
		return "", fmt.Errorf("the machine did not come to its end:\n%s", console)
	}
	return console, nil
}

// step measures all loads in one boot.
func (m *machine) step(ctx context.Context, s rung, samples int, r *result) error {
	var steps []string
	for _, load := range loads {
		steps = append(steps, fmt.Sprintf("load %s %d", load, samples))
	}
	if s.attached {
		steps = append(steps, "status", "memory")
	}
	console, err := m.boot(ctx, s, steps)
	if err != nil {
		return err
	}
	seen := 0
	for line := range strings.Lines(console) {
		switch f := strings.Fields(line); {
		case len(f) > 1 && f[0] == "RAN":
			if err := r.ran(f[1:]); err != nil {
				return fmt.Errorf("%w\n%s", err, console)
			}
			seen++
		case len(f) > 1 && f[0] == "STATUS":
			raw, err := hex.DecodeString(f[1])
			if err != nil {
				return err
			}
			st, err := guard.DecodeStatus(raw)
			if err != nil {
				return err
			}
			r.Lost += st.Lost + st.AuditLost
			r.Events += st.Sequence + st.AuditSequence
		case len(f) > 1 && f[0] == "MEMORY":
			r.Agent, _ = strconv.ParseUint(f[1], 10, 64)
		}
	}
	if seen != len(loads) {
		return fmt.Errorf("%d of %d loads were run:\n%s", seen, len(loads), console)
	}
	return nil
}

// ran reads "NAME exit 0 ns A,B p99 N count N".
func (r *result) ran(f []string) error {
	if len(f) != 9 || f[2] != "0" || f[3] != "ns" {
		return fmt.Errorf("load %s", strings.Join(f, " "))
	}
	for text := range strings.SplitSeq(f[4], ",") {
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return fmt.Errorf("load %s: %w", f[0], err)
		}
		r.NS[f[0]] = append(r.NS[f[0]], v)
	}
	v, err := strconv.ParseFloat(f[6], 64)
	r.P99[f[0]] = append(r.P99[f[0]], v)
	return err
}

// costs asks the kernel what each program took, in a boot of its own, for
// counting costs too.
func (m *machine) costs(ctx context.Context, by map[string]uint64) error {
	steps := []string{"setting /proc/sys/kernel/bpf_stats_enabled 1"}
	for _, load := range loads {
		steps = append(steps, fmt.Sprintf("load %s 3", load))
	}
	console, err := m.boot(ctx, rung{lsm: true, attached: true, policy: rules(64)}, append(steps, "costs"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(console) {
		f := strings.Fields(line)
		if len(f) != 4 || f[0] != "COST" {
			continue
		}
		runs, err := strconv.ParseUint(f[2], 10, 64)
		if err != nil {
			return err
		}
		ns, err := strconv.ParseUint(f[3], 10, 64)
		if err != nil {
			return err
		}
		if runs > 100 { // fewer say little
			by[f[1]] = ns / runs
		}
	}
	return nil
}

// clock is the rate of the host's clock in kHz, which a microvm with ACPI waits
// for in vain unless it is told.
func clock() (string, error) {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "cpu MHz" {
			mhz, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			return strconv.Itoa(int(mhz * 1000)), err
		}
	}
	return "", fmt.Errorf("find the clock's rate: /proc/cpuinfo names no cpu MHz")
}
