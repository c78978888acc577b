package vm

import (
	"io"
	"net"
	"os"
)

// maxConsole bounds each of the two files that hold what a guest printed.
const maxConsole = 64 << 10

// keepConsole copies what a guest prints to the log of its run directory until
// the connection ends. A guest may print without end: of each two halves the
// older is dropped. Nothing here may stop the copying, for then the guest
// would wait for its console; what cannot be written is lost.
func keepConsole(conn net.Conn, dir *RunDir) {
	name := dir.name(consoleLog)
	var size int64
	if fi, err := os.Stat(name); err == nil {
		size = fi.Size()
	}
	f, _ := dir.Create(consoleLog)
	defer func() { closeIfOpen(f) }()
	buf := make([]byte, 4096)
	for {
		n, err := conn.Read(buf)
		if size+int64(n) > maxConsole {
			closeIfOpen(f)
			_ = os.Rename(name, name+".1")
			f, _ = dir.Create(consoleLog)
			size = 0
		}
		if f != nil && n > 0 {
			_, _ = f.Write(buf[:n])
			size += int64(n)
		}
		if err != nil {
			return
		}
	}
}

func closeIfOpen(c io.Closer) {
	if f, ok := c.(*os.File); ok && f != nil {
		_ = f.Close()
	}
}
