package netns

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// SpareTap makes a tap for a guest whose namespace is not known yet, in one that
// has no name and nothing else in it. Join takes it from there; closed before
// that, it is gone.
func SpareTap(owner int) (tap *os.File, err error) {
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		tap, err = openTap(Device, owner)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make spare tap: %w", err)
	}
	return tap, nil
}

// takeTap moves a tap into ns, under a name. The calling thread is in ns
// already, and stays. The file returned is the caller's own.
func takeTap(tap *os.File, ns *Namespace, name string) (*os.File, error) {
	fd, err := unix.FcntlInt(tap.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate spare tap: %w", err)
	}
	own := os.NewFile(uintptr(fd), "/dev/net/tun")
	if err := moveTap(fd, ns, name); err != nil {
		own.Close()
		return nil, fmt.Errorf("move spare tap: %w", err)
	}
	return own, nil
}

func moveTap(fd int, ns *Namespace, name string) error {
	had, home, err := whereTap(fd)
	if err != nil {
		return err
	}
	defer home.Close()
	from, err1 := home.Stat()
	to, err2 := ns.file.Stat()
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if os.SameFile(from, to) {
		if had == name {
			return nil
		}
		return rename(had, name)
	}
	// A tap of that name is an earlier one's, without a machine that Join would
	// have found: it would not have been given another.
	if old, err := netlink.LinkByName(name); err == nil {
		if err := netlink.LinkDel(old); err != nil {
			return fmt.Errorf("remove old %s: %w", name, err)
		}
	}
	there := &Namespace{name: "of the spare tap", file: home}
	return there.Do(func() error {
		link, err := netlink.LinkByName(had)
		if err != nil {
			return err
		}
		// Move and name in one step: the name may be taken here.
		req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(link.Attrs().Index)
		msg.Change = unix.IFF_UP // down
		req.AddData(msg)
		req.AddData(nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(ns.file.Fd()))))
		req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
		_, err = req.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
}

func rename(had, name string) error {
	link, err := netlink.LinkByName(had)
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetDown(link), netlink.LinkSetName(link, name))
}
