package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"hauberk.dev/vm"
)

// Devices of the board have an id below this path.
const peripheral = "/machine/peripheral/"

// fdSet numbers the set that holds a slot's file. It is the slot's for ever, so
// that whoever adopts a machine need not be told.
func fdSet(s vm.Slot) int { return slices.Index(vm.Slots(), s) + 1 }

func diskNode(s vm.Slot) string { return "disk-" + string(s) }

// diskDriver is what QEMU reads a file with.
func diskDriver(fi os.FileInfo) string {
	if fi.Mode().IsRegular() {
		return "file"
	}
	return "host_device"
}

// Attach puts a disk into an empty slot.
func (m *monitor) Attach(ctx context.Context, d vm.Disk) error {
	m.plugging.Lock()
	defer m.plugging.Unlock()
	node, err := m.drive(ctx, d.Slot)
	if err != nil {
		return err
	}
	if node != emptyNode(d.Slot) {
		return vm.ErrSlotTaken
	}
	f, fi, err := reopen(d)
	if err != nil {
		return err
	}
	defer f.Close()
	m.clear(ctx, d.Slot) // of what an attempt left that died
	if err := m.execute(ctx, "add-fd", map[string]int{"fdset-id": fdSet(d.Slot)}, nil, f); err != nil {
		return err
	}
	err = m.execute(ctx, "blockdev-add", map[string]any{
		"driver": diskDriver(fi), "node-name": diskNode(d.Slot), "filename": fmt.Sprintf("/dev/fdset/%d", fdSet(d.Slot)),
		"read-only": !d.Slot.Writable(), "locking": "off", "discard": "unmap",
	}, nil)
	if err == nil {
		err = m.setDrive(ctx, d.Slot, diskNode(d.Slot))
	}
	if err != nil {
		m.clear(ctx, d.Slot)
	}
	return err
}

// Detach empties a slot.
func (m *monitor) Detach(ctx context.Context, s vm.Slot) error {
	m.plugging.Lock()
	defer m.plugging.Unlock()
	node, err := m.drive(ctx, s)
	if err != nil || node == emptyNode(s) {
		return err
	}
	if err := m.setDrive(ctx, s, emptyNode(s)); err != nil {
		return err
	}
	err = m.execute(ctx, "blockdev-del", map[string]string{"node-name": node}, nil)
	return errors.Join(err, m.execute(ctx, "remove-fd", map[string]int{"fdset-id": fdSet(s)}, nil))
}

// clear forgets a slot's file, if there is one and nothing reads it.
func (m *monitor) clear(ctx context.Context, s vm.Slot) {
	_ = m.execute(ctx, "blockdev-del", map[string]string{"node-name": diskNode(s)}, nil)
	_ = m.execute(ctx, "remove-fd", map[string]int{"fdset-id": fdSet(s)}, nil)
}

func (m *monitor) drive(ctx context.Context, s vm.Slot) (node string, err error) {
	err = m.execute(ctx, "qom-get", map[string]string{"path": peripheral + string(s), "property": "drive"}, &node)
	return node, err
}

func (m *monitor) setDrive(ctx context.Context, s vm.Slot, node string) error {
	return m.execute(ctx, "qom-set", map[string]string{"path": peripheral + string(s), "property": "drive", "value": node}, nil)
}

const shareID = "share"

// Share gives the guest the file system of a vhost-user server.
func (m *monitor) Share(ctx context.Context, tag string, server *os.File) error {
	m.plugging.Lock()
	defer m.plugging.Unlock()
	// Without this a server would be shown what the guest started from, and
	// never what it writes.
	var shared bool
	err := m.execute(ctx, "qom-get", map[string]string{"path": "/objects/mem", "property": "share"}, &shared)
	if err != nil {
		return err
	}
	if !shared {
		return vm.ErrNotShared
	}
	const id = shareID
	if err := m.execute(ctx, "getfd", map[string]string{"fdname": id}, nil, server); err != nil {
		return err
	}
	address := map[string]any{"type": "fd", "data": map[string]string{"str": id}}
	if err := m.execute(ctx, "chardev-add", map[string]any{
		"id": id, "backend": map[string]any{"type": "socket", "data": map[string]any{"addr": address, "server": false}},
	}, nil); err != nil {
		return err
	}
	err = m.execute(ctx, "device_add", map[string]any{
		"driver": "vhost-user-fs-pci", "id": id, "chardev": id, "tag": tag, "queue-size": 256, "bus": shelf(0),
	}, nil)
	if err != nil {
		_ = m.execute(ctx, "chardev-remove", map[string]string{"id": id}, nil)
	}
	return err
}

// AttachNetwork gives the guest its i-th network device.
func (m *monitor) AttachNetwork(ctx context.Context, i int, tap *os.File) error {
	m.plugging.Lock()
	defer m.plugging.Unlock()
	id := fmt.Sprintf("net%d", i)
	if err := m.execute(ctx, "getfd", map[string]string{"fdname": id}, nil, tap); err != nil {
		return err
	}
	err := m.execute(ctx, "netdev_add", map[string]any{"type": "tap", "id": id, "fd": id, "vhost": false}, nil)
	if err != nil {
		return err
	}
	return m.execute(ctx, "device_add", map[string]string{
		"driver": "virtio-net-pci", "id": fmt.Sprintf("nic%d", i), "netdev": id, "mac": deviceMAC(i).String(),
		"bus": shelf(i), "romfile": "", "disable-legacy": "on",
	}, nil)
}
