package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// identity is as whom a program runs.
type identity struct {
	uid, gid uint32
	groups   []uint32
	home     string
}

// account resolves the user of a program in the container's own files.
func account(p *guestproto.Program) (identity, error) {
	passwd, err := accounts("/etc/passwd")
	if err != nil {
		return identity{}, err
	}
	group, err := accounts("/etc/group")
	if err != nil {
		return identity{}, err
	}
	if p.User == "" {
		who := identity{uid: p.UID, gid: p.GID, groups: p.Groups, home: "/"}
		if e, ok := entry(passwd, "", who.uid, 7); ok {
			who.home = e[5]
		}
		return who, nil
	}
	return resolve(p.User, passwd, group)
}

// accounts reads a file of accounts; an image need not have one.
func accounts(path string) ([]byte, error) {
	b, err := readAll(path, maxAccounts)
	if err == syscall.ENOENT || err == syscall.ENOTDIR {
		return nil, nil
	}
	if err != nil {
		return nil, fail("read", path, err)
	}
	return b, nil
}

// resolve understands "name", "name:group", "uid" and "uid:gid". A number need
// not be in the files; a name must.
func resolve(user string, passwd, group []byte) (identity, error) {
	name, groupName := cut(user, ':')
	who := identity{home: "/"}
	if name == "" {
		return who, fail("find user", strconv.Quote(user), syscall.EINVAL)
	}
	uid, numeric := parseID(name)
	e, known := entry(passwd, name, uid, 7)
	if numeric {
		who.uid = uid
		if !known || e[2] != name {
			e, known = entry(passwd, "", uid, 7)
		}
	} else if !known {
		return who, fail("find user", strconv.Quote(name), syscall.ENOENT)
	}
	if known {
		var ok [2]bool
		if who.uid, ok[0] = parseID(e[2]); !ok[0] {
			return who, fail("read uid of user", strconv.Quote(name), syscall.EINVAL)
		}
		if who.gid, ok[1] = parseID(e[3]); !ok[1] {
			return who, fail("read gid of user", strconv.Quote(name), syscall.EINVAL)
		}
		who.home = e[5]
	}
	if groupName != "" {
		gid, numeric := parseID(groupName)
		if !numeric {
			g, ok := entry(group, groupName, 0, 4)
			if !ok {
				return who, fail("find group", strconv.Quote(groupName), syscall.ENOENT)
			}
			if gid, ok = parseID(g[2]); !ok {
				return who, fail("read gid of group", strconv.Quote(groupName), syscall.EINVAL)
			}
		}
		who.gid = gid
		return who, nil // a group that is named is the only one
	}
	if known {
		who.groups = memberships(group, e[0])
	}
	return who, nil
}

// entry finds the line of an account by name or, if that is empty, by id, and
// splits it; a line with fewer than fields fields is none.
func entry(file []byte, name string, id uint32, fields int) (found [7]string, ok bool) {
	for len(file) > 0 {
		var line []byte
		line, file = nextLine(file)
		rest := string(line)
		var f [7]string
		n := 0
		for ; n < fields && rest != ""; n++ {
			f[n], rest = cut(rest, ':')
		}
		if n < min(fields-1, 6) { // the last may be empty
			continue
		}
		lineID, numeric := parseID(f[2])
		if name != "" && f[0] == name || name == "" && numeric && lineID == id {
			return f, true
		}
	}
	return found, false
}

// memberships gives the groups that list the user, at most 64.
func memberships(group []byte, user string) (ids []uint32) {
	for len(group) > 0 && len(ids) < 64 {
		var line []byte
		line, group = nextLine(group)
		_, rest := cut(string(line), ':')
		_, rest = cut(rest, ':')
		gid, members := cut(rest, ':')
		for members != "" {
			var m string
			m, members = cut(members, ',')
			if id, ok := parseID(gid); ok && m == user {
				ids = append(ids, id)
				break
			}
		}
	}
	return ids
}

// parseID reads a uid or gid; the highest is the kernel's word for none.
func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n < 1<<32-1
}

// environment adds what every program expects and the host did not set.
func environment(p *guestproto.Program, who identity) []string {
	env := p.Env
	defaults := [][2]string{{"PATH", defaultPath}, {"HOME", who.home}}
	if p.TTY {
		defaults = append(defaults, [2]string{"TERM", "xterm"})
	}
	for _, d := range defaults {
		set := false
		for _, e := range env {
			set = set || len(e) > len(d[0]) && e[:len(d[0])] == d[0] && e[len(d[0])] == '='
		}
		if !set {
			env = append(env, d[0]+"="+d[1])
		}
	}
	return env
}
