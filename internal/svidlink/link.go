package svidlink

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"hauberk.dev/internal/unixsock"
)

const (
	maxReaders   = 16               // at once
	messageTime  = 10 * time.Second // from the first byte of a message to its last
	answerTime   = 20 * time.Second // to take a set and say so
	againMin     = 50 * time.Millisecond
	againMax     = 2 * time.Second
	acceptPause  = 20 * time.Millisecond
	startPatient = time.Second // of a connection that has lasted
)

// Hub holds what there is and tells it to every reader. The zero Hub holds nothing
// and tells nothing before the first Put.
type Hub struct {
	mu      sync.Mutex
	set     *Set
	number  uint64        // of the set
	changed chan struct{} // closed when set is replaced
	readers map[*follower]struct{}
	told    chan struct{} // closed when a reader has answered or gone

	answerTime time.Duration // 0: answerTime
}

// Put replaces what there is. The set is the hub's from now on: its keys are
// cleared when the next comes. One that nobody would take changes nothing.
func (h *Hub) Put(s *Set) error {
	if err := s.check(); err != nil {
		s.Clear()
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.set != nil {
		h.set.Clear()
	}
	h.set = s
	h.number++
	if h.changed != nil {
		close(h.changed)
		h.changed = nil
	}
	return nil
}

// message is what there is, its number, and a channel that is closed when it is
// replaced.
func (h *Hub) message() (b []byte, number uint64, changed <-chan struct{}, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.changed == nil {
		h.changed = make(chan struct{})
	}
	if h.set == nil {
		return nil, h.number, h.changed, nil
	}
	b, err = h.set.Marshal()
	return b, h.number, h.changed, err
}

// follower is a reader: what it was sent, and what it has taken or refused.
type follower struct {
	sent []uint64 // numbers that it owes an answer to
	has  uint64
	why  string // it refused the last
}

// note changes what is known of a reader.
func (h *Hub) note(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
	if h.told != nil {
		close(h.told)
		h.told = nil
	}
}

// ErrRefused is why a reader has not taken what there is: asking it again changes
// nothing.
var ErrRefused = errors.New("refused")

// Taken waits until a reader is there, and every one has taken what there is. One
// that refuses it is an ErrRefused.
func (h *Hub) Taken(ctx context.Context) error {
	for {
		h.mu.Lock()
		late := 0
		for r := range h.readers {
			switch {
			case r.has < h.number:
				late++
			case r.why != "":
				h.mu.Unlock()
				return fmt.Errorf("hand identities over: %w: %s", ErrRefused, r.why)
			}
		}
		if h.told == nil {
			h.told = make(chan struct{})
		}
		told, nobody := h.told, len(h.readers) == 0
		h.mu.Unlock()
		if late == 0 && !nobody {
			return nil
		}
		select {
		case <-ctx.Done():
			if nobody {
				return fmt.Errorf("hand identities over: nobody asks for them: %w", ctx.Err())
			}
			return fmt.Errorf("hand identities over: %d have not answered: %w", late, ctx.Err())
		case <-told:
		}
	}
}

// Clear forgets the keys there are; nothing is told of it.
func (h *Hub) Clear() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.set != nil {
		h.set.Clear()
		h.set = nil
	}
}

// Serve tells processes of the same user until ctx ends, and closes ln.
func (h *Hub) Serve(ctx context.Context, ln *net.UnixListener, log *slog.Logger) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	defer ln.Close()
	room := make(chan struct{}, maxReaders)
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		c, err := ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			log.Warn("accept", "listener", "identities", "err", err)
			time.Sleep(acceptPause)
			continue
		}
		if err := unixsock.SameUser(c); err != nil {
			log.Error("refuse to hand keys over", "err", err)
			c.Close()
			continue
		}
		select {
		case room <- struct{}{}:
		default:
			log.Error("refuse to hand keys over: too many ask", "most", maxReaders)
			c.Close()
			continue
		}
		serving.Go(func() {
			defer func() { <-room }()
			if err := h.tell(ctx, c); err != nil {
				log.Warn("hand identities over", "err", err)
			}
		})
	}
}

// tell writes what there is to one reader, again whenever it changes. One that does
// not answer is left, as all wait for it; if it lives it comes again.
func (h *Hub) tell(ctx context.Context, c *net.UnixConn) (err error) {
	inner, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(inner, func() { c.Close() })
	defer stop()
	r := &follower{}
	h.note(func() {
		if h.readers == nil {
			h.readers = map[*follower]struct{}{}
		}
		h.readers[r] = struct{}{}
	})
	gone := make(chan error, 1)
	go func() {
		gone <- h.answers(c, r)
		cancel()
	}()
	defer func() {
		cancel()
		c.Close()
		if late := <-gone; errors.Is(late, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("a process that asked for them does not answer: %w", late)
		}
		h.note(func() { delete(h.readers, r) })
	}()
	for {
		b, number, changed, err := h.message()
		if err != nil {
			return err
		}
		if b != nil {
			h.note(func() {
				if r.sent = append(r.sent, number); len(r.sent) == 1 {
					c.SetReadDeadline(time.Now().Add(cmp.Or(h.answerTime, answerTime)))
				}
			})
			c.SetWriteDeadline(time.Now().Add(messageTime))
			_, err = c.Write(b)
			clear(b)
			if err != nil {
				return nil // it has gone, and comes again
			}
		}
		select {
		case <-inner.Done():
			return nil
		case <-changed:
		}
	}
}

var errNotAsked = errors.New("an answer to nothing")

// answers reads what a reader says to each set, until it has gone or says what was
// not asked.
func (h *Hub) answers(c net.Conn, r *follower) error {
	for {
		var b [2]byte
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return err
		}
		n := binary.BigEndian.Uint16(b[:])
		if n > maxText {
			return errNotAsked
		}
		why := make([]byte, n)
		if _, err := io.ReadFull(c, why); err != nil {
			return err
		}
		owed := true
		h.note(func() {
			if owed = len(r.sent) > 0; !owed {
				return
			}
			r.has, r.sent, r.why = r.sent[0], r.sent[1:], string(why)
			late := time.Time{}
			if len(r.sent) > 0 {
				late = time.Now().Add(cmp.Or(h.answerTime, answerTime))
			}
			c.SetReadDeadline(late)
		})
		if !owed {
			return errNotAsked
		}
	}
}

// Follow hands every set that comes over the socket at path to take, until ctx
// ends. away is told why there is no connection, nil when there is one. The set is
// take's: it clears the keys when it has read them. Its error is told to the other
// side.
func Follow(ctx context.Context, path string, take func(*Set) error, away func(error)) {
	wait := againMin
	for ctx.Err() == nil {
		began := time.Now()
		err := follow(ctx, path, take, away)
		if ctx.Err() != nil {
			return
		}
		away(err)
		if time.Since(began) > startPatient {
			wait = againMin
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, againMax)
	}
}

func follow(ctx context.Context, path string, take func(*Set) error, away func(error)) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("ask for identities: %w", err)
	}
	c := conn.(*net.UnixConn)
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if err := unixsock.SameUser(c); err != nil {
		return fmt.Errorf("ask for identities at %s: %w", path, err)
	}
	away(nil)
	for {
		var length [4]byte
		if _, err := io.ReadFull(c, length[:1]); err != nil {
			return fmt.Errorf("ask for identities at %s: the other side has ended: %w", path, err)
		}
		c.SetReadDeadline(time.Now().Add(messageTime))
		if _, err := io.ReadFull(c, length[1:]); err != nil {
			return fmt.Errorf("read identities: %w", err)
		}
		s, err := receive(c, length)
		if err != nil {
			return err
		}
		c.SetReadDeadline(time.Time{})
		if err := answer(c, take(s)); err != nil {
			return fmt.Errorf("answer the source of identities: %w", err)
		}
	}
}

// answer says that a set was taken, or why not: the length of the reason, and it.
func answer(c *net.UnixConn, err error) error {
	why := ""
	if err != nil {
		why = err.Error()
		why = why[:min(len(why), maxText)]
	}
	c.SetWriteDeadline(time.Now().Add(messageTime))
	_, werr := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(why))), why...))
	return werr
}
