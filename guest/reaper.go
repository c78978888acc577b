package guest

import "syscall"

// reaper is the first process of the PID namespace that containers of the pod
// share, once one asked for it: an agent that does nothing but let the kernel
// take orphans. It lives as long as the guest.
type reaper struct{ pidfd int }

// podNamespace gives the pidfd of the reaper, and starts it if there is none.
func (a *agent) podNamespace() (int, error) {
	if a.reaper.pidfd >= 0 && pidfdSignal(a.reaper.pidfd, 0) == nil {
		return a.reaper.pidfd, nil
	}
	closeFD(&a.reaper.pidfd)
	null, files, err := nullFiles()
	if err != nil {
		return -1, err
	}
	defer syscall.Close(null)
	if _, a.reaper.pidfd, err = startStage(stageReap, files, syscall.CLONE_NEWPID); err != nil {
		return -1, fail("start", "reaper of the pod", err)
	}
	return a.reaper.pidfd, nil
}

// reapMain is the reaper. Whoever gets to look into it finds no file of the
// agent's, no rights and no descriptor.
func reapMain() {
	ignoreSignals()
	if err := bury(); err != nil {
		warn("hauberk-guest: " + err.Error())
		syscall.Exit(1)
	}
	for {
		pause()
	}
}

func bury() error {
	if err := prctl(prSetDumpable, 0); err != nil {
		return fail("hide", "reaper", err)
	}
	if err := syscall.Unshare(syscall.CLONE_NEWNS); err != nil {
		return fail("make", "mount namespace", err)
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fail("detach", "mounts", err)
	}
	if err := syscall.Mount("tmpfs", "/tmp", "tmpfs", closed|syscall.MS_RDONLY, "size=0,mode=555"); err != nil {
		return fail("mount tmpfs", "/tmp", err)
	}
	if err := syscall.Chdir("/tmp"); err != nil {
		return fail("enter", "/tmp", err)
	}
	if err := syscall.PivotRoot(".", "."); err != nil {
		return fail("pivot to", "/tmp", err)
	}
	if err := syscall.Unmount(".", syscall.MNT_DETACH); err != nil {
		return fail("unmount", "old root", err)
	}
	for c := uintptr(0); c < 64; c++ {
		if prctl(prCapbsetDrop, c) == syscall.EINVAL {
			break
		}
	}
	return setCaps(0, 0, 0)
}
