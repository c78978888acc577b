package alone

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/unixsock"
)

// Bounds of what goes over a line.
const (
	maxParcel      = 32 << 10 // bytes of one message: the kernel cuts longer ones
	maxParcelFiles = 2
	maxUnread      = 16 << 10 // read from a client and not used yet
	parcelSpent    = 256      // clients in one message
	linePatience   = 2 * time.Second
	linePause      = time.Millisecond
)

// parcel is one message on a line. It has one of these.
type parcel struct {
	Session *sessionState `json:"session,omitempty"` // with its socket
	Stream  *streamState  `json:"stream,omitempty"`  // with its two sockets, the client's first
	Calls   *callsState   `json:"calls,omitempty"`   // with its socket
	Tally   tallies       `json:"tally,omitempty"`   // to be added

	Limit string  `json:"limit,omitempty"`
	Spent []spent `json:"spent,omitempty"` // of the buckets of Limit
}

// sessionState is a connection of HTTP/1 between two requests.
type sessionState struct {
	Listener string         `json:"listener"` // key
	Client   netip.AddrPort `json:"client"`
	Local    netip.AddrPort `json:"local"`
	Used     bool           `json:"used,omitempty"`   // it has had a request
	Unread   []byte         `json:"unread,omitempty"` // of the next
}

// streamState is a connection whose bytes go to a server as they are. None is on its
// way.
type streamState struct {
	Listener   string         `json:"listener"` // key
	Source     netip.AddrPort `json:"source"`
	Upstream   string         `json:"upstream"`
	Endpoint   string         `json:"endpoint"` // address
	Idle       time.Duration  `json:"idle"`
	FromClient bool           `json:"from_client,omitempty"` // nothing more comes
	FromServer bool           `json:"from_server,omitempty"`
}

// callsState is a connection of bolt or Dubbo on which no call is under way.
type callsState struct {
	Listener string         `json:"listener"` // key
	Protocol string         `json:"protocol"`
	Client   netip.AddrPort `json:"client"`
	Unread   []byte         `json:"unread,omitempty"`
}

// spent is what a client has used up of a rate.
type spent struct {
	Client   netip.Addr `json:"client"`
	Requests int        `json:"requests"`
}

// parseParcel reads a message, strictly.
func parseParcel(b []byte, files int) (*parcel, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var m parcel
	if err := d.Decode(&m); err != nil {
		return nil, fmt.Errorf("parse what is handed on: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("parse what is handed on: trailing data")
	}
	want := 0
	if s := m.Session; s != nil {
		want++
		if len(s.Unread) > maxUnread {
			return nil, fmt.Errorf("parse what is handed on: %d bytes unread; at most %d", len(s.Unread), maxUnread)
		}
		if !s.Client.IsValid() || !s.Local.IsValid() {
			return nil, errors.New("parse what is handed on: a connection without addresses")
		}
	}
	if s := m.Stream; s != nil {
		want += 2
		if !s.Source.IsValid() {
			return nil, errors.New("parse what is handed on: a connection without an address")
		}
	}
	if s := m.Calls; s != nil {
		want++
		if !s.Client.IsValid() || len(s.Unread) > maxUnread {
			return nil, errors.New("parse what is handed on: a connection without an address, or with too much unread")
		}
	}
	for _, s := range m.Spent {
		if s.Requests < 0 {
			return nil, errors.New("parse what is handed on: less than nothing is spent")
		}
	}
	if want > maxParcelFiles || files != want || m.Session != nil && m.Calls != nil {
		return nil, fmt.Errorf("parse what is handed on: %d files; want %d", files, want)
	}
	return &m, nil
}

// line is one end of it.
type line struct {
	conn *net.UnixConn

	mu     sync.Mutex
	broken atomic.Bool // no more goes over it
}

func lineOf(f *os.File) (*line, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("open line: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("open line: it is no Unix socket")
	}
	return &line{conn: u}, nil
}

// whole says whether nothing has failed on it yet.
func (l *line) whole() bool { return !l.broken.Load() }

var errLine = errors.New("the process that has taken over is not reached any more")

// send gives a parcel with descriptors, which stay the caller's. After an error the
// other process has nothing of it.
func (l *line) send(m *parcel, fds ...int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxParcel {
		return fmt.Errorf("hand on: %d bytes; at most %d", len(b), maxParcel)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken.Load() {
		return errLine
	}
	until := time.Now().Add(linePatience)
	for {
		l.conn.SetWriteDeadline(until)
		_, _, err = l.conn.WriteMsgUnix(b, oob, nil)
		if !errors.Is(err, unix.ETOOMANYREFS) || time.Now().After(until) { // as many descriptors are on their way as the kernel lets
			break
		}
		time.Sleep(linePause)
	}
	if err != nil {
		l.broken.Store(true)
		return fmt.Errorf("hand on: %w", err)
	}
	return nil
}

// receive waits for a parcel. The files are the caller's.
func (l *line) receive(in *unixsock.Inbox) (m *parcel, files []*os.File, err error) {
	b, files, err := in.Receive(l.conn)
	if err == nil {
		m, err = parseParcel(b, len(files))
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, nil, err
	}
	return m, files, nil
}
