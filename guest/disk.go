package guest

import (
	"strconv"
	"syscall"
)

// disk is a virtio disk: the serial that the host gave it and its device.
type disk struct{ serial, device string }

// listDisks asks every disk for its serial. Each answer is the host's, so a
// template asks once for all its clones.
func listDisks() (all []disk, err error) {
	const dir = "/sys/block"
	names, err := listDir(dir)
	if err != nil {
		return nil, err
	}
	var buf [64]byte
	for _, n := range names {
		if b, err := readFile(dir+"/"+n+"/serial", buf[:]); err == nil && len(trim(b)) > 0 {
			all = append(all, disk{trim(b), "/dev/" + n})
		}
	}
	return all, nil
}

// findDisk gives the device of a disk by its serial.
func findDisk(serial string) (string, error) {
	d := disk{serial: serial}
	err := d.find()
	return d.device, err
}

// find looks for the device, if it is not known yet.
func (d *disk) find() error {
	if d.device != "" {
		return nil
	}
	all, err := listDisks()
	if err != nil {
		return err
	}
	for _, other := range all {
		if other.serial == d.serial && d.serial != "" {
			*d = other
			return nil
		}
	}
	return fail("find disk with serial", strconv.Quote(d.serial), syscall.ENODEV)
}

// knownDisk gives a disk by its serial, without its device if that has to be
// looked for: it may have come after the guest had started.
func (a *agent) knownDisk(serial string) disk {
	for _, d := range a.disks {
		if d.serial == serial {
			return d
		}
	}
	return disk{serial: serial}
}

// learn keeps what was found.
func (a *agent) learn(found []disk) {
	for _, d := range found {
		if d.device != "" && a.knownDisk(d.serial).device == "" {
			a.disks = append(a.disks, d)
		}
	}
}

// renewDisk gives the device number of the disk with a serial, after it made the
// kernel read its size anew: a disk's place is there before the disk is, with
// the size of nothing in particular. Nobody may use the disk.
func renewDisk(serial string) (major, minor uint32, err error) {
	device, err := findDisk(serial)
	if err != nil {
		return 0, 0, err
	}
	// Not two at a time, for each is to get its name back.
	lock, err := syscall.Open(rootsDir, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return 0, 0, fail("open", rootsDir, err)
	}
	defer syscall.Close(lock)
	if err := syscall.Flock(lock, syscall.LOCK_EX); err != nil {
		return 0, 0, fail("lock", rootsDir, err)
	}
	block := "/sys/block/" + lastName(device)
	var buf [256]byte
	n, err := syscall.Readlink(block+"/device", buf[:])
	if err != nil {
		return 0, 0, fail("find driver of", device, err)
	}
	for _, act := range [...]string{"unbind", "bind"} {
		if err := writeFile("/sys/bus/virtio/drivers/virtio_blk/"+act, lastName(string(buf[:n]))); err != nil {
			return 0, 0, err
		}
	}
	if now, err := findDisk(serial); err != nil || now != device {
		return 0, 0, fail("find again", device, syscall.ENODEV)
	}
	b, err := readFile(block+"/dev", buf[:])
	if err != nil {
		return 0, 0, err
	}
	first, second := cut(trim(b), ':')
	return uint32(number([]byte(first))), uint32(number([]byte(second))), nil
}
