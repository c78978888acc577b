package qemu

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/vm"
)

// Where QEMU keeps what it is given; the first descriptor after the standard
// three, in this order.
const (
	fdMonitor = 3 + iota
	fdAgent
	fdConsole
	fdMemory
	fdTap
	fdKernel // also the first of a clone's disks
	fdInitrd
)

// capacity is what the guest takes every disk to have.
const capacity = 1 << 40

// shelves are root ports that are empty when a machine starts: devices that no
// template can have go there.
const shelves = 5

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
	shared      bool // a clone's memory is reached by file servers
	disks       []disk
}

// disk is a file in a slot, and what QEMU reads it with.
type disk struct {
	slot   vm.Slot
	driver string
}

// firstDisk is the first descriptor of a machine's disks.
func (c configuration) firstDisk() int {
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
	args = append(args, c.backends()...)
	args = append(args, c.board()...)
	share := "on"
	if c.role == roleClone && !c.shared {
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
	return args
}

// board is what the frozen state of a template describes, but for what lies
// behind its devices.
func (c configuration) board() []string {
	args := []string{
		"-M", "microvm,acpi=on,pcie=on,memory-backend=mem",
		"-smp", strconv.Itoa(c.cpus), "-m", strconv.Itoa(c.memoryMiB),
	}
	for i := range shelves {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=%s,bus=pcie.0,chassis=%d,slot=%d,addr=1.%d,multifunction=on,power_controller_present=off",
			shelf(i), i+1, i+1, i))
	}
	args = append(args,
		"-device", "virtio-serial-pci,bus=pcie.0,addr=2.0",
		"-device", "virtserialport,chardev=agent,name=agent.0",
		"-device", netDevice(0, "bus=pcie.0,addr=3.0"))
	for i, slot := range vm.Slots() {
		args = append(args, "-device", fmt.Sprintf("virtio-blk-pci,id=%s,drive=%s,serial=%s,bus=pcie.0,addr=%x.0,num-queues=1,queue-size=128,disable-legacy=on,werror=report,rerror=report",
			slot, c.node(slot), slot, 4+i))
	}
	return args
}

func shelf(i int) string { return "rp" + strconv.Itoa(i) }

// netDevice is a guest's i-th network device.
func netDevice(i int, place string) string {
	return fmt.Sprintf("virtio-net-pci,id=nic%d,netdev=net%d,mac=%s,%s,romfile=,disable-legacy=on", i, i, deviceMAC(i), place)
}

func deviceMAC(i int) net.HardwareAddr {
	mac := guestproto.DeviceMAC(i)
	return mac[:]
}

// node names what is behind a slot when the machine starts.
func (c configuration) node(slot vm.Slot) string {
	if slices.ContainsFunc(c.disks, func(d disk) bool { return d.slot == slot }) {
		return diskNode(slot)
	}
	return emptyNode(slot)
}

// emptyNode names what is behind an empty slot. Those that are only read share
// one.
func emptyNode(slot vm.Slot) string {
	if slot.Writable() {
		return "empty-" + string(slot)
	}
	return "empty"
}

// backends are the machine's own: what its devices read and write.
func (c configuration) backends() []string {
	args := []string{
		"-netdev", fmt.Sprintf("tap,id=net0,fd=%d,vhost=off", fdTap),
		"-blockdev", emptyBackend("empty", "on"),
	}
	for i := range vm.WritableSlots {
		args = append(args, "-blockdev", emptyBackend(emptyNode(vm.WritableSlot(i)), "off"))
	}
	for i, d := range c.disks {
		args = append(args, "-add-fd", fmt.Sprintf("fd=%d,set=%d", c.firstDisk()+i, fdSet(d.slot)),
			"-blockdev", fmt.Sprintf("driver=%s,node-name=%s,read-only=%s,locking=off,discard=unmap,filename=/dev/fdset/%d",
				d.driver, diskNode(d.slot), onOff(!d.slot.Writable()), fdSet(d.slot)))
	}
	return args
}

func emptyBackend(node, readOnly string) string {
	return fmt.Sprintf("driver=null-co,node-name=%s,size=%d,read-zeroes=on,read-only=%s", node, capacity, readOnly)
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// key is a digest of everything a frozen state depends on.
func key(version string, c configuration, spec vm.TemplateSpec) string {
	c.role, c.mark, c.disks, c.shared = roleTemplate, "", nil, false
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

// origin says what key is a digest of.
func origin(version string, c configuration, spec vm.TemplateSpec) vm.Origin {
	return vm.Origin{
		Monitor: version, Arguments: key("", c, vm.TemplateSpec{}), Kernel: spec.Kernel.Digest, Initrd: spec.Initrd.Digest,
		MemoryMiB: spec.MemoryMiB, CPUs: spec.CPUs, TrustDomain: spec.TrustDomain,
	}
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
