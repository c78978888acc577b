package handover

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/unixsock"
)

const (
	maxMessage = 32 << 10 // bytes of a message
	maxBatch   = 100      // items of a message: their list fits in it
	wantBatch  = 4 << 20  // bytes of bodies after which a message goes
	maxReason  = 1 << 10
)

// word is what a message says.
type word string

// The words, in the order of the conversation. Hello to More and Ready, Refused
// and Going are the new process's; the old one's are Welcome, Items, End and Go;
// either may refuse.
const (
	wordHello   word = "hello"
	wordWelcome word = "welcome"
	wordItems   word = "items" // with the items' descriptors, and a memfd of their bodies
	wordMore    word = "more"  // the answer to it
	wordEnd     word = "end"
	wordReady   word = "ready"
	wordGo      word = "go"
	wordGoing   word = "going" // from here on everything is the new process's
	wordRefused word = "refused"
)

// message is one message. Each says its version: the newest there is, until the two
// have agreed.
type message struct {
	Version int  `json:"version"`
	Word    word `json:"word"`
	// Oldest and Newest version that the new process takes.
	Oldest int    `json:"oldest,omitempty"`
	Newest int    `json:"newest,omitempty"`
	Items  []size `json:"items,omitempty"`
	Count  int    `json:"count,omitempty"` // of all items
	Reason string `json:"reason,omitempty"`
}

// size is an item without what it holds.
type size struct {
	Kind  string `json:"kind"`
	Bytes int    `json:"bytes"`
	Files int    `json:"files"`
}

// parse reads one message, strictly.
func parse(b []byte, files int) (*message, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var m message
	if err := d.Decode(&m); err != nil {
		return nil, fmt.Errorf("parse message: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("parse message: trailing data")
	}
	want, total := 0, 0
	for _, i := range m.Items {
		if i.Kind == "" || len(i.Kind) > maxKind || i.Files < 0 || i.Files > MaxFiles || i.Bytes < 0 || i.Bytes > maxItem {
			return nil, errors.New("parse message: an item is out of bounds")
		}
		want += i.Files
		total += i.Bytes
	}
	switch {
	case m.Word == wordItems && (len(m.Items) == 0 || len(m.Items) > maxBatch || total > maxItem+wantBatch):
		return nil, fmt.Errorf("parse message: %d items of %d bytes", len(m.Items), total)
	case m.Word == wordItems:
		want++ // the bodies
	case len(m.Items) > 0:
		return nil, fmt.Errorf("parse message: items with %q", m.Word)
	case m.Count < 0 || m.Count > maxItems:
		return nil, fmt.Errorf("parse message: %d items in all", m.Count)
	}
	if files != want {
		return nil, fmt.Errorf("parse message: %d files with %q, want %d", files, m.Word, want)
	}
	return &m, nil
}

// conn is one end of the conversation.
type conn struct {
	ctx    context.Context // of the conversation
	socket *net.UnixConn
	in     *unixsock.Inbox
	agreed int        // version
	met    func(word) // told of each word before it is said and when it is heard; for tests
}

func newConn(ctx context.Context, socket *net.UnixConn) *conn {
	return &conn{ctx: ctx, socket: socket, agreed: Version, met: func(word) {}, in: unixsock.NewInbox(maxMessage, MaxFiles+1)}
}

// during has the end of the context wake who waits, until stop is called.
func (c *conn) during() (stop func() bool) {
	return context.AfterFunc(c.ctx, func() { c.socket.SetDeadline(time.Unix(1, 0)) })
}

func (c *conn) send(wait time.Duration, m *message, files ...*os.File) error {
	m.Version = c.agreed
	m.Reason = m.Reason[:min(len(m.Reason), maxReason)]
	b, err := json.Marshal(m)
	if err == nil && len(b) > maxMessage {
		err = fmt.Errorf("%d bytes, at most %d fit", len(b), maxMessage)
	}
	if err == nil {
		c.met(m.Word)
		c.socket.SetWriteDeadline(time.Now().Add(wait))
		err = c.ctx.Err() // before this, or else the deadline is moved once more
	}
	if err == nil {
		err = unixsock.Send(c.socket, b, files...)
	}
	if err != nil {
		return fmt.Errorf("say %q: %w", m.Word, err)
	}
	return nil
}

// receive waits for one message. The files are the caller's.
func (c *conn) receive(wait time.Duration) (m *message, files []*os.File, err error) {
	c.socket.SetReadDeadline(time.Now().Add(wait))
	if err := c.ctx.Err(); err != nil {
		return nil, nil, err
	}
	body, files, err := c.in.Receive(c.socket)
	switch {
	case err == io.EOF:
		err = errors.New("the other process is gone")
	case err == nil:
		if m, err = parse(body, len(files)); err == nil && m.Word == wordRefused {
			err = fmt.Errorf("refused: %.1024q", m.Reason)
		}
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	c.met(m.Word)
	return m, files, nil
}

// expect waits for one word, without files.
func (c *conn) expect(wait time.Duration, w word) (*message, error) {
	m, files, err := c.receive(wait)
	if err == nil && m.Word != w {
		closeAll(files)
		err = fmt.Errorf("it says %.32q", m.Word)
	}
	if err != nil {
		return nil, fmt.Errorf("wait for %q: %w", w, err)
	}
	return m, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_SEAL

// sealedIn puts bodies into memory that has no name, is in no dump of a file
// system, and changes no more.
func sealedIn(items []Item) (*os.File, error) {
	fd, err := unix.MemfdCreate("handover", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "handover")
	for _, i := range items {
		if _, err = f.Write(i.Body); err != nil {
			break
		}
	}
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("fill memory: %w", err)
	}
	return f, nil
}

// sealedOut reads bodies back. Only sealed memory is read: anything else could
// change meanwhile, or never end.
func sealedOut(f *os.File, sizes []size) ([]json.RawMessage, error) {
	have, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || have&seals != seals {
		return nil, errors.New("the bodies are not in sealed memory")
	}
	total := 0
	for _, s := range sizes {
		total += s.Bytes
	}
	if info, err := f.Stat(); err != nil || info.Size() != int64(total) {
		return nil, fmt.Errorf("the bodies are not %d bytes", total)
	}
	out := make([]json.RawMessage, len(sizes))
	at := int64(0)
	for i, s := range sizes {
		out[i] = make(json.RawMessage, s.Bytes)
		if _, err := f.ReadAt(out[i], at); err != nil {
			return nil, fmt.Errorf("read bodies: %w", err)
		}
		at += int64(s.Bytes)
	}
	return out, nil
}
