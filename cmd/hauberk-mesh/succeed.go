package main

import (
	"fmt"
	"log/slog"
	"net"
	"os"
)

// somebody says whether a process listens at path.
func somebody(path string) bool {
	c, err := net.Dial("unixpacket", path)
	if err != nil {
		return false
	}
	c.Close() // which it takes for one that has failed
	return true
}

// tellSupervisor says that this process serves, to who has asked for it in the way of
// systemd.
func tellSupervisor(log *slog.Logger) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err == nil {
		_, err = fmt.Fprintf(c, "READY=1\nMAINPID=%d\n", os.Getpid())
		c.Close()
	}
	if err != nil {
		log.Warn("tell the supervisor", "err", err)
	}
}
