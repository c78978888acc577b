package mesh

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// sendTimeout bounds how long a peer may leave its socket full.
const sendTimeout = 10 * time.Second

// Conn carries messages with their files.
type Conn struct {
	socket *net.UnixConn
	large  int64 // bytes a message in a memfd may have; 0 takes none

	mu sync.Mutex // one sender at a time

	rmu  sync.Mutex // one receiver at a time
	body []byte
	oob  []byte
}

// NewConn wraps a connected SOCK_SEQPACKET socket. Messages larger than
// MaxMessage are taken up to large bytes.
func NewConn(socket *net.UnixConn, large int64) *Conn {
	return &Conn{socket: socket, large: large, body: make([]byte, MaxMessage), oob: make([]byte, unix.CmsgSpace(4*(MaxFiles+1)))}
}

// Close ends the connection; a blocked Receive returns.
func (c *Conn) Close() error { return c.socket.Close() }

// PeerUID is the user that the other end ran as when it connected.
func (c *Conn) PeerUID() (uid int, err error) {
	raw, err := c.socket.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = int(cred.Uid)
		}
	})
	if err = errors.Join(cerr, err); err != nil {
		return -1, fmt.Errorf("ask for the peer's user: %w", err)
	}
	return uid, nil
}

// Send sends one message. The files stay the caller's.
func (c *Conn) Send(m *Message, files ...*os.File) error {
	if err := m.Check(len(files)); err != nil {
		return err
	}
	body, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("send %q: %w", m.Kind, err)
	}
	if len(body) > MaxMessage {
		memory, err := sealed(body)
		if err != nil {
			return fmt.Errorf("send %q of %d bytes: %w", m.Kind, len(body), err)
		}
		defer memory.Close()
		files = append(files[:len(files):len(files)], memory)
		body, _ = json.Marshal(&Message{Kind: m.Kind, Seq: m.Seq, Large: true})
	}
	var oob []byte
	if len(files) > 0 {
		fds, err := Descriptors(files)
		if err != nil {
			return fmt.Errorf("send %q: %w", m.Kind, err)
		}
		oob = unix.UnixRights(fds...)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.socket.SetWriteDeadline(time.Now().Add(sendTimeout))
	_, _, err = c.socket.WriteMsgUnix(body, oob, nil)
	runtime.KeepAlive(files)
	if err != nil {
		return fmt.Errorf("send %q: %w", m.Kind, err)
	}
	return nil
}

// Descriptors are the numbers of open files, to be sent while they are kept open.
// Not by Fd, which makes a socket blocking: the other end has a duplicate of it, and a listener that turns
// blocking there holds whoever accepts, and whoever closes it, until somebody
// connects.
func Descriptors(files []*os.File) ([]int, error) {
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

// Receive waits for one message. The files are the caller's. After an
// UnknownError more can be received.
func (c *Conn) Receive() (m *Message, files []*os.File, err error) {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	n, oobn, flags, _, err := c.socket.ReadMsgUnix(c.body, c.oob)
	if errors.Is(err, io.EOF) || err == nil && n == 0 && oobn == 0 {
		err = io.EOF // an empty datagram is how SEQPACKET says the peer is gone
	}
	if oobn > 0 {
		files = received(c.oob[:oobn])
	}
	defer func() {
		if err != nil {
			closeAll(files)
			m, files = nil, nil
		}
	}()
	if err != nil {
		return nil, nil, err
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return nil, files, fmt.Errorf("receive: message longer than %d bytes or with more than %d files", MaxMessage, MaxFiles)
	}
	if m, err = Parse(c.body[:n]); err != nil {
		return nil, files, err
	}
	if m.Large {
		if len(files) == 0 {
			return nil, files, errors.New("receive: large message without its file")
		}
		last := files[len(files)-1]
		files = files[:len(files)-1]
		m, err = c.readLarge(m, last)
		last.Close()
		if err != nil {
			return nil, files, err
		}
	}
	return m, files, m.Check(len(files))
}

// readLarge reads the message out of a sealed memfd. Only such a file is read:
// a pipe in its place would block the reader for ever.
func (c *Conn) readLarge(small *Message, f *os.File) (*Message, error) {
	const want = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || seals&want != want {
		return nil, errors.New("receive: large message is not in sealed memory")
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil || size > c.large {
		return nil, fmt.Errorf("receive: large message of %d bytes, at most %d are taken", size, c.large)
	}
	body := make([]byte, size)
	if _, err := f.ReadAt(body, 0); err != nil {
		return nil, fmt.Errorf("receive: read large message: %w", err)
	}
	m, err := Parse(body)
	if u := (*UnknownError)(nil); errors.As(err, &u) && (u.Kind != small.Kind || u.Seq != small.Seq) {
		return nil, errors.New("receive: large message is not the one announced")
	}
	if err != nil {
		return nil, err
	}
	if m.Large || m.Kind != small.Kind || m.Seq != small.Seq {
		return nil, errors.New("receive: large message is not the one announced")
	}
	return m, nil
}

// Parse reads one message, strictly: unknown fields and trailing bytes are
// refused. Of a request that is sound but for that, the error is an UnknownError.
func Parse(body []byte) (*Message, error) {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	var m Message
	if err := d.Decode(&m); err != nil {
		return nil, unknown(body, fmt.Errorf("parse message: %w", err))
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("parse message: trailing data")
	}
	return &m, nil
}

// unknown is the error of a message that does not parse, for the reason given.
func unknown(body []byte, err error) error {
	var m struct {
		Kind Kind   `json:"kind"`
		Seq  uint64 `json:"seq"`
	}
	if json.Unmarshal(body, &m) != nil || m.Kind == "" || len(m.Kind) > maxName || m.Kind == KindAck {
		return err
	}
	return &UnknownError{m.Kind, m.Seq, err}
}

func sealed(body []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("mesh-message", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "mesh-message")
	_, err = f.Write(body)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func received(oob []byte) (files []*os.File) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.SetNonblock(fd, true) // sockets are to be waited for by the poller
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
