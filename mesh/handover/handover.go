// Package handover is the conversation in which one process gives its live
// connections to another that takes its place.
//
// It knows nothing of connections: it carries plain data with descriptors, and
// keeps one promise. At each moment exactly one of the two may use them, also
// when the other is killed, stops, or says what it should not. Until the new
// process has said that it goes on, the old one goes on with what it held.
package handover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Version of the conversation and of what is handed over. It rises with every
// change that the version before would misread, and then a process gives to, and
// takes from, those it still knows: the newest that both do.
//
//	1  2026-11: first.
//	2  2026-11: a connection of a guest to a service may stand within a request of
//	   its server, of which some is held or the rest is to be dropped.
//	3  2026-11: a link may be one end of a pair of Unix sockets.
const (
	Version = 3
	Oldest  = 1 // that is still taken
	least   = 2 // that is still given: version 1 would leave requests of servers half judged
)

// Bounds of a load.
const (
	MaxFiles = 128      // descriptors of one item
	maxItem  = 64 << 20 // bytes of one item
	maxLoad  = 1 << 30  // bytes of all
	maxItems = 1 << 20
	maxKind  = 64 // bytes of a kind
)

// patience is how long one side waits for a word of the other. While it lasts
// nothing moves, so it is short.
const patience = 10 * time.Second

// parting is how long a refusal waits for room.
const parting = time.Second

// Load is all that is handed over.
type Load struct {
	Version int
	Items   []Item
}

// Item is one thing: what it is, what it is made of, its descriptors. Body holds
// secrets, so an Item shows it to nobody who prints it.
type Item struct {
	Kind  string
	Body  json.RawMessage
	Files []*os.File
}

// String names the item.
func (i Item) String() string {
	return fmt.Sprintf("[%.64q, %d bytes, %d files]", i.Kind, len(i.Body), len(i.Files))
}

// Format is String, whatever the verb.
func (i Item) Format(f fmt.State, _ rune) { io.WriteString(f, i.String()) }

// LogValue is String.
func (i Item) LogValue() slog.Value { return slog.StringValue(i.String()) }

// MarshalJSON is String: what is handed over goes another way.
func (i Item) MarshalJSON() ([]byte, error) { return json.Marshal(i.String()) }

// forget overwrites what the items hold.
func (l *Load) forget() {
	for _, i := range l.Items {
		clear(i.Body)
	}
}

func (l *Load) close() {
	for _, i := range l.Items {
		closeAll(i.Files)
	}
}

// Give hands over to who has connected, who must be of this process's user or
// root. hold stops everything and returns it, as a load of the version it is given;
// it is called once it is known that the two understand each other. Then either back is called, to go on with what
// was held, and Give returns an error, or gone, and it returns nil. The load's
// bodies are overwritten after that. The socket is closed in any case.
func Give(ctx context.Context, socket *net.UnixConn, hold func(version int) (*Load, error), back func(*Load) error, gone func(*Load)) error {
	g := &giver{conn: newConn(ctx, socket), hold: hold, back: back, gone: gone, patience: patience}
	return g.give()
}

// Take asks the process that listens at path for its place. build makes
// everything of the load and starts nothing; start is called once the other has
// let go. If Take returns an error nothing was started, and what build has made
// must not be used: the other goes on with it. From start on the files are the
// builder's.
func Take(ctx context.Context, path string, build func(*Load) (start func(), err error)) error {
	dialer := net.Dialer{Timeout: patience}
	c, err := dialer.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	t := &taker{conn: newConn(ctx, c.(*net.UnixConn)), build: build, patience: patience}
	return t.take()
}

// trusted fails unless the other end is of this process's user, or root.
func trusted(socket *net.UnixConn) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var who *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { who, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(cerr, err); err != nil {
		return fmt.Errorf("ask who is there: %w", err)
	}
	return admit(int(who.Uid), os.Geteuid())
}

func admit(peer, own int) error {
	if peer != 0 && peer != own {
		return fmt.Errorf("user %d is there; want %d or root", peer, own)
	}
	return nil
}
