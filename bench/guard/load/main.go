// Command load runs one load of the Guard's benchmark inside a guest and prints
// what each sample took: "load NAME SAMPLES" gives, on one line, nanoseconds an
// operation by sample, and the 99th percentile of single operations.
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// sampleTime is about how long a sample takes.
const sampleTime = 100 * time.Millisecond

// loads by name. Each makes what it needs and gives the operation, which is
// repeated.
var loads = map[string]func() (operation, error){
	"getppid": func() (operation, error) { return func() error { syscall.Getppid(); return nil }, nil },
	"exec":    execLoad,
	"open2":   func() (operation, error) { return openLoad("/etc/plain"), nil },
	"open8":   func() (operation, error) { return openLoad("/etc" + strings.Repeat("/d", 6) + "/plain"), nil },
	"open20":  func() (operation, error) { return openLoad("/etc" + strings.Repeat("/d", 18) + "/plain"), nil },
	"stat":    statLoad,
	"create":  createLoad,
	"map":     mapLoad,
	"connect": connectLoad,
	"sendto":  sendtoLoad,
}

// operation is done many times.
type operation func() error

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println("load:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return errors.New("want a name and a number of samples")
	}
	make, ok := loads[args[0]]
	samples, err := strconv.Atoi(args[1])
	if !ok || err != nil || samples < 1 {
		return fmt.Errorf("no load %q, or no number of samples %q", args[0], args[1])
	}
	op, err := make()
	if err != nil {
		return err
	}
	count, err := calibrate(op)
	if err != nil {
		return err
	}
	var each []time.Duration
	var texts []string
	for range samples {
		began := time.Now()
		for range count {
			if err := op(); err != nil {
				return err
			}
		}
		texts = append(texts, strconv.FormatInt(time.Since(began).Nanoseconds()/int64(count), 10))
	}
	for range min(count*samples, 2000) { // by themselves, for the clock costs too
		began := time.Now()
		if err := op(); err != nil {
			return err
		}
		each = append(each, time.Since(began))
	}
	slices.Sort(each)
	fmt.Println("ns", strings.Join(texts, ","), "p99", each[len(each)*99/100].Nanoseconds(), "count", count)
	return nil
}

// calibrate warms up and finds how many operations a sample has.
func calibrate(op operation) (int, error) {
	for count := 1; ; count *= 2 {
		began := time.Now()
		for range count {
			if err := op(); err != nil {
				return 0, err
			}
		}
		if took := time.Since(began); took > sampleTime/4 {
			return max(1, int(float64(count)*float64(sampleTime)/float64(took))), nil
		}
	}
}

func execLoad() (operation, error) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	attr := &syscall.ProcAttr{Env: []string{"PATH=/bin"}, Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}}
	return func() error {
		pid, err := syscall.ForkExec("/bin/nothing", []string{"nothing", "and", "more"}, attr)
		if err != nil {
			return err
		}
		for {
			if _, err := syscall.Wait4(pid, nil, 0, nil); !errors.Is(err, syscall.EINTR) {
				return err
			}
		}
	}, nil
}

func openLoad(path string) operation {
	return func() error {
		fd, err := syscall.Open(path, syscall.O_RDONLY, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", path, err)
		}
		return syscall.Close(fd)
	}
}

func statLoad() (operation, error) {
	return func() error {
		var st syscall.Stat_t
		return syscall.Stat("/etc/d/d/d/d/d/d/plain", &st)
	}, nil
}

func createLoad() (operation, error) {
	return func() error {
		fd, err := syscall.Open("/tmp/made", syscall.O_CREAT|syscall.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		if err := syscall.Close(fd); err != nil {
			return err
		}
		return syscall.Unlink("/tmp/made")
	}, nil
}

func mapLoad() (operation, error) {
	fd, err := syscall.Open("/bin/nothing", syscall.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	return func() error {
		b, err := syscall.Mmap(fd, 0, 4096, syscall.PROT_READ|syscall.PROT_EXEC, syscall.MAP_PRIVATE)
		if err != nil {
			return err
		}
		return syscall.Munmap(b)
	}, nil
}

func connectLoad() (operation, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		return nil, err
	}
	listener := int(file.Fd()) // blocking from now on
	to := &syscall.SockaddrInet4{Port: l.Addr().(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}
	return func() error {
		s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		// No state is left waiting, or the ports would run out.
		_ = syscall.SetsockoptLinger(s, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1})
		if err := syscall.Connect(s, to); err != nil {
			return err
		}
		in, _, err := syscall.Accept(listener)
		if err != nil {
			return err
		}
		return errors.Join(syscall.Close(s), syscall.Close(in))
	}, nil
}

func sendtoLoad() (operation, error) {
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return nil, err
	}
	sink, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	to := &syscall.SockaddrInet4{Port: sink.LocalAddr().(*net.UDPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}
	word := []byte("word")
	return func() error { return syscall.Sendto(s, word, 0, to) }, nil
}
