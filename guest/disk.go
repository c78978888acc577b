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

// findDisk gives the device of a disk by its serial. One that came after the
// guest had started is looked for.
func (a *agent) findDisk(serial string) (string, error) {
	for again := false; ; again = true {
		for _, d := range a.disks {
			if d.serial == serial && serial != "" {
				return d.device, nil
			}
		}
		if again {
			return "", fail("find disk with serial", strconv.Quote(serial), syscall.ENODEV)
		}
		var err error
		if a.disks, err = listDisks(); err != nil {
			return "", err
		}
	}
}
