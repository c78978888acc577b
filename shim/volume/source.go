package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"

	"hauberk.dev/shim/oci"
)

// kind is how something of the host comes into a guest.
type kind int

const (
	kindShared   kind = iota // by the file server
	kindLive                 // kubelet keeps it up to date: pushed and followed
	kindScratch              // lives in the guest
	kindSingle               // a small file: pushed and followed
	kindReturned             // a small file that the container writes for the host
	kindDisk
	kindNode // a device that the guest's kernel has, too
)

// source is a path of the host, opened.
type source struct {
	kind
	file  *os.File // O_PATH
	path  string   // without symbolic links
	stat  unix.Stat_t
	limit uint64 // of a scratch volume; 0: none is said

	volume string // of a scratch volume: its directory
	below  string // where in it the source is
}

func (s *source) close() { _ = s.file.Close() }

// maxSingle is the most a file may have that is pushed.
const maxSingle = 1 << 20

var (
	kubeletVolume = regexp.MustCompile(`/pods/([^/]+)/volumes/kubernetes\.io~(configmap|secret|projected|downward-api|empty-dir)/([^/]+)(?:/(.+))?$`)
	kubeletLog    = regexp.MustCompile(`/pods/[^/]+/containers/[^/]+/[^/]+$`)
)

// ownFiles are a pod's, and no container's to change for another.
var ownFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// open opens a volume's source and says how it comes into the guest of a pod.
func open(v oci.Volume, pod string) (*source, error) {
	path, err := filepath.EvalSymlinks(v.Source)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("it is not there, or a symbolic link on the way leads nowhere: make it first")
	}
	if err != nil {
		return nil, cause(err)
	}
	// Whatever takes the name's place from here on is not followed.
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	s := &source{file: os.NewFile(uintptr(fd), path), path: path}
	if err := unix.Fstat(fd, &s.stat); err != nil {
		s.close()
		return nil, err
	}
	if err := s.judge(v, pod); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// cause is an error without the path, which the caller names.
func cause(err error) error {
	var e *fs.PathError
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}

func (s *source) judge(v oci.Volume, pod string) error {
	switch s.stat.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return s.judgeDir(v, pod)
	case unix.S_IFREG:
		small := s.stat.Size <= maxSingle
		switch {
		case small && (v.ReadOnly || slices.Contains(ownFiles, v.Target)):
			s.kind = kindSingle
		case s.stat.Size <= maxReturned && kubeletLog.MatchString(s.path):
			s.kind = kindReturned
		}
		return nil
	case unix.S_IFBLK:
		s.kind = kindDisk
		return nil
	case unix.S_IFCHR:
		if oci.InGuest(unix.Major(s.stat.Rdev), unix.Minor(s.stat.Rdev)) {
			s.kind = kindNode
			return nil
		}
	case unix.S_IFSOCK:
		return errors.New("it is a socket: a guest cannot reach a socket of the host")
	case unix.S_IFIFO:
		return errors.New("it is a pipe: a guest cannot reach a pipe of the host")
	}
	return fmt.Errorf("it is device %d:%d of the host, which is not in a guest", unix.Major(s.stat.Rdev), unix.Minor(s.stat.Rdev))
}

func (s *source) judgeDir(v oci.Volume, pod string) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(s.file.Fd()), &st); err != nil {
		return err
	}
	isMemory := int64(st.Type) == unix.TMPFS_MAGIC
	if v.Target == "/dev/shm" && filepath.Base(s.path) == "shm" && isMemory {
		s.kind, s.volume, s.limit = kindScratch, s.path, st.Blocks*uint64(st.Bsize)
		return nil
	}
	m := kubeletVolume.FindStringSubmatch(s.path)
	if m == nil {
		// A subPath is a mount, elsewhere, of a place below a volume.
		origin, err := originOf(s.path)
		if err != nil {
			return err
		}
		if m = kubeletVolume.FindStringSubmatch(origin); m == nil {
			return nil
		}
		s.path = origin
	}
	if m[2] != "empty-dir" {
		s.kind = kindLive
		return nil
	}
	if int64(st.Type) == unix.HUGETLBFS_MAGIC {
		return errors.New("it is of huge pages, which a sandbox has none of")
	}
	if pod != "" && m[1] != pod {
		return nil // what another pod has is no memory of this one
	}
	s.kind, s.below = kindScratch, m[4]
	s.volume = filepath.Clean(s.path[:len(s.path)-len(m[4])])
	if isMemory {
		s.limit = st.Blocks * uint64(st.Bsize)
	}
	return nil
}
