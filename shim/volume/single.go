package volume

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
)

const (
	// singlesDir of the guest holds all files that are mounted alone.
	singlesDir   = "files"
	singlesBytes = 16 << 20
	// maxReturned is the most that a container may leave for the host.
	maxReturned = 64 << 10
)

// singles are the files that are mounted alone.
type singles struct {
	byPath map[string]*single
	free   []string // names whose files no container has any more
}

// single is a file of the host and its copy in the guest.
type single struct {
	path  string
	name  string
	file  *os.File // O_PATH
	back  bool     // the container's text goes to the host
	users int

	mu   sync.Mutex
	last [sha256.Size]byte // of what was pushed
}

func (p *Pod) addSingle(ctx context.Context, container string, s *source) (string, error) {
	f, ok := p.byPath[s.path]
	if !ok {
		var err error
		if f, err = p.newSingle(ctx, s); err != nil {
			return "", err
		}
	}
	f.users++
	p.users[container] = append(p.users[container], &use{single: f})
	return singlesDir + "/" + f.name, nil
}

func (p *Pod) newSingle(ctx context.Context, s *source) (*single, error) {
	if !p.made {
		if err := p.conf.Guest.MakeDir(ctx, guestproto.Dir{Name: singlesDir, Bytes: singlesBytes, Mode: 0o755}); err != nil {
			return nil, err
		}
		p.made = true
	}
	file, err := reopen(s.file, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	f := &single{path: s.path, file: file, back: s.kind == kindReturned}
	if n := len(p.free); n > 0 {
		f.name, p.free = p.free[n-1], p.free[:n-1]
	} else {
		f.name = "f" + strconv.Itoa(len(p.byPath))
	}
	if !f.back {
		err = p.watch(f.file, f)
	}
	if err == nil {
		err = f.refresh(ctx, p.conf.Guest)
	}
	if err != nil {
		if p.follow != nil {
			p.follow.forget(f)
		}
		p.free = append(p.free, f.name)
		return nil, errors.Join(err, file.Close())
	}
	p.byPath[s.path] = f
	return f, nil
}

// drop lets go of a file. Its name is used again.
func (p *Pod) drop(f *single) {
	if f.users--; f.users > 0 {
		return
	}
	if p.follow != nil {
		p.follow.forget(f)
	}
	_ = f.file.Close()
	delete(p.byPath, f.path)
	p.free = append(p.free, f.name)
}

func (f *single) events() uint32 { return unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB }

// refresh pushes the file if it is not what was pushed last.
func (f *single) refresh(ctx context.Context, g Guest) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	data, st, err := readWhole(f.file, maxSingle)
	if err != nil {
		return err
	}
	h := sha256.New()
	fmt.Fprintln(h, st.Mode, st.Uid, st.Gid)
	h.Write(data)
	sum := [sha256.Size]byte(h.Sum(nil))
	if sum == f.last {
		return nil
	}
	err = g.Push(ctx, singlesDir, "", []guestproto.PushFile{{
		Path: f.name, Mode: st.Mode & 0o777, UID: st.Uid, GID: st.Gid, Data: data,
	}})
	if err == nil {
		f.last = sum
	}
	return err
}

// giveBack writes to the host what the container left in its copy. The file is
// the one that was opened when the container was made, whatever has its name
// now.
func (p *Pod) giveBack(ctx context.Context, f *single) error {
	if !f.back {
		return nil
	}
	fail := func(err error) error { return fmt.Errorf("bring %q back: %w", f.path, err) }
	data, err := p.conf.Guest.Pull(ctx, singlesDir, f.name)
	if err != nil {
		return fail(err)
	}
	old, _, err := readWhole(f.file, maxReturned)
	if err == nil && bytes.Equal(old, data) {
		return nil
	}
	out, err := reopen(f.file, unix.O_WRONLY|unix.O_TRUNC)
	if err != nil {
		return fail(err)
	}
	_, err = out.Write(data[:min(len(data), maxReturned)])
	if err = errors.Join(err, out.Close()); err != nil {
		return fail(err)
	}
	return nil
}

// reopen opens what an O_PATH file stands for.
func reopen(f *os.File, flags int) (*os.File, error) {
	if flags == unix.O_PATH {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), f.Name()), nil
	}
	out, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(int(f.Fd())), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, cause(err)
	}
	return out, nil
}

// readWhole reads a file of at most so many bytes.
func readWhole(path *os.File, most int64) (data []byte, st unix.Stat_t, err error) {
	f, err := reopen(path, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, st, err
	}
	defer f.Close()
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, st, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, st, errors.New("it is no regular file")
	}
	data, err = io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("it has more than %d bytes", most)
	}
	return data, st, err
}
