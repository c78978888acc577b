package netns

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// openTap makes a tap in the namespace of the calling thread. x/sys has no
// setter for TUNSETIFF's flags and descriptor in one, hence the raw ioctl.
func openTap(name string, owner int) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(req))); errno != 0 {
		unix.Close(fd)
		return nil, fmt.Errorf("make tap %s: %w", name, errno)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, owner); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("give tap %s to uid %d: %w", name, owner, err)
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}

// whereTap gives the name of a tap and the namespace it is in.
func whereTap(fd int) (name string, home *os.File, err error) {
	req, err := unix.NewIfreq(Device) // overwritten
	if err != nil {
		return "", nil, err
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNGETIFF, uintptr(unsafe.Pointer(req))); errno != 0 {
		return "", nil, fmt.Errorf("read name of tap: %w", errno)
	}
	ns, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNGETDEVNETNS, 0)
	if errno != 0 {
		return "", nil, fmt.Errorf("open namespace of tap: %w", errno)
	}
	return req.Name(), os.NewFile(ns, "namespace of "+req.Name()), nil
}
