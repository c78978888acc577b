package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

func isEnd(err error) bool { return errors.Is(err, io.EOF) }

// followed is something of the host whose copy in the guest is kept up to date.
type followed interface {
	events() uint32
	refresh(ctx context.Context, g Guest) error
}

const (
	// A change is pushed when nothing has happened for settle, but after most
	// at the latest.
	settle = 20 * time.Millisecond
	most   = 200 * time.Millisecond
	// One that failed is tried again, less and less often.
	firstRetry, lastRetry = 250 * time.Millisecond, 30 * time.Second
	pushTime              = 30 * time.Second
)

// follower hears of changes on the host and pushes them, one after the other.
type follower struct {
	guest  Guest
	log    *slog.Logger
	notify *os.File // inotify
	fd     int

	heard  chan int32 // watch descriptors; -1: any
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu      sync.Mutex
	watches map[int32]followed
	busy    followed // being refreshed
	idle    sync.Cond
}

// watch begins to follow what an O_PATH file stands for.
func (p *Pod) watch(f *os.File, what followed) error {
	if p.follow == nil {
		n, err := newFollower(p.conf)
		if err != nil {
			return err
		}
		p.follow = n
	}
	return p.follow.add(f, what)
}

func newFollower(c Config) (*follower, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := &follower{
		guest: c.Guest, log: c.Log, notify: os.NewFile(uintptr(fd), "inotify"), fd: fd,
		heard: make(chan int32), cancel: cancel, watches: map[int32]followed{},
	}
	n.idle.L = &n.mu
	n.done.Go(func() { n.listen(ctx) })
	n.done.Go(func() { n.push(ctx) })
	return n, nil
}

func (n *follower) add(f *os.File, what followed) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	wd, err := unix.InotifyAddWatch(n.fd, "/proc/self/fd/"+strconv.Itoa(int(f.Fd())), what.events())
	if err != nil {
		return os.NewSyscallError("inotify_add_watch", err)
	}
	n.watches[int32(wd)] = what
	return nil
}

// forget stops following. When it returns, nothing is pushed of it any more.
func (n *follower) forget(what followed) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for wd, w := range n.watches {
		if w == what {
			delete(n.watches, wd)
			_, _ = unix.InotifyRmWatch(n.fd, uint32(wd)) // it may be gone with its file
		}
	}
	for n.busy == what {
		n.idle.Wait()
	}
}

func (n *follower) close() error {
	n.cancel()
	err := n.notify.Close()
	n.done.Wait()
	return err
}

// listen tells push what the kernel says.
func (n *follower) listen(ctx context.Context) {
	buf := make([]byte, 16<<10)
	for {
		got, err := n.notify.Read(buf)
		if err != nil {
			return // closed
		}
		for b := buf[:got]; len(b) >= unix.SizeofInotifyEvent; {
			wd, mask, size := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:]), int(binary.NativeEndian.Uint32(b[12:]))
			b = b[min(len(b), unix.SizeofInotifyEvent+size):]
			if mask&unix.IN_Q_OVERFLOW != 0 {
				wd = -1
			}
			select {
			case n.heard <- wd:
			case <-ctx.Done():
				return
			}
		}
	}
}

// push refreshes what has changed once it has settled.
func (n *follower) push(ctx context.Context) {
	changed := map[followed]bool{}
	var due, latest time.Time
	wait := firstRetry
	for {
		var timer <-chan time.Time
		if len(changed) > 0 {
			timer = time.After(time.Until(due))
		}
		select {
		case <-ctx.Done():
			return
		case wd := <-n.heard:
			now := time.Now()
			if len(changed) == 0 {
				latest = now.Add(most)
			}
			n.note(wd, changed)
			if due = now.Add(settle); due.After(latest) {
				due = latest
			}
		case <-timer:
			if n.refreshAll(ctx, changed) {
				wait = firstRetry
				continue
			}
			due = time.Now().Add(wait)
			latest = due
			wait = min(2*wait, lastRetry)
		}
	}
}

func (n *follower) note(wd int32, changed map[followed]bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if w, ok := n.watches[wd]; ok {
		changed[w] = true
	}
	if wd < 0 { // some were lost
		for _, w := range n.watches {
			changed[w] = true
		}
	}
}

// refreshAll says whether nothing is left to be done.
func (n *follower) refreshAll(ctx context.Context, changed map[followed]bool) bool {
	for w := range changed {
		if !n.begin(w) {
			delete(changed, w)
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, pushTime)
		err := w.refresh(ctx, n.guest)
		cancel()
		n.end()
		if err != nil {
			if ctx.Err() == nil {
				n.log.Warn("a volume's change did not reach the guest", "cause", err)
			}
			continue
		}
		delete(changed, w)
	}
	return len(changed) == 0
}

// begin says whether w is still followed.
func (n *follower) begin(w followed) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, x := range n.watches {
		if x == w {
			n.busy = w
			return true
		}
	}
	return false
}

func (n *follower) end() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.busy = nil
	n.idle.Broadcast()
}
