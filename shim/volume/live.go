package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
)

// Bounds of a directory that is pushed: the API server lets a secret or config
// map have 1 MiB, and a projected volume holds several.
const (
	maxLiveBytes = 8 << 20
	maxLiveFiles = 4096
	maxLiveDepth = 16
	// liveRoom is the guest's: the old view and the new one, and their nodes.
	liveRoom = 3*maxLiveBytes + maxLiveFiles*4096
)

// current is the link that kubelet swaps to publish a new view of a volume.
const current = "..data"

// live is a directory of the host that kubelet keeps up to date, and its copy
// in the guest.
type live struct {
	dir  string   // of the guest
	file *os.File // O_PATH, of the host's

	mu    sync.Mutex
	stamp string // of the view that was pushed last
	count int    // of views that have no stamp of kubelet's
}

func (p *Pod) addLive(ctx context.Context, s *source) (string, error) {
	name, isNew, err := p.dir(ctx, s.path, guestproto.Dir{Bytes: liveRoom, Files: 4 * maxLiveFiles, Mode: s.stat.Mode & 0o7777, UID: s.stat.Uid, GID: s.stat.Gid})
	if err != nil || !isNew {
		return name, err
	}
	file, err := reopen(s.file, unix.O_PATH)
	if err != nil {
		return "", err
	}
	l := &live{dir: name, file: file}
	// First the watch, then the first look: nothing is missed in between.
	if err = p.watch(file, l); err == nil {
		err = l.refresh(ctx, p.conf.Guest)
	}
	if err != nil {
		if p.follow != nil {
			p.follow.forget(l)
		}
		// The guest has a directory of this name now; the next try makes another.
		p.dirs[s.path+"\x00"+name] = name
		delete(p.dirs, s.path)
		return "", errors.Join(err, file.Close())
	}
	p.lives = append(p.lives, l)
	return name, nil
}

func (l *live) events() uint32 {
	return unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_CREATE | unix.IN_DELETE | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB
}

// stampPattern is what a view's directory may be called in the guest.
var stampPattern = regexp.MustCompile(`^\.\.[A-Za-z0-9_~-][A-Za-z0-9._~-]{0,120}$`)

// maxLooks is how often a view may be replaced while it is read.
const maxLooks = 16

// refresh pushes the view that kubelet shows now, if it is not the last one.
func (l *live) refresh(ctx context.Context, g Guest) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	dir, err := reopen(l.file, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	for range maxLooks {
		stamp, err := readLink(dir, current)
		switch {
		case err == unix.ENOENT && l.stamp != "":
			return nil // kubelet takes the volume away: the last view stays
		case err == unix.ENOENT:
			return l.pushPlain(ctx, g, dir)
		case err != nil:
			return fmt.Errorf("read link %s: %w", current, err)
		case stamp == l.stamp:
			return nil
		}
		files, err := look(dir, stamp)
		// A view that was replaced may be half gone by now: look again.
		if again, err2 := readLink(dir, current); err2 != nil || again != stamp {
			continue
		}
		if err != nil {
			return err
		}
		name := stamp
		if !stampPattern.MatchString(stamp) {
			name = l.invent()
		}
		// A view that is there got there by a push whose answer was lost: it
		// takes its name when it is whole.
		if err := g.Push(ctx, l.dir, name, files); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		l.stamp = stamp
	}
	return errors.New("it changes faster than it can be read")
}

// pushPlain pushes a directory that has no views: a part of a volume, which
// kubelet does not change.
func (l *live) pushPlain(ctx context.Context, g Guest, dir *os.File) error {
	files, err := look(dir, ".")
	if err != nil {
		return err
	}
	return g.Push(ctx, l.dir, l.invent(), files)
}

func (l *live) invent() string {
	l.count++
	return "..view-" + strconv.Itoa(l.count)
}

func readLink(dir *os.File, name string) (string, error) {
	var buf [256]byte
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf[:])
	if err != nil {
		return "", err
	}
	if n == len(buf) || n == 0 || strings.ContainsRune(string(buf[:n]), '/') {
		return "", errors.New("it leads out of its directory")
	}
	return string(buf[:n]), nil
}

// look reads the files of one view. Symbolic links in it are not followed, and
// there is nothing else but directories and files.
func look(dir *os.File, view string) (files []guestproto.PushFile, err error) {
	fd, err := beneath(dir, view, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer fd.Close()
	left := int64(maxLiveBytes)
	err = walk(fd, "", 0, func(name string, f *os.File) error {
		if len(files) == maxLiveFiles {
			return fmt.Errorf("it has more than %d files", maxLiveFiles)
		}
		data, st, err := readWhole(f, left)
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		left -= int64(len(data))
		files = append(files, guestproto.PushFile{Path: name, Mode: st.Mode & 0o777, UID: st.Uid, GID: st.Gid, Data: data})
		return nil
	})
	return files, err
}

// walk calls f with all regular files, opened O_PATH, in order of their names.
func walk(dir *os.File, at string, depth int, f func(name string, file *os.File) error) error {
	if depth == maxLiveDepth {
		return fmt.Errorf("%q: it nests deeper than %d", at, maxLiveDepth)
	}
	entries, err := dir.ReadDir(maxLiveFiles + 1)
	if err != nil && len(entries) == 0 && !isEnd(err) {
		return err
	}
	if len(entries) > maxLiveFiles {
		return fmt.Errorf("%q: it has more than %d entries", at, maxLiveFiles)
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		name := path.Join(at, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), ".."): // kubelet's own
		case e.IsDir():
			err = visit(dir, e.Name(), unix.O_RDONLY|unix.O_DIRECTORY, func(sub *os.File) error { return walk(sub, name, depth+1, f) })
		case e.Type().IsRegular():
			err = visit(dir, e.Name(), unix.O_PATH, func(file *os.File) error { return f(name, file) })
		case e.Type()&os.ModeSymlink != 0 && depth == 0: // to the view
		default:
			err = fmt.Errorf("%q: it is neither a file nor a directory", name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func visit(dir *os.File, name string, flags int, f func(*os.File) error) error {
	file, err := beneath(dir, name, flags)
	if err != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	defer file.Close()
	return f(file)
}

// beneath opens one name of a directory, and no symbolic link.
func beneath(dir *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{
		Flags: uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW), Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, err
	}
	// The name is one that os finds entries of a directory by, too.
	return os.NewFile(uintptr(fd), "/proc/self/fd/"+strconv.Itoa(fd)), nil
}
