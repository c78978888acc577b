package mesh

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/unixsock"
)

// sendTimeout bounds how long a peer may leave its socket full.
const sendTimeout = 10 * time.Second

// Conn carries messages with their files.
type Conn struct {
	socket *net.UnixConn
	large  int64 // bytes a message in a memfd may have; 0 takes none

	mu sync.Mutex // one sender at a time

	rmu sync.Mutex // one receiver at a time
	in  *unixsock.Inbox
}

// NewConn wraps a connected SOCK_SEQPACKET socket. Messages larger than
// MaxMessage are taken up to large bytes.
func NewConn(socket *net.UnixConn, large int64) *Conn {
	in := unixsock.NewInbox(MaxMessage, MaxFiles+1)
	in.Nonblock = true
	return &Conn{socket: socket, large: large, in: in}
}

// Close ends the connection; a blocked Receive returns.
func (c *Conn) Close() error { return c.socket.Close() }

// PeerUID is the user that the other end ran as when it connected.
func (c *Conn) PeerUID() (uid int, err error) {
	user, err := unixsock.User(c.socket)
	if err != nil {
		return -1, fmt.Errorf("ask for the peer's user: %w", err)
	}
	return int(user), nil
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
	c.mu.Lock()
	defer c.mu.Unlock()
	c.socket.SetWriteDeadline(time.Now().Add(sendTimeout))
	if err := unixsock.Send(c.socket, body, files...); err != nil {
		return fmt.Errorf("send %q: %w", m.Kind, err)
	}
	return nil
}

// Receive waits for one message. The files are the caller's. After an
// UnknownError more can be received.
func (c *Conn) Receive() (m *Message, files []*os.File, err error) {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	body, files, err := c.in.Receive(c.socket)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			closeAll(files)
			m, files = nil, nil
		}
	}()
	if m, err = Parse(body); err != nil {
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

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
