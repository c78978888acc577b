package qemu

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"hauberk.dev/vm"
)

// Where QEMU keeps what it is given; the first descriptor after the standard
// three, in this order.
const (
	fdMonitor = 3 + iota
	fdAgent
	fdConsole
	fdMemory
	fdKernel // also the first of a clone's devices
	fdInitrd
)

// role is why a QEMU is started: it decides the few arguments that differ.
type role int

const (
	roleBoot     role = iota // a machine of its own, from the kernel
	roleTemplate             // a guest to be frozen
	roleClone                // a machine from a template
)

// configuration is everything that decides a command line.
type configuration struct {
	role        role
	mark        string
	accelerator Accelerator
	commandLine string
	cacheMiB    int // of translated code, under TCG
	memoryMiB   int
	cpus        int
	disks       []vm.Disk
	networks    []vm.Network
}

// device gives the files of a machine's own devices their places.
func (c configuration) firstDevice() int {
	if c.role == roleClone {
		return fdKernel
	}
	return fdInitrd + 1
}

// arguments is QEMU's command line. What a template and its clones have in
// common must stay equal to the letter: the frozen state fits no other machine.
func (c configuration) arguments() []string {
	args := []string{
		"-name", c.mark,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	}
	args = append(args, c.accelerator.arguments(c.cacheMiB)...)
	args = append(args, c.board()...)
	share := "on"
	if c.role == roleClone {
		share = "off" // copy on write
	}
	args = append(args, "-object", fmt.Sprintf("memory-backend-file,id=mem,size=%dM,mem-path=/proc/self/fd/%d,share=%s",
		c.memoryMiB, fdMemory, share))
	for _, port := range []struct {
		name string
		fd   int
	}{{"monitor", fdMonitor}, {"agent", fdAgent}, {"console", fdConsole}} {
		args = append(args, "-chardev", fmt.Sprintf("socket,id=%s,fd=%d,server=on,wait=off", port.name, port.fd))
	}
	args = append(args, "-mon", "chardev=monitor,mode=control", "-serial", "chardev:console")
	switch c.role {
	case roleClone:
		args = append(args, "-incoming", "defer")
	default:
		args = append(args, "-S",
			"-kernel", "/proc/self/fd/"+strconv.Itoa(fdKernel),
			"-initrd", "/proc/self/fd/"+strconv.Itoa(fdInitrd),
			"-append", c.commandLine)
	}
	return append(args, c.devices()...)
}

// board is what the frozen state of a template describes.
func (c configuration) board() []string {
	return []string{
		"-M", "microvm,acpi=on,pcie=on,memory-backend=mem",
		"-smp", strconv.Itoa(c.cpus), "-m", strconv.Itoa(c.memoryMiB),
		"-device", "pcie-root-port,id=rp0,bus=pcie.0,chassis=1,slot=1,addr=1.0,multifunction=on,power_controller_present=off",
		"-device", "pcie-root-port,id=rp1,bus=pcie.0,chassis=2,slot=2,addr=1.1,power_controller_present=off",
		"-device", "virtio-serial-pci,bus=pcie.0,addr=2.0",
		"-device", "virtserialport,chardev=agent,name=agent.0",
	}
}

// devices are the machine's own. A template has none: a guest remembers what
// it has seen of a device, and finds new ones by a rescan.
func (c configuration) devices() (args []string) {
	fd, slot := c.firstDevice(), 4
	for i, d := range c.disks {
		readOnly := "on"
		if d.Writable {
			readOnly = "off"
		}
		args = append(args,
			"-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, i+1),
			"-blockdev", fmt.Sprintf("driver=raw,node-name=disk%d,read-only=%s,file.driver=file,file.locking=off,file.filename=/dev/fdset/%d", i, readOnly, i+1),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d,serial=%s,bus=pcie.0,addr=%x.0,disable-legacy=on", i, d.Serial, slot))
		if d.Writable {
			args[len(args)-1] += ",werror=report,rerror=report"
		}
		fd++
		slot++
	}
	for i, n := range c.networks {
		args = append(args,
			"-netdev", fmt.Sprintf("tap,id=net%d,fd=%d,vhost=off", i, fd),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=net%d,mac=%s,bus=pcie.0,addr=%x.0,romfile=,disable-legacy=on", i, n.MAC, slot))
		fd++
		slot++
	}
	return args
}

// key is a digest of everything a frozen state depends on.
func key(version string, c configuration, spec vm.TemplateSpec) string {
	c.role, c.mark, c.disks, c.networks = roleTemplate, "", nil, nil
	h := sha256.New()
	part := func(s string) { fmt.Fprintf(h, "%d:%s\n", len(s), s) }
	part(version)
	for _, a := range c.arguments() {
		part(a)
	}
	part(spec.Kernel.Digest)
	part(spec.Initrd.Digest)
	part(spec.TrustDomain)
	return hex.EncodeToString(h.Sum(nil))
}

// commandLine is the guest kernel's. A microvm has no clock to measure the
// processor's by, so the guest must be told, or it waits for ever.
func commandLine(tscKHz uint64) string {
	return "console=ttyS0 quiet reboot=t panic=-1 lsm=lockdown,capability,landlock,yama,bpf" +
		" tsc_early_khz=" + strconv.FormatUint(tscKHz, 10) +
		" cryptomgr.notests random.trust_cpu=on audit=0 no_timer_check rcupdate.rcu_expedited=1" +
		" 8250.nr_uarts=1 transparent_hugepage=madvise"
}

// hostTSC reads how fast the host's time stamp counter runs, in kHz.
func hostTSC() (uint64, error) {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return parseTSC(f)
}

// parseTSC finds the speed of the first processor. Where its clock varies,
// "cpu MHz" is the speed of the moment, and the counter runs at that of
// bogomips, which the kernel derives from it: two for each tick.
func parseTSC(r io.Reader) (uint64, error) {
	var mhz, bogomips float64
	sc := bufio.NewScanner(io.LimitReader(r, 64<<10))
	for sc.Scan() {
		name, value, ok := strings.Cut(sc.Text(), ":")
		if !ok {
			break // end of the first processor
		}
		var err error
		switch strings.TrimSpace(name) {
		case "cpu MHz":
			mhz, err = strconv.ParseFloat(strings.TrimSpace(value), 64)
		case "bogomips":
			bogomips, err = strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
		if err != nil {
			return 0, fmt.Errorf("read processor speed: %w", err)
		}
	}
	if half := bogomips / 2; mhz == 0 || half > 0 && (half < mhz*0.99 || half > mhz*1.01) {
		mhz = half
	}
	if !(mhz >= 100 && mhz <= 20000) {
		return 0, fmt.Errorf("read processor speed: %v MHz in /proc/cpuinfo is no processor's", mhz)
	}
	return uint64(mhz*1000 + 0.5), nil
}
