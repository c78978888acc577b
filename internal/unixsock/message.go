package unixsock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Send sends a message with open files, which stay the caller's. On a stream the
// files are with its first byte.
func Send(conn *net.UnixConn, body []byte, files ...*os.File) error {
	var rights []byte
	if len(files) > 0 {
		fds, err := descriptors(files)
		if err != nil {
			return err
		}
		rights = unix.UnixRights(fds...)
	}
	_, _, err := conn.WriteMsgUnix(body, rights, nil)
	runtime.KeepAlive(files)
	return err
}

// descriptors are the numbers of files. Not by Fd, which makes a socket blocking: the
// other end has a duplicate of it, and a listener that turns blocking there holds
// whoever accepts, and whoever closes it, until somebody connects.
func descriptors(files []*os.File) ([]int, error) {
	fds := make([]int, len(files))
	for i, f := range files {
		raw, err := f.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { fds[i] = int(fd) })
		}
		if err != nil {
			return nil, err
		}
	}
	return fds, nil
}

// Inbox is room for one message with its files. One goroutine uses it at a time.
type Inbox struct {
	// Nonblock makes what is received non-blocking, for everybody who has it: sockets
	// are then waited for by the runtime's poller.
	Nonblock bool

	body, rights []byte
	files        int
}

// NewInbox has room for messages of at most so many bytes with so many files.
func NewInbox(bytes, files int) *Inbox {
	return &Inbox{body: make([]byte, bytes), rights: make([]byte, unix.CmsgSpace(4*files)), files: files}
}

// Receive waits for one message, or for some bytes of a stream. The body holds until
// the next call; the files are the caller's, and no program that it starts has them.
// io.EOF says that the other end is gone. Of a message that is larger than the room,
// or of which not all files have come, there is an error and nothing stays open.
func (i *Inbox) Receive(conn *net.UnixConn) (body []byte, files []*os.File, err error) {
	n, rights, flags, _, err := conn.ReadMsgUnix(i.body, i.rights)
	files, wrong := i.open(i.rights[:rights])
	switch {
	case errors.Is(err, io.EOF), err == nil && n == 0: // an empty message, whatever comes along, says no less
		err = io.EOF
	case err != nil:
	case wrong != nil:
		err = fmt.Errorf("receive message: %w", wrong)
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(files) > i.files:
		err = fmt.Errorf("receive message: longer than %d bytes or with more than %d files, or no descriptor is free", len(i.body), i.files)
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, nil, err
	}
	return i.body[:n], files, nil
}

// open gives the files of what the kernel says came along. It has them close on exec:
// ReadMsgUnix asks for that.
func (i *Inbox) open(rights []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	for m := range messages {
		fds, err := unix.ParseUnixRights(&messages[m])
		if err != nil {
			continue // of another kind
		}
		for _, fd := range fds {
			if i.Nonblock {
				unix.SetNonblock(fd, true)
			}
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, err
}
