package supervise

import (
	"errors"
	"fmt"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"
)

// User is who a program runs as.
type User struct{ UID, GID uint32 }

func (u User) credential() *syscall.Credential {
	return &syscall.Credential{Uid: u.UID, Gid: u.GID} // and no other group
}

// ParseUser reads "UID:GID".
func ParseUser(s string) (User, error) {
	uid, gid, ok := strings.Cut(s, ":")
	u, err := strconv.ParseUint(uid, 10, 32)
	g, err2 := strconv.ParseUint(gid, 10, 32)
	if !ok || err != nil || err2 != nil {
		return User{}, fmt.Errorf("parse user %q: want UID:GID, both numbers", s)
	}
	if u == 0 || g == 0 {
		return User{}, fmt.Errorf("parse user %q: the program is there to run without root", s)
	}
	return User{uint32(u), uint32(g)}, nil
}

// SystemUser finds a user of this machine by name and makes it if it is not
// there; made says which.
func SystemUser(name string) (u User, made bool, err error) {
	found, err := user.Lookup(name)
	if unknown := user.UnknownUserError(""); errors.As(err, &unknown) {
		if err := addUser(name); err != nil {
			return User{}, false, err
		}
		made = true
		found, err = user.Lookup(name)
	}
	if err != nil {
		return User{}, made, fmt.Errorf("look up user %s: %w", name, err)
	}
	u, err = ParseUser(found.Uid + ":" + found.Gid)
	return u, made, err
}

func addUser(name string) error {
	out, err := exec.Command("useradd", "--system", "--user-group", "--no-create-home",
		"--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", name).CombinedOutput()
	if err != nil {
		return fmt.Errorf("add user %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}
