// Command agent is a guest agent for the tests of the drivers: it loads
// modules and answers lines on the agent port. It is not the agent that
// sandboxes run.
package main

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	for _, m := range []struct{ dir, kind string }{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		os.MkdirAll(m.dir, 0o755)
		if err := syscall.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil {
			fmt.Println("mount", m.dir, err)
		}
	}
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		fmt.Println(err)
	}
	for _, name := range strings.Fields(string(order)) {
		load(name)
	}
	for {
		serve()
		time.Sleep(20 * time.Millisecond)
	}
}

func load(name string) {
	f, err := os.Open("/modules/" + name)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()
	params := []byte{0}
	const finitModule = 313
	if _, _, e := syscall.Syscall(finitModule, f.Fd(), uintptr(unsafe.Pointer(&params[0])), 0); e != 0 {
		fmt.Println("load", name, e)
	}
}

func serve() {
	names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	if len(names) == 0 {
		return
	}
	fd, err := syscall.Open("/dev/"+filepath.Base(filepath.Dir(names[0])), syscall.O_RDWR, 0)
	if err != nil {
		fmt.Println(err)
		return
	}
	port := os.NewFile(uintptr(fd), "port")
	defer port.Close()
	sc := bufio.NewScanner(patient(fd))
	for sc.Scan() {
		fmt.Fprintln(port, strings.ReplaceAll(answer(strings.Fields(sc.Text())), "\n", " "))
	}
}

// patient reads a port whose host comes and goes, and keeps it open meanwhile,
// as the real agent does: a port that is closed when a template is saved may
// miss that its host is back.
type patient int

func (p patient) Read(b []byte) (int, error) {
	for {
		n, err := syscall.Read(int(p), b)
		switch {
		case n > 0:
			return n, nil
		case err != nil && err != syscall.EINTR:
			return 0, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func answer(words []string) string {
	if len(words) == 0 {
		return "?"
	}
	switch words[0] {
	case "ping":
		return "pong"
	case "random":
		b := make([]byte, 16)
		f, _ := os.Open("/dev/urandom")
		defer f.Close()
		f.Read(b)
		return hex.EncodeToString(b)
	case "reseed":
		seed, _ := hex.DecodeString(words[1])
		return reseed(seed)
	case "rescan":
		if err := os.WriteFile("/sys/bus/pci/rescan", []byte("1"), 0); err != nil {
			return err.Error()
		}
		return "ok"
	case "read":
		f, err := os.Open(words[1])
		if err != nil {
			return err.Error()
		}
		defer f.Close()
		b := make([]byte, 4096)
		n, _ := f.Read(b)
		return strings.TrimSpace(string(bytes.TrimRight(b[:n], "\x00")))
	case "write":
		f, err := os.OpenFile(words[1], os.O_WRONLY, 0)
		if err != nil {
			return err.Error()
		}
		defer f.Close()
		if _, err := f.WriteString(words[2]); err != nil {
			return err.Error()
		}
		if err := f.Sync(); err != nil {
			return err.Error()
		}
		return "ok"
	case "find":
		names, _ := filepath.Glob(words[1])
		return strings.Join(names, " ")
	case "mounts":
		return fmt.Sprint(syscall.Mount(words[1], "/tmp", words[2], syscall.MS_RDONLY, ""))
	case "now":
		return fmt.Sprint(time.Now().UnixNano())
	case "die":
		syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		os.Exit(1)
	}
	return "?"
}

// reseed mixes host bytes into the kernel's pool and makes it take them.
func reseed(seed []byte) string {
	f, err := os.Open("/dev/urandom")
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	var info struct {
		bits, size int32
		data       [64]byte
	}
	info.bits, info.size = int32(copy(info.data[:], seed))*8, int32(len(seed))
	const addEntropy, reseedCRNG = 0x40085203, 0x5207
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), addEntropy, uintptr(unsafe.Pointer(&info))); e != 0 {
		return e.Error()
	}
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), reseedCRNG, 0); e != 0 {
		return e.Error()
	}
	return "ok"
}
